"""The published memory figures, predicted: one set of assumptions for each table, none for a single cell.

The papers say neither batch nor precision of a memory figure. Assumed throughout: the released code (fp16
autocast, attention matrices in memory, nothing recomputed) under PyTorch's DDP on 8 GPUs, and of a whole
node. The batch is the table's; only `OTHER_BYTES` is fitted, once for all tables.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from everest_ds.config.backbones import BACKBONES, TransformerShape
from everest_ds.config.schema import Experiment
from everest_ds.config.tokens import ClipGeometry, pretrain_counts
from everest_ds.profiling.autocast_memory import (
    FLOAT16_BYTES,
    FLOAT32_BYTES,
    Stack,
    kept_bytes,
    working_bytes,
)
from everest_ds.profiling.compute import count_parameters
from everest_ds.profiling.systems import SYSTEMS, OwnModel

NUM_GPUS = 8
# float32 weight and gradient, AdamW's two moments, DDP's bucket, and the fp16 weight that autocast caches
BYTES_PER_PARAMETER = 5 * FLOAT32_BYTES + FLOAT16_BYTES
# What a GPU holds besides: CUDA's and NCCL's contexts, workspaces, the allocator's gaps. Fitted: makes the
# largest gap of the cells that are explained smallest.
OTHER_BYTES = 1_750_000_000
GIGA = 10**9

_GEOMETRY = ClipGeometry()
_NUM_TOKENS = _GEOMETRY.num_tokens
_CLIP_BYTES = _NUM_TOKENS * _GEOMETRY.tubelet_values * FLOAT32_BYTES  # normalised on the host
_EMBEDDED_BYTES = _CLIP_BYTES // 2  # as the embedding reads it
_VIT_BASE = BACKBONES["vit_base"].encoder


@dataclass(frozen=True)
class Assumptions:
    """What a table's memory column is taken to be measured under.

    Attributes:
        clips_per_gpu: the batch.
        why: where that comes from.
    """

    clips_per_gpu: int
    why: str


ASSUMPTIONS = {
    "pretraining_cost": Assumptions(24, "EVEREST's released pre-training scripts"),
    "k400": Assumptions(32, "the paper's 256 clips of a node in pre-training"),
    "k400_finetuning_of_other_mvas": Assumptions(16, "EVEREST's released fine-tuning scripts"),
}

_OTHER_BATCH = (
    "not explained: it would take 86 clips a GPU, at which EVEREST needs 186 GB, twice its cell; the"
    " pre-training cost table has 150.3 for the same step"
)
_OTHER_DECODER = (
    "not explained by the 4 decoder blocks behind its GFLOPs; the released script of ViT-L has 12, which come"
    " to 616 GB"
)
# Cells that their table's assumptions do not explain, and what is known of them.
UNEXPLAINED = {
    ("k400", "VideoMAE", "ViT-B"): _OTHER_BATCH,
    ("k400", "VideoMAE", "ViT-L"): _OTHER_DECODER,
}


@dataclass(frozen=True)
class ReleasedStep:
    """A training step of a released system.

    Attributes:
        stacks: trained ones, in the order of the forward pass.
        clip_bytes: of one clip, besides its blocks' activations.
        num_parameters: trained.
        frozen: teachers' stacks.
        num_frozen: their parameters.
    """

    stacks: tuple[Stack, ...]
    clip_bytes: int
    num_parameters: int
    frozen: tuple[Stack, ...] = ()
    num_frozen: int = 0

    @property
    def bytes_per_clip(self) -> int:
        """At the peak of the step."""
        kept = sum(kept_bytes(stack) for stack in self.stacks)
        return self.clip_bytes + kept + working_bytes(self.stacks[-1], self.frozen)

    @property
    def fixed_bytes(self) -> int:
        """Of a GPU, whatever its batch."""
        states = BYTES_PER_PARAMETER * self.num_parameters + (FLOAT32_BYTES + FLOAT16_BYTES) * self.num_frozen
        return states + OTHER_BYTES


def predict_published_memory(table: str, method: str, backbone: str | None) -> tuple[float, str]:
    """Memory of a node of 8 GPUs in GB (10^9 bytes), and what was assumed.

    Args:
        table, method, backbone: as in published.yaml.

    Raises:
        KeyError: for a table or system without a memory figure.
    """
    assumed = ASSUMPTIONS[table]
    step = released_step(method, backbone or "ViT-B", pretrain=table != "k400_finetuning_of_other_mvas")
    note = f"{assumed.clips_per_gpu} clips a GPU ({assumed.why}), fp16 autocast, unfused attention"
    unexplained = UNEXPLAINED.get((table, method, backbone or ""))
    return node_gb(step, assumed.clips_per_gpu), "; ".join(filter(None, [note, unexplained]))


def node_gb(step: ReleasedStep, clips_per_gpu: int) -> float:
    """Memory of a whole node in GB."""
    return NUM_GPUS * (clips_per_gpu * step.bytes_per_clip + step.fixed_bytes) / GIGA


def released_step(method: str, backbone: str, pretrain: bool) -> ReleasedStep:
    """The step of a row of the published tables."""
    if (method, pretrain) in _OTHERS:
        return _OTHERS[method, pretrain]
    system = SYSTEMS[method, backbone]
    subject = system.pretrain if pretrain else system.finetune
    assert isinstance(subject, OwnModel)
    return _pretraining_step(subject.config) if pretrain else _finetuning_step(subject.config)


def _pretraining_step(config: Experiment) -> ReleasedStep:
    """VideoMAE and EVEREST: one engine, whose loop holds the clip in four versions besides the targets.

    As loaded, un-normalised, cut into tubelets, and those normalised; targets, predictions in fp16 and
    float32. Then the inputs of the two norms outside of blocks, in float32, and of the maps after them.
    """
    counts, shape = config.token_counts, config.model.shape
    predicted = counts.num_predicted * _GEOMETRY.tubelet_values
    projected = counts.num_visible * shape.encoder.width + counts.num_predicted * shape.decoder.width
    return ReleasedStep(
        stacks=(Stack(shape.encoder, counts.num_visible), Stack(shape.decoder, counts.num_kept)),
        clip_bytes=4 * _CLIP_BYTES
        + _EMBEDDED_BYTES
        + predicted * (2 * FLOAT32_BYTES + FLOAT16_BYTES)
        + projected * (FLOAT32_BYTES + FLOAT16_BYTES),
        num_parameters=count_parameters(config),
    )


def _finetuning_step(config: Experiment) -> ReleasedStep:
    return ReleasedStep(
        stacks=(Stack(config.model.shape.encoder, config.token_counts.num_kept),),
        clip_bytes=_CLIP_BYTES + _EMBEDDED_BYTES,
        num_parameters=count_parameters(config),
    )


def _mme_step() -> ReleasedStep:
    """Mask ratio 0.7. Its histograms need a lot of memory, but before there are any activations."""
    counts = pretrain_counts(_GEOMETRY, "tube", 1.0, 0.7)
    targets = _NUM_TOKENS * (108 + 32) * FLOAT32_BYTES  # histogram and trajectory
    hidden = counts.num_predicted * 2 * 512 * 2 * FLOAT16_BYTES  # two heads, before and after GELU
    decoder = TransformerShape(width=192, depth=1, heads=6)
    return ReleasedStep(
        stacks=(Stack(_VIT_BASE, counts.num_visible), Stack(decoder, _NUM_TOKENS)),
        clip_bytes=_CLIP_BYTES + _EMBEDDED_BYTES + targets + hidden,
        num_parameters=87_089_356,
    )


def _mvd_step() -> ReleasedStep:
    """The student's activations are there while its ViT-B teachers run. Each has a clip of its own."""
    counts = pretrain_counts(_GEOMETRY, "tube", 1.0, 0.9)
    decoder = Stack(replace(_VIT_BASE, depth=2), _NUM_TOKENS)
    predicted = 2 * counts.num_predicted * _VIT_BASE.width * FLOAT16_BYTES
    return ReleasedStep(
        stacks=(Stack(_VIT_BASE, counts.num_visible), decoder, decoder),
        clip_bytes=2 * _CLIP_BYTES + _EMBEDDED_BYTES + predicted,
        num_parameters=116_942_592,
        frozen=(Stack(_VIT_BASE, _NUM_TOKENS),),
        num_frozen=85_647_360 + 86_227_200,
    )


_OTHERS = {("MME", True): _mme_step(), ("MVD", True): _mvd_step()}
