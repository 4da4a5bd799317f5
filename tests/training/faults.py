"""Fault injection at exact places of a training run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from everest_ds.checkpoints import folder, tensor_file
from everest_ds.checkpoints import sealed_manifest as manifest
from everest_ds.config import Experiment
from everest_ds.errors import EverestError
from everest_ds.parallel import checkpointing as saving
from everest_ds.parallel.world import World
from everest_ds.training import loop
from everest_ds.training.loop import train
from tests.training.runs import experiment, losses

STEPS_PER_EPOCH = 3


def long_run(data: Path, path: Path, stage: int = 2, tensor: int = 1, **run: object) -> Experiment:
    """Return a run of 36 short steps on two ranks that saves after every step."""
    return experiment(
        data,
        path,
        model={"backbone": "vit_tiny", "image_size": 16, "patch_size": 8, "num_frames": 4},
        data={"num_workers": 0},
        schedule={"epochs": 12, "warmup_epochs": 1},
        batch={"micro_batch_size": 4 * tensor},
        parallelism={"zero_stage": stage, "tensor": tensor},
        run={"save_every_steps": 1, **run},
    )


@contextmanager
def replaced(
    owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Replace the attribute `name` of `owner` by `make(original)` within this context."""
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def before(act: Callable[[], object], call: int = 1) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a wrapper that runs `act` before the `call`-th call of a function, counted from 1."""
    calls = iter(range(1, 10**9))

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **more: Any) -> Any:
            if next(calls) == call:
                act()
            return original(*args, **more)

        return wrapped

    return make


def after(act: Callable[[], object]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a wrapper that runs `act` after each call of a function."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **more: Any) -> Any:
            result = original(*args, **more)
            act()
            return result

        return wrapped

    return make


def mid_stream(act: Callable[[], object]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a wrapper of a generator of file chunks that runs `act` once half a megabyte was written."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def chunks(*args: Any) -> Iterator[Any]:
            written = 0
            for chunk in original(*args):
                yield chunk
                written += len(chunk)
                if written > 2**19:
                    act()

        return chunks

    return make


# Places in a save at which a rank can fail: the function that is replaced, and its wrapper. All but the first
# three exist on rank 0 only.
PLACES: dict[str, Callable[[Callable[[], object]], tuple[Any, str, Callable[..., Any]]]] = {
    "before anything is written": lambda act: (saving, "_writer", before(act)),
    "in the middle of a shard": lambda act: (tensor_file, "_chunks", mid_stream(act)),
    "after its shard": lambda act: (saving, "write_tensors", after(act)),
    "before the folder": lambda act: (saving, "start_saving", before(act)),
    "before the manifest": lambda act: (folder, "write_manifest", before(act)),
    "between manifest and seal": lambda act: (manifest, "_write_flushed", before(act, 2)),
    "before the rename": lambda act: (folder, "sync_folder", after(act)),
    "after the rename": lambda act: (folder, "sync_folder", before(act, 2)),
    "before old ones go": lambda act: (saving, "prune", before(act)),
    "while an old one goes": lambda act: (folder.shutil, "rmtree", before(act)),
}
ON_EVERY_RANK = list(PLACES)[:3]


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def at_end_of(step: int, act: Callable[[], object]) -> Iterator[None]:
    """Run `act` when `step` is done, right before it is saved."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def save_or_stop(run: loop.TrainingRun, *args: Any) -> None:
            if run.step == step:
                act()
            original(run, *args)

        return save_or_stop

    with replaced(loop.TrainingRun, "_save_or_stop", make):
        yield


def train_with_fault_in_save(
    world: World, config: Experiment, step: int, rank: int, place: str, act: Callable[[], object]
) -> str:
    """Train, and run `act` on `rank` at `place` of the save of `step`; return how the run ended."""
    if world.rank != rank:
        return outcome(world, config)
    with ExitStack() as armed, at_end_of(step, lambda: armed.enter_context(replaced(*PLACES[place](act)))):
        return outcome(world, config)


def stop_at(world: World, config: Experiment, step: int) -> str:
    """Train until `step` is done and saved; return the message with which the run stopped."""
    with at_end_of(step, lambda: None if world.rank else os.kill(os.getpid(), signal.SIGTERM)):
        return outcome(world, config)


def outcome(world: World, config: Experiment) -> str:
    """Train, and return the error that ended the run on this rank as a user reads it, or "done"."""
    try:
        train(config, world)
    except EverestError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


@contextmanager
def at_forward(number: int, act: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Apply `act` to the loss of this rank's micro-batch `number`, counted from 1."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def build(config: Experiment) -> Callable[..., Tensor]:
            objective, calls = original(config), iter(range(1, 10**9))

            def watched(*args: Any) -> Tensor:
                loss: Tensor = objective(*args)
                return act(loss) if next(calls) == number else loss

            return watched

        return build

    with replaced(loop, "build_objective", make):
        yield


def hang(loss: Tensor) -> Tensor:
    time.sleep(60)
    os._exit(1)


def steps_done(run: Path) -> int:
    return max(losses(run), default=0)
