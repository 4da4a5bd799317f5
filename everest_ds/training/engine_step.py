"""The training step of a run, usable without the run; benchmarks, profiles and GPU checks time it.

Shape legend: B clips, F frames, H x W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import TracebackType

import torch
from torch import Tensor, nn

from everest_ds.config import Experiment, plan_ranks
from everest_ds.config.mesh_shape import MeshShape
from everest_ds.data.clip_batches import Batch, ClipBatch, PackedBatch
from everest_ds.models.initial_weights import NamedTensor, outline
from everest_ds.models.selection.packer import Packer
from everest_ds.parallel.ds_config import resolve_ds_config
from everest_ds.parallel.engine import Engine, HasOptimizer, build_engine, set_learning_rate, step_skipped
from everest_ds.parallel.mesh import form_mesh
from everest_ds.parallel.nvme import remove_swap_files
from everest_ds.parallel.sharded_init import InitialWeights
from everest_ds.parallel.world import World
from everest_ds.training.optimization import Forward, build_objective, parameter_groups
from everest_ds.training.prefetch import Preparation

_NOISE_RANGE = 0.03  # similar to the spread of initial weights


class MeasuredStep(ABC):
    """Common base of `EngineStep` and `PlainStep`: everything up to the loss.

    Attributes:
        micro_batches: micro-batches per optimiser step (`grad_accum_steps` of the batch plan).
        learning_rate: set before each forward pass. At 0.0 the weights do not change, and an update takes as
            long as with any other rate.
    """

    def __init__(
        self, config: Experiment, device: torch.device, micro_batches: int, learning_rate: float, share: int
    ) -> None:
        """Prepare a batch of noise; `share`, the data-parallel rank, seeds it."""
        self.micro_batches = micro_batches
        self.learning_rate = learning_rate
        self._objective = build_objective(config)
        self._prepare = Preparation(config, device)
        self._noise = noise_batch(config, device, share)
        self._changes_clips = config.augment.changes
        # Set by the subclasses.
        self._trained: Forward
        self._optimized: HasOptimizer

    def load(self) -> Batch:
        """Return a micro-batch of noise on the device, the same at every call, not yet augmented."""
        noise = self._noise
        # Augmentation works in place, so it gets a copy.
        return noise._replace(clip=noise.clip.clone()) if self._changes_clips else noise

    def prepare(self, batch: Batch) -> Batch:
        """Copy a batch to the device and augment it there.

        Args:
            batch: from `load` or a loader: uint8 clips (B, F, H, W, 3) on any device, keys on the host.
        """
        return self._prepare(batch)

    def loss(self, prepared: Batch) -> Tensor:
        """Set the learning rate and compute this rank's loss."""
        set_learning_rate(self._optimized, self.learning_rate)
        return self._objective(self._trained, prepared)

    def forward(self, batch: Batch) -> Tensor:
        """Prepare a batch and compute its loss; a run, by contrast, prepares it during the previous step."""
        return self.loss(self.prepare(batch))

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Compute gradients and add them to those of earlier micro-batches."""

    @abstractmethod
    def update(self) -> bool:
        """Update the weights if this is the last micro-batch.

        Returns:
            True if the update was skipped because a gradient is not finite.
        """


class EngineStep(MeasuredStep):
    """One optimiser step of the engine that `train` builds for an experiment. Use it on every rank.

    DeepSpeed, tensor parallelism, recomputation, augmentation, drop path and label smoothing follow the
    config.
    The loader, the observers and the message by which ranks report unreadable videos are not included.
    A step consists of `micro_batches` rounds of all phases; the weights change in the last round:

        with EngineStep(config, world) as step:
            for _ in range(step.micro_batches):
                loss = step.forward(step.load())
                step.backward(loss)
                skipped = step.update()

    Attributes:
        engine: DeepSpeed's engine, with the model in `engine.module`.
    """

    def __init__(
        self,
        config: Experiment,
        world: World,
        weights: InitialWeights | None = None,
        learning_rate: float = 0.0,
    ) -> None:
        """Build the engine.

        Args:
            config: the run config.
            world: from `join_world`; `everest_ds.parallel.world_of_one.world_of_one` needs no launcher.
            weights: initial weights. The default is noise drawn on the device, because initialising a ViT-L
                on the host takes 10 s.
            learning_rate: the rate of every update; 0.0 leaves the weights unchanged.

        Raises:
            ConfigError: if the config does not run on these ranks or this device.
        """
        plan, mesh = plan_ranks(config, world.size), form_mesh(world, MeshShape.of(config, world.size))
        super().__init__(config, world.device, plan.grad_accum_steps, learning_rate, mesh.share)
        model = outline(config)
        groups = parameter_groups(model, config.optimizer)
        weights = weights or noise_weights(config, world.device)
        self.engine: Engine = build_engine(
            model, groups, config, resolve_ds_config(config, world.size), mesh, weights
        )
        self._trained = self._optimized = self.engine
        self._config, self._world = config, world

    def backward(self, loss: Tensor) -> None:
        """Compute gradients with DeepSpeed, which reduces them as its ZeRO stage requires."""
        self.engine.backward(loss)

    def update(self) -> bool:
        """Update the weights with DeepSpeed if this is the last micro-batch.

        Returns:
            True if DeepSpeed skipped the update because a gradient is not finite.
        """
        last = self.engine.is_gradient_accumulation_boundary()
        self.engine.step()
        return last and step_skipped(self.engine)

    def close(self) -> None:
        """Free the engine and its files; the process group remains."""
        self.engine.destroy()
        del self.engine, self._trained, self._optimized
        remove_swap_files(self._config, self._world.rank)

    def __enter__(self) -> EngineStep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def noise_batch(config: Experiment, device: torch.device, seed: int = 0) -> Batch:
    """Return a micro-batch of random pixels, in the form that the loader returns.

    Clips (B, F, H, W, 3) or packed tubelets, and labels (B,), are on the device. Keys and items (B,) are on
    the host, where augmentation and reports read them.
    """
    g, size = config.candidate_geometry, config.batch.micro_batch_size
    generator = torch.Generator(device).manual_seed(seed)
    shape = (size, g.num_frames, g.image_size, g.image_size, 3)
    clip = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
    item = torch.arange(size) + size * seed
    label = (item % (config.model.num_classes or 1)).to(device)
    if not (config.data.sends_tokens or config.tokens.reads_motion):
        return ClipBatch(clip, label, item, item)
    still = torch.zeros(g.num_slots, g.grid_size, g.grid_size, 2, device=device)
    moved = still if config.tokens.reads_motion else None
    pack = Packer(config, keeps_clips=not config.data.sends_tokens)
    tubelets, kept = zip(*(pack(each, moved) for each in clip), strict=True)
    return PackedBatch(torch.stack(tubelets), label, item, item, torch.stack(kept))


def noise_weights(config: Experiment, device: torch.device) -> InitialWeights:
    """Return initial weights of noise, which are fast to draw and equal at every call.

    Matrices and buffers are uniform noise; norms start at one, biases at zero.
    """

    def draw() -> Iterator[NamedTensor]:
        model, generator = outline(config), torch.Generator(device).manual_seed(0)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            whole = torch.empty(tensor.shape, device=device)
            if isinstance(tensor, nn.Parameter) and tensor.ndim == 1:
                yield name, whole.fill_(float(name.endswith(".weight")))
            else:
                yield name, whole.uniform_(-_NOISE_RANGE, _NOISE_RANGE, generator=generator)

    return draw
