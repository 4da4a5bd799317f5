"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

with suppress(ModuleNotFoundError):  # tests/gpu runs without hypothesis
    from hypothesis import settings

    # Shared machines stall, and a deadline would fail correct tests for being slow.
    settings.register_profile("default", deadline=None)
    settings.load_profile("default")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # test processes share the cores, and are far slower if each uses all of them

# DeepSpeed's compiled extensions stay in this checkout, so that files left in the home folder by a killed run
# do not affect the tests.
os.environ["TORCH_EXTENSIONS_DIR"] = os.fspath(Path(__file__).parents[1] / "build/torch_extensions")

os.environ.setdefault("COLUMNS", "200")  # wide enough that command-line tables are not wrapped

if "PYTEST_XDIST_WORKER" in os.environ:
    # A process has one fork server. If a test of the data commands started it first, it would lack modules
    # that tests.ranks preloads, and each rank of the tests after it would import torch and DeepSpeed itself.
    import tests.ranks  # noqa: F401

    os.environ["DS_ACCELERATOR"] = "cpu"  # read by the server when it imports DeepSpeed
    forkserver.ensure_running()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of all tests here, because pytest reads options from the top-level conftest only."""
    parser.addoption(
        "--slurm-report", type=Path, help="write what each fault cost the SLURM runs, as Markdown"
    )
    parser.addoption("--signal-report", type=Path, help="write the times of the signal matrix, as Markdown")
    parser.addoption(
        "--every-signal", action="store_true", help="try every case of the signal matrix, which takes hours"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collect only tests/gpu under `-m gpu`, because collecting the rest takes longer than the GPU tests."""
    gpu = Path(__file__).parent / "gpu"
    elsewhere = gpu not in (collection_path, *collection_path.parents) and collection_path not in gpu.parents
    return True if config.option.markexpr == "gpu" and elsewhere else None


@pytest.fixture(scope="session")
def motion_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a small synthetic motion data set: 24 training, 12 validation and 12 test videos of 32 px."""
    from everest_ds.data.synthetic import SyntheticSpec, synthesize

    folder = tmp_path_factory.mktemp("motion")
    synthesize(folder, {"train": 24, "val": 12, "test": 12}, SyntheticSpec(num_frames=20, size=32), workers=1)
    return folder
