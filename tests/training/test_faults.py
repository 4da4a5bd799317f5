"""Tests of resuming after faults: a run continues from the last complete checkpoint, bit-exact on a CPU.

Each test interrupts one run by faults, restarts it after each, and compares its losses with those of an
undisturbed run.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from everest_ds.checkpoints import tensor_file
from everest_ds.checkpoints.folder import verify_checkpoint
from everest_ds.checkpoints.names import checkpoint_path, list_checkpoints
from everest_ds.checkpoints.reader import CheckpointReader
from everest_ds.config import Experiment
from everest_ds.errors import RankLostError
from everest_ds.parallel import checkpointing as saving
from everest_ds.parallel.world import World, explained_failures
from tests.checkpoints.test_folder import DAMAGES
from tests.ranks import run_ranks
from tests.training.faults import (
    ON_EVERY_RANK,
    PLACES,
    at_end_of,
    at_forward,
    before,
    hang,
    kill_myself,
    long_run,
    mid_stream,
    outcome,
    replaced,
    steps_done,
    stop_at,
    train_with_fault_in_save,
)
from tests.training.runs import losses, metrics, train_rank

FILES = ("rank-00000.safetensors", "rank-00001.safetensors", "manifest.json", "manifest.sha256")


@pytest.fixture(scope="module")
def undisturbed(motion_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Return the losses of a run without faults."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_ranks(train_rank, 2, long_run(motion_data, folder))
    return losses(folder)


def assert_equal_so_far(folder: Path, undisturbed: dict[int, float]) -> None:
    done = losses(folder)
    assert done == {step: undisturbed[step] for step in range(1, len(done) + 1)}


def expect_killed(world_function: Callable[..., object], *args: object) -> None:
    with pytest.raises(AssertionError, match=r"rank \d (died|failed)"):
        run_ranks(world_function, 2, *args)


def kill_in_save(folder: Path, config: Experiment, step: int, rank: int, place: str) -> None:
    """Kill `rank` at `place` of the save of `step`, and check that only this step may be lost."""
    expect_killed(train_with_fault_in_save, config, step, rank, place, kill_myself)
    found = [int(path.name[5:]) for path in list_checkpoints(folder / "checkpoints")]
    is_done = place in ("after the rename", "before old ones go", "while an old one goes")
    assert max(found, default=0) == (step if is_done else step - 1)


@pytest.mark.parametrize(
    "rank, places",
    [
        (1, ["in the middle of a shard"]),
        pytest.param(0, list(PLACES), marks=pytest.mark.slow),
        pytest.param(1, ON_EVERY_RANK, marks=pytest.mark.slow),
    ],
    ids=["mid-shard", "rank 0 everywhere", "rank 1 everywhere"],
)
def test_a_rank_killed_while_it_saves(
    motion_data: Path, tmp_path: Path, undisturbed: dict[int, float], rank: int, places: list[str]
) -> None:
    config = long_run(motion_data, tmp_path)
    for step, place in enumerate(places, 3):
        kill_in_save(tmp_path, config, step, rank, place)
    run_ranks(stop_at, 2, config, len(places) + 3)
    assert steps_done(tmp_path) == len(places) + 3
    assert_equal_so_far(tmp_path, undisturbed)
    assert not list((tmp_path / "checkpoints").glob(".*"))


def hurt_newest(hurt: Callable[[Path], object], folder: Path, file: str) -> None:
    hurt(list_checkpoints(folder)[-1] / file)


def damage_and_resume(world: World, config: Experiment, file: str) -> list[str]:
    """Damage `file` of the newest checkpoint in every way, and resume for one step after each damage."""
    folder, said = config.run.dir / "checkpoints", []
    stop_at(world, config, 3)
    for step, hurt in enumerate(DAMAGES.values(), 4):
        world.share(partial(hurt_newest, hurt, folder, file))
        said.append(stop_at(world, config, step))
    return said


@pytest.mark.parametrize(
    "file", [pytest.param(file, marks=[pytest.mark.slow] if file != FILES[1] else []) for file in FILES]
)
def test_every_damage_to_every_file_costs_one_checkpoint(
    motion_data: Path, tmp_path: Path, undisturbed: dict[int, float], file: str
) -> None:
    said = run_ranks(damage_and_resume, 2, long_run(motion_data, tmp_path), file)[0]
    assert ["StoppedError" in message for message in said] == [True] * len(DAMAGES), said
    assert steps_done(tmp_path) == 3 + len(DAMAGES)
    assert_equal_so_far(tmp_path, undisturbed)
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    steps = range(3, 3 + len(DAMAGES))
    assert re.findall(r"not resuming from .*/step-0*(\d+): ", log) == [str(step) for step in steps]
    assert re.findall(r"INFO resuming from .*/step-0*(\d+)$", log, re.M) == [str(step - 1) for step in steps]
    aside = [path.name for path in (tmp_path / "checkpoints").glob("damaged-*")]
    assert len(aside) == len(DAMAGES)


def resume(world: World, config: Experiment) -> str:
    return outcome(world, config)


@pytest.mark.slow
def test_only_damaged_checkpoints_are_refused_not_started_over(motion_data: Path, tmp_path: Path) -> None:
    config = long_run(motion_data, tmp_path)
    run_ranks(stop_at, 1, config, 1)
    (list_checkpoints(tmp_path / "checkpoints")[0] / FILES[0]).write_bytes(b"")
    for _ in range(2):
        (message,) = run_ranks(resume, 1, config)
        assert message.startswith("CheckpointError") and "none of 1 checkpoints is complete" in message


def full_disk_in_save(world: World, config: Experiment, step: int) -> str:
    """Train with a full disk on rank 1 in the middle of its shard of `step`."""

    def no_space() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return train_with_fault_in_save(world, config, step, 1, "in the middle of a shard", no_space)


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_a_save_that_finds_no_space_says_so_on_every_rank(
    motion_data: Path, tmp_path: Path, undisturbed: dict[int, float], background: bool
) -> None:
    config = long_run(motion_data, tmp_path, save_in_background=background)
    for message in run_ranks(full_disk_in_save, 2, config, 3):
        assert message.startswith("CheckpointError") and "No space left on device; fix: free disk" in message
    assert not list((tmp_path / "checkpoints").glob(".*"))
    run_ranks(stop_at, 2, config, 5)
    assert_equal_so_far(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_full_file_system(motion_data: Path, tmp_path: Path, undisturbed: dict[int, float]) -> None:
    """A run resumes after a real full disk: a tmpfs with space for two and a half checkpoints."""
    run_ranks(stop_at, 2, long_run(motion_data, tmp_path / "sized"), 1)
    size = sum(
        file.stat().st_size for file in (tmp_path / "sized" / "checkpoints").rglob("*.*") if file.is_file()
    )
    config = long_run(motion_data, tmp_path / "run")
    disk = tmp_path / "run" / "checkpoints"
    disk.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(2.5 * size)}", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    try:
        for message in run_ranks(resume, 2, config):
            assert message.startswith("CheckpointError") and "No space left on device" in message
        assert [path.name for path in list_checkpoints(disk)] == ["step-00000001", "step-00000002"]
        subprocess.run(["mount", "-o", f"remount,size={10 * size}", str(disk)], check=True)
        run_ranks(stop_at, 2, config, 5)
        assert_equal_so_far(tmp_path / "run", undisturbed)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def saved_while_steps_go_on(world: World, config: Experiment) -> list[int]:
    """Block rank 1's write of the checkpoint of step 2 until step 4 is done.

    Returns:
        The number of logged steps at each publication, on rank 0.
    """
    done, published = threading.Event(), []

    wait = replaced(tensor_file, "_chunks", mid_stream(done.wait))
    note = replaced(saving, "commit", before(lambda: published.append(steps_done(config.run.dir))))
    with wait if world.rank else nullcontext(), note if world.is_main else nullcontext():
        with at_end_of(4, done.set):
            stop_at(world, config, 5)
    return published


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_checkpoint_written_in_the_background_is_of_the_step_that_began_it(
    motion_data: Path, tmp_path: Path, stage: int
) -> None:
    options = {"save_every_steps": 2, "keep_checkpoints": 9}
    here = long_run(motion_data, tmp_path / "here", stage, save_in_background=False, **options)
    there = long_run(motion_data, tmp_path / "there", stage, save_in_background=True, **options)
    run_ranks(stop_at, 2, here, 5)
    assert run_ranks(saved_while_steps_go_on, 2, there)[0] == [4]
    for path in list_checkpoints(tmp_path / "here" / "checkpoints"):
        assert (
            verify_checkpoint(tmp_path / "there" / "checkpoints" / path.name).files
            == verify_checkpoint(path).files
        )


def not_a_number(world: World, config: Experiment, step: int, rank: int) -> str:
    with at_forward(step if world.rank == rank else -1, lambda loss: loss * torch.nan):
        return outcome(world, config)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_of_nan_on_one_rank_stops_all_and_is_never_saved(
    motion_data: Path, tmp_path: Path, undisturbed: dict[int, float], rank: int
) -> None:
    config = long_run(motion_data, tmp_path, save_every_steps=3, log_every_steps=100)
    messages = run_ranks(not_a_number, 2, config, 5, rank)
    assert messages[0] == messages[1]
    assert f"DivergedError: the loss is nan at step 5 on rank {rank}; given: samples " in messages[0]
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000003"]
    log = (tmp_path / "logs" / f"rank-{rank}.log").read_text()
    assert log.count(".mp4") == 4 and all(line.split()[-1] in log for line in messages[0].split(", ")[1:3])
    run_ranks(stop_at, 2, long_run(motion_data, tmp_path), 7)
    done = losses(tmp_path)
    assert done == {step: undisturbed[step] for step in done} and max(done) == 7


def leave_out_twice(world: World, config: Experiment, rank: int) -> str:
    """Train with losses of NaN at steps 3, 5 and 6 on one rank."""
    with ExitStack() as faults:
        for step in (3, 5, 6) if world.rank == rank else ():
            faults.enter_context(at_forward(step, lambda loss: loss * torch.nan))
        return outcome(world, config)


@pytest.mark.slow
@pytest.mark.parametrize("stage, tensor, rank", [(1, 1, 0), (2, 2, 1), (3, 1, 1), (3, 2, 0)])
def test_a_step_with_nan_on_one_rank_is_left_out_by_all_as_often_as_allowed(
    motion_data: Path, tmp_path: Path, stage: int, tensor: int, rank: int
) -> None:
    config = long_run(motion_data, tmp_path, stage, tensor, keep_checkpoints=4, max_skipped_steps=1)
    messages = run_ranks(leave_out_twice, 2, config, rank)
    assert messages[0] == messages[1]
    assert messages[0].startswith("DivergedError: the loss is nan at step 6 on rank")
    assert [row["loss"] is None for row in metrics(tmp_path)] == [False, False, True, False, True]
    before, after, later = (weights_after(tmp_path, step) for step in (2, 3, 4))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(after[name], later[name]) for name in after)
    assert "step 3 skipped" in (tmp_path / "logs" / "rank-0.log").read_text()
    assert (tmp_path / "logs" / f"rank-{rank}.log").read_text().count("samples of this micro-batch:") == 3


def weights_after(run: Path, step: int) -> dict[str, Tensor]:
    """Return the parameters in the checkpoint of `step`, and AdamW's step count under the name `steps`."""
    path = checkpoint_path(run / "checkpoints", step)
    manifest = verify_checkpoint(path)
    with CheckpointReader(path, manifest) as reader:
        return {**dict(reader.weights()), "steps": torch.tensor(manifest.facts.optimizer_step)}


def hit_in_step(
    world: World, config: Experiment, step: int, rank: int, act: Callable[[Tensor], Tensor]
) -> None:
    try:
        with at_forward(step if world.rank == rank else -1, act), explained_failures(world):
            message = outcome(world, config)
    except RankLostError as error:
        message = f"RankLostError: {error}"
    (config.run.dir / f"message-{world.rank}").write_text(message)


def die(loss: Tensor) -> Tensor:
    kill_myself()
    return loss


@pytest.mark.slow
@pytest.mark.parametrize("act", [die, hang], ids=["dies", "hangs"])
def test_a_rank_that_dies_or_hangs_in_a_step_is_named(
    motion_data: Path, tmp_path: Path, undisturbed: dict[int, float], act: Callable[[Tensor], Tensor]
) -> None:
    config = long_run(motion_data, tmp_path, hang_timeout_s=10)
    with pytest.raises(AssertionError, match="rank 1 died"):
        run_ranks(hit_in_step, 2, config, 4, 1, act, patience_s=10)
    message = (tmp_path / "message-0").read_text()
    assert message.startswith("RankLostError: rank 0 lost a peer: no answer from rank 1")
    if act is hang:
        stacks = (tmp_path / "logs" / "rank-1.stacks").read_text()
        assert "faults.py" in stacks and " in hang" in stacks and " in _train_step" in stacks
    run_ranks(stop_at, 2, config, 6)
    assert_equal_so_far(tmp_path, undisturbed)


def signals_in_save(world: World, config: Experiment, step: int, numbers: tuple[int, ...]) -> str:
    """Train, and send signals to rank 1 one after the other in the middle of its shard of `step`."""

    def send() -> None:
        while pending:
            os.kill(os.getpid(), pending.pop(0))

    pending = list(numbers)
    return train_with_fault_in_save(world, config, step, 1, "in the middle of a shard", send)


TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(TERM, TERM), (USR1, TERM), (INT, TERM)])
def test_two_signals_in_a_save_let_it_finish(
    motion_data: Path, tmp_path: Path, undisturbed: dict[int, float], numbers: tuple[int, ...]
) -> None:
    config = long_run(motion_data, tmp_path)
    for message in run_ranks(signals_in_save, 2, config, 3, numbers):
        assert message.startswith("StoppedError: stopped after step 4 of 36")
    run_ranks(stop_at, 2, config, 6)
    assert_equal_so_far(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_second_ctrl_c_in_a_save_ends_it_and_leaves_the_last_one(
    motion_data: Path, tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    config = long_run(motion_data, tmp_path)
    expect_killed(partial(signals_in_save, step=3, numbers=(INT, INT)), config)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")][-1] == "step-00000002"
    run_ranks(stop_at, 2, config, 5)
    assert_equal_so_far(tmp_path, undisturbed)
