"""Timing of training steps on this machine, with the DeepSpeed engine and with a plain loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from everest_ds.parallel.world_of_one import world_of_one

if TYPE_CHECKING:
    from everest_ds.config import Experiment
    from everest_ds.efficiency.measured import Measured
    from everest_ds.parallel.world import World
    from everest_ds.profiling.step_phases import TrainingStep
    from everest_ds.training.engine_step import MeasuredStep


def measure_both_steps(subject: str, config: Experiment) -> tuple[Measured, Measured]:
    """Measure a training step of the DeepSpeed engine and one of a plain loop, both on one rank.

    `batch.global_batch_size` is ignored, because it describes a run on many ranks: a step here has
    `batch.grad_accum_steps` micro-batches, one by default.

    Returns:
        The measurements of the engine and of the plain loop.

    Raises:
        ConfigError: if the config cannot run on one rank or on this device.
        OutOfMemoryError: if a step does not fit into the device's memory.
    """
    from everest_ds.efficiency.measured import measure_experiment
    from everest_ds.training.run_folder import describe_environment

    config = config.model_copy(update={"batch": config.batch.model_copy(update={"global_batch_size": None})})
    commit = (describe_environment(world_size=1)["git"] or {}).get("commit")
    with world_of_one() as world:
        engine = measure_experiment(subject, config, _engine(config, world), world.device, commit)
        plain = measure_experiment(subject, config, _plain(config, world), world.device, commit)
    return engine, plain


@contextmanager
def _engine(config: Experiment, world: World) -> Iterator[TrainingStep]:
    from everest_ds.training.engine_step import EngineStep

    with EngineStep(config, world) as step:
        yield _phases(step, world)


@contextmanager
def _plain(config: Experiment, world: World) -> Iterator[TrainingStep]:
    from everest_ds.training.plain_step import PlainStep

    yield _phases(PlainStep(config, world.device), world)


def _phases(step: MeasuredStep, world: World) -> TrainingStep:
    """Divide a step into the phases of a real run.

    On a GPU, a run augments the next batch concurrently with the step; on a CPU, it does so within the step.
    """
    from everest_ds.profiling.step_phases import TrainingStep

    rest = step.backward, step.update, step.micro_batches
    if world.device.type == "cuda":
        return TrainingStep(lambda: step.prepare(step.load()), step.loss, *rest)
    return TrainingStep(step.load, step.forward, *rest)
