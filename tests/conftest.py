"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

with suppress(ModuleNotFoundError):  # tests/gpu runs without it
    from hypothesis import settings

    # Shared machines stall: a deadline would fail tests for being slow, not for being wrong.
    settings.register_profile("default", deadline=None)
    settings.load_profile("default")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # test processes share the cores: each taking all of them is slower, by far

# What DeepSpeed compiles: of this checkout alone, whatever a killed run has left in the home.
os.environ["TORCH_EXTENSIONS_DIR"] = os.fspath(Path(__file__).parents[1] / "build/torch_extensions")

os.environ.setdefault("COLUMNS", "200")  # tables of the command line are not folded


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options are known only if the top conftest adds them."""
    parser.addoption(
        "--slurm-report", type=Path, help="write what each fault cost the SLURM runs, as Markdown"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` look into tests/gpu alone: collecting everything else takes longer than running those."""
    gpu = Path(__file__).parent / "gpu"
    elsewhere = gpu not in (collection_path, *collection_path.parents) and collection_path not in gpu.parents
    return True if config.option.markexpr == "gpu" and elsewhere else None


@pytest.fixture(scope="session")
def motion_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic motion data set: 24 training, 12 validation and 12 test videos, 32 px."""
    from everest_ds.data.synthetic import SyntheticSpec, synthesize

    folder = tmp_path_factory.mktemp("motion")
    synthesize(folder, {"train": 24, "val": 12, "test": 12}, SyntheticSpec(num_frames=20, size=32), workers=1)
    return folder
