"""Predictions of the published memory figures, with one set of assumptions per table and none per cell.

The papers state neither the batch nor the precision of a memory figure. All predictions assume the released
code (fp16 autocast, attention matrices in memory, no recomputation) under PyTorch's DDP, and add up the 8
GPUs of a node. The batch is assumed per table; only `OTHER_BYTES` is fitted, once for all tables.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from everest_ds.config.backbones import BACKBONES, TransformerShape
from everest_ds.config.precision import FLOAT16_BYTES, FLOAT32_BYTES
from everest_ds.config.schema import Experiment
from everest_ds.config.selections import pretrain_counts
from everest_ds.config.tokens import ClipGeometry
from everest_ds.costs.compute import count_parameters
from everest_ds.efficiency.autocast_memory import (
    AutocastStack,
    kept_bytes,
    working_bytes,
)
from everest_ds.efficiency.systems import SYSTEMS, OwnModel

NUM_GPUS = 8
# float32 weight, gradient, two AdamW moments and DDP bucket, and the fp16 weight that autocast caches
BYTES_PER_PARAMETER = 5 * FLOAT32_BYTES + FLOAT16_BYTES
# All else that a GPU holds: CUDA's and NCCL's contexts, workspaces, the allocator's fragmentation. The value
# is fitted: it minimises the largest gap over the cells that the assumptions explain.
OTHER_BYTES = 1_750_000_000
GIGA = 10**9

_GEOMETRY = ClipGeometry()
_NUM_TOKENS = _GEOMETRY.num_tokens
_CLIP_BYTES = _NUM_TOKENS * _GEOMETRY.tubelet_values * FLOAT32_BYTES  # float32, as normalised on the host
_EMBEDDED_BYTES = _CLIP_BYTES // 2  # fp16, as the embedding reads it under autocast
_VIT_BASE = BACKBONES["vit_base"].encoder


@dataclass(frozen=True)
class Assumptions:
    """The assumed setting of a published table's memory column.

    Attributes:
        clips_per_gpu: batch size per GPU.
        why: origin of that batch size.
    """

    clips_per_gpu: int
    why: str


ASSUMPTIONS = {
    "pretraining_cost": Assumptions(24, "EVEREST's released pre-training scripts"),
    "k400": Assumptions(32, "the paper's 256 clips per node in pre-training"),
    "k400_finetuning_of_other_mvas": Assumptions(16, "EVEREST's released fine-tuning scripts"),
}

_OTHER_BATCH = (
    "not explained: the figure would need 86 clips per GPU, at which EVEREST needs 186 GB, twice its"
    " published figure; the pre-training cost table gives 150.3 for the same step"
)
_OTHER_DECODER = (
    "not explained by the 4 decoder blocks behind its GFLOPs; the released ViT-L script has 12, which would"
    " need 616 GB"
)
# Cells that their table's assumptions do not explain, with the known facts about each.
UNEXPLAINED = {
    ("k400", "VideoMAE", "ViT-B"): _OTHER_BATCH,
    ("k400", "VideoMAE", "ViT-L"): _OTHER_DECODER,
}


@dataclass(frozen=True)
class ReleasedStep:
    """A training step of a released system.

    Attributes:
        stacks: trained stacks, in the order of the forward pass.
        clip_bytes: bytes per clip outside of the blocks' activations.
        num_parameters: number of trained parameters.
        frozen: stacks of frozen teachers.
        num_frozen: number of the teachers' parameters.
    """

    stacks: tuple[AutocastStack, ...]
    clip_bytes: int
    num_parameters: int
    frozen: tuple[AutocastStack, ...] = ()
    num_frozen: int = 0

    @property
    def bytes_per_clip(self) -> int:
        """Bytes per clip at the peak of the step."""
        kept = sum(kept_bytes(stack) for stack in self.stacks)
        return self.clip_bytes + kept + working_bytes(self.stacks[-1], self.frozen)

    @property
    def fixed_bytes(self) -> int:
        """Bytes per GPU that do not depend on the batch size."""
        states = BYTES_PER_PARAMETER * self.num_parameters + (FLOAT32_BYTES + FLOAT16_BYTES) * self.num_frozen
        return states + OTHER_BYTES


def predict_published_memory(table: str, method: str, backbone: str | None) -> tuple[float, str]:
    """Predict the memory of a node of 8 GPUs and describe the assumptions.

    Args:
        table: name of a table in published.yaml.
        method: name of a system in that table.
        backbone: backbone of the row; None means ViT-B.

    Returns:
        The memory in GB (10^9 bytes), and the assumptions as text.

    Raises:
        KeyError: the table or system has no memory figure.
    """
    assumed = ASSUMPTIONS[table]
    step = released_step(method, backbone or "ViT-B", pretrain=table != "k400_finetuning_of_other_mvas")
    note = f"{assumed.clips_per_gpu} clips per GPU ({assumed.why}), fp16 autocast, unfused attention"
    unexplained = UNEXPLAINED.get((table, method, backbone or ""))
    return node_gb(step, assumed.clips_per_gpu), "; ".join(filter(None, [note, unexplained]))


def node_gb(step: ReleasedStep, clips_per_gpu: int) -> float:
    """Return the memory of a whole node of 8 GPUs, in GB (10^9 bytes)."""
    return NUM_GPUS * (clips_per_gpu * step.bytes_per_clip + step.fixed_bytes) / GIGA


def released_step(method: str, backbone: str, pretrain: bool) -> ReleasedStep:
    """Return the training step behind a row of the published tables."""
    if (method, pretrain) in _OTHERS:
        return _OTHERS[method, pretrain]
    system = SYSTEMS[method, backbone]
    subject = system.pretrain if pretrain else system.finetune
    assert isinstance(subject, OwnModel)
    return _pretraining_step(subject.config) if pretrain else _finetuning_step(subject.config)


def _pretraining_step(config: Experiment) -> ReleasedStep:
    """Return the pre-training step of VideoMAE and EVEREST, which share one training loop.

    The loop holds four float32 versions of the clip: as loaded, un-normalised, cut into tubelets, and as
    normalised tubelets. In memory are also the targets, the predictions in fp16 and float32, and the inputs
    of the two norms outside of blocks (float32) and of the linear maps after them (fp16).
    """
    counts, shape = config.token_counts, config.model.shape
    predicted = counts.num_predicted * _GEOMETRY.tubelet_values
    projected = counts.num_visible * shape.encoder.width + counts.num_predicted * shape.decoder.width
    return ReleasedStep(
        stacks=(
            AutocastStack(shape.encoder, counts.num_visible),
            AutocastStack(shape.decoder, counts.num_kept),
        ),
        clip_bytes=4 * _CLIP_BYTES
        + _EMBEDDED_BYTES
        + predicted * (2 * FLOAT32_BYTES + FLOAT16_BYTES)
        + projected * (FLOAT32_BYTES + FLOAT16_BYTES),
        num_parameters=count_parameters(config),
    )


def _finetuning_step(config: Experiment) -> ReleasedStep:
    """Return the fine-tuning step of a system, which has no decoder."""
    return ReleasedStep(
        stacks=(AutocastStack(config.model.shape.encoder, config.token_counts.num_kept),),
        clip_bytes=_CLIP_BYTES + _EMBEDDED_BYTES,
        num_parameters=count_parameters(config),
    )


def _mme_step() -> ReleasedStep:
    """Return the pre-training step of MME at mask ratio 0.7.

    Its histograms need much memory, but only before any activations exist, so they are not part of the peak.
    """
    counts = pretrain_counts(_GEOMETRY, "tube", 1.0, 0.7)
    targets = _NUM_TOKENS * (108 + 32) * FLOAT32_BYTES  # histogram and trajectory
    hidden = counts.num_predicted * 2 * 512 * 2 * FLOAT16_BYTES  # two heads, before and after GELU
    decoder = TransformerShape(width=192, depth=1, heads=6)
    return ReleasedStep(
        stacks=(AutocastStack(_VIT_BASE, counts.num_visible), AutocastStack(decoder, _NUM_TOKENS)),
        clip_bytes=_CLIP_BYTES + _EMBEDDED_BYTES + targets + hidden,
        num_parameters=87_089_356,
    )


def _mvd_step() -> ReleasedStep:
    """Return the pre-training step of MVD: the student's activations are live while its ViT-B teachers run.

    Student and teachers each have a copy of the clip.
    """
    counts = pretrain_counts(_GEOMETRY, "tube", 1.0, 0.9)
    decoder = AutocastStack(replace(_VIT_BASE, depth=2), _NUM_TOKENS)
    predicted = 2 * counts.num_predicted * _VIT_BASE.width * FLOAT16_BYTES
    return ReleasedStep(
        stacks=(AutocastStack(_VIT_BASE, counts.num_visible), decoder, decoder),
        clip_bytes=2 * _CLIP_BYTES + _EMBEDDED_BYTES + predicted,
        num_parameters=116_942_592,
        frozen=(AutocastStack(_VIT_BASE, _NUM_TOKENS),),
        num_frozen=85_647_360 + 86_227_200,
    )


_OTHERS = {("MME", True): _mme_step(), ("MVD", True): _mvd_step()}
