"""The one config tree of a run: model, tokens, data, loss, optimizer, schedule, batch, ... run.

Every section is frozen and refuses unknown keys. Checks that need two sections live in `agreement.py`; all of
them run before a GPU is touched.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from everest_ds.config.agreement import check_sections_agree
from everest_ds.config.backbones import BACKBONES, LAYER_NORM_EPS, Backbone
from everest_ds.config.tokens import (
    ClipGeometry,
    TokenCounts,
    classify_counts,
    exact_floor,
    pretrain_counts,
)

Ratio = Annotated[float, Field(gt=0.0, le=1.0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
Decoder = Literal["decord", "pyav", "torchcodec"]
DECODERS: tuple[str, ...] = get_args(Decoder)
NonNegative = Annotated[float, Field(ge=0.0)]
Epsilon = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    """A part of the tree: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Section):
    """The Vision Transformer and the clip it sees."""

    backbone: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"] = "vit_base"
    num_frames: PositiveInt = 16
    tubelet_size: PositiveInt = 2
    image_size: PositiveInt = 224
    patch_size: PositiveInt = 16
    drop_path: Probability = Field(0.0, description="stochastic depth of the last encoder block")
    head_drop: Probability = Field(0.0, description="dropout before the head; fine-tuning only")
    num_classes: Annotated[int, Field(ge=2)] | None = Field(None, description="fine-tuning only")
    decoder_depth: PositiveInt | None = Field(
        None, description="blocks of the decoder (pre-training); default: the backbone's"
    )
    positions: Literal["flat", "grid"] = Field(
        "flat", description="fixed table over token numbers (VideoMAE), or over slot, row and column (MVD)"
    )
    norm_eps: Epsilon = Field(LAYER_NORM_EPS, description="of all LayerNorms but the last")
    last_norm_eps: Epsilon = Field(
        LAYER_NORM_EPS, description="of the LayerNorm before the head; 1e-5 in transformers' VideoMAE"
    )
    attention: Literal["fused", "unfused"] = Field(
        "fused", description="unfused holds the attention matrices, as the published memory figures did"
    )
    compile: bool | None = Field(
        None, description="torch.compile for the blocks; default: on GPUs, unless at ZeRO stage 3"
    )
    init_from: Path | None = Field(
        None, description="whose encoder to start from: a run, or weights in any layout (docs/library.md)"
    )

    @property
    def geometry(self) -> ClipGeometry:
        """The tubelet grid of a clip."""
        return ClipGeometry(self.num_frames, self.tubelet_size, self.image_size, self.patch_size)

    @property
    def shape(self) -> Backbone:
        """Widths, depths and heads."""
        named = BACKBONES[self.backbone]
        if self.decoder_depth is None:
            return named
        return replace(named, decoder=replace(named.decoder, depth=self.decoder_depth))

    @model_validator(mode="after")
    def check_divides(self) -> ModelConfig:
        """Frames divide into tubelets and frames' sides into patches."""
        if self.num_frames % self.tubelet_size:
            raise ValueError(
                f"num_frames={self.num_frames} is not a multiple of tubelet_size={self.tubelet_size}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}"
            )
        return self


class TokensConfig(Section):
    """Which tokens are computed on.

    Selections: `rero` is EVEREST. `random` keeps as many tokens by chance: the control. `none` keeps all.
    `tube` is VideoMAE's mask and `dual` VideoMAE v2's, both for pre-training.
    """

    selection: Literal["rero", "random", "tube", "dual", "none"] = "rero"
    keep_ratio: Ratio = Field(0.3, description="rho: kept share of all tokens (rero, random)")
    mask_ratio: Probability = Field(0.9, description="share of all tokens hidden from the encoder")
    score: Literal["embedding", "sketch", "pixel"] = Field(
        "embedding", description="what ReRo compares: embeddings (exact), a random projection of them, pixels"
    )
    distance: Literal["l2", "l1", "cosine"] = Field("l2", description="ReRo's distance over time")
    frame_oversampling: Annotated[float, Field(ge=1.0, le=8.0)] = Field(
        1.0, description="alpha of IIFS: decode alpha times the slots, draw the busiest; 1 turns it off"
    )


class DataConfig(Section):
    """Manifests of `path label` lines and how clips are cut from the videos."""

    train: Path | None = None
    val: Path | None = None
    test: Path | None = None
    root: Path | None = Field(
        None, description="folder of the manifests' relative paths; default: the manifest's own"
    )
    class_names: Path | None = Field(None, description="one class name a line, in label order")
    frame_stride: PositiveInt = 4
    sampling: Literal["stride", "segments"] = Field(
        "stride", description="frames at a fixed stride, or one from each of num_frames equal segments"
    )
    short_videos: Literal["leave_out", "hold_last_frame"] = Field(
        "leave_out", description="videos shorter than a clip: left out by name, or their last frame repeated"
    )
    train_crop: Literal["multi_scale", "random_resized", "center"] = "multi_scale"
    horizontal_flip: bool = Field(False, description="random in training; wrong where left is not right")
    test_segments: PositiveInt = 5
    test_crops: PositiveInt = 3
    num_workers: Annotated[int, Field(ge=0)] = Field(4, description="decoding processes per rank")
    repeats: PositiveInt = Field(
        1, description="random crops of each decoded clip in training; an epoch decodes each video once"
    )
    pack_tokens: bool = Field(
        False, description="workers select the tokens and send no others; needs tokens.score=pixel"
    )
    read_timeout_s: PositiveInt = Field(60, description="a video that takes longer to read counts as broken")
    max_broken_pct: Annotated[float, Field(ge=0, le=100)] = Field(
        1.0, description="share of an epoch's videos that may be unreadable before the run stops"
    )
    decoder: Decoder = Field(
        "decord", description="PyAV stands in for files of which the others do not give exact frames"
    )
    decode_short_side: PositiveInt | None = Field(
        None, description="shrink larger pictures to this short side as PyAV decodes them, pixels"
    )


class AugmentConfig(Section):
    """Fine-tuning's augmentation beyond crops and flips, on the device. 0 turns each off."""

    rand_augment_ops: Annotated[int, Field(ge=0)] = Field(0, description="of a clip; half of them apply")
    rand_augment_magnitude: Annotated[float, Field(ge=0, le=10)] = 7.0
    erase_probability: Probability = Field(0.0, description="of noise in a random box of a clip")
    mixup_alpha: NonNegative = Field(
        0.0, description="neighbours mixed, the share drawn from Beta(alpha, alpha)"
    )
    cutmix_alpha: NonNegative = Field(0.0, description="a box from the neighbour, its area drawn as mixup's")

    @property
    def changes(self) -> bool:
        """Whether anything is on."""
        return self != AugmentConfig()

    @property
    def mixes(self) -> bool:
        """Whether labels become shares of classes."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


class LossConfig(Section):
    """What is minimised."""

    normalize_targets: bool = Field(True, description="per-tubelet normalised pixels (pre-training)")
    label_smoothing: Probability = Field(0.0, description="fine-tuning")


class OptimizerConfig(Section):
    """AdamW. Biases, norms and the mask token are not decayed."""

    betas: tuple[Probability, Probability] = (0.9, 0.95)
    eps: Epsilon = 1e-8
    weight_decay: NonNegative = 0.05
    layer_decay: Ratio = Field(1.0, description="lr factor from each encoder block to the one below")
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = None


class ScheduleConfig(Section):
    """Cosine decay after a linear warm-up. All three rates scale with global_batch_size / 256."""

    epochs: PositiveInt = 800
    warmup_epochs: NonNegative = 40
    base_lr: Annotated[float, Field(gt=0)] = 1.5e-4
    warmup_lr: NonNegative = 1e-6
    min_lr: NonNegative = 1e-5


class BatchConfig(Section):
    """Clips per step. Give global_batch_size to keep it whatever the number of ranks."""

    micro_batch_size: PositiveInt = Field(8, description="clips a rank holds at once")
    global_batch_size: PositiveInt | None = Field(None, description="clips of an optimiser step, all ranks")
    grad_accum_steps: PositiveInt | None = Field(None, description="default: what global_batch_size needs")


class ParallelismConfig(Section):
    """How the model and its states are spread over the ranks."""

    tensor: Literal[1, 2, 4, 8] = Field(
        1, description="neighbouring ranks of a node that share every layer; the rest is data parallelism"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="picks ds_configs/zero<stage>.json")
    offload_to_cpu: bool = Field(
        False, description="optimiser, and at stage 3 weights, in host memory: zero<stage>_offload.json"
    )
    offload_to_nvme: Path | None = Field(
        None, description="a folder on a local disk: stage 3's optimiser states there, weights in host memory"
    )
    ds_config: Path | None = Field(None, description="your own DeepSpeed JSON, of the same stage")

    @model_validator(mode="after")
    def check_offload(self) -> ParallelismConfig:
        """There is a shipped DeepSpeed file that offloads, and no other that says whether to."""
        if self.offload_to_cpu and self.zero_stage < 2:
            raise ValueError(f"offload_to_cpu needs zero_stage 2 or 3, not {self.zero_stage}")
        if self.offload_to_nvme is not None and self.zero_stage < 3:
            raise ValueError(f"offload_to_nvme needs zero_stage 3, not {self.zero_stage}")
        if self.offload_to_cpu and self.offload_to_nvme is not None:
            raise ValueError("offload_to_nvme holds the weights in host memory; leave out offload_to_cpu")
        for key in ("offload_to_cpu", "offload_to_nvme"):
            if getattr(self, key) and self.ds_config is not None:
                raise ValueError(f"{key} picks a shipped DeepSpeed file; say it in ds_config instead")
        return self


class RecomputeConfig(Section):
    """Activation checkpointing: trade a second forward pass for memory."""

    mode: Literal["none", "gelu", "attention", "mlp", "blocks", "full"] = Field(
        "none", description="what is computed again: a part of each block, every n-th block, or every block"
    )
    every: Annotated[int, Field(ge=2)] = Field(2, description="n of mode `blocks`")
    offload_to_cpu: bool = Field(False, description="keep what recomputation starts from in host memory")
    partition: bool = Field(
        False, description="mode `full`: of what all tensor-parallel ranks would keep, each keeps its part"
    )


class RunConfig(Section):
    """Where a run lives and how often it speaks and saves. May change when a run is resumed."""

    dir: Path = Path("runs/default")
    seed: int = 0
    log_every_steps: PositiveInt = 10
    save_every_steps: PositiveInt = 500
    save_in_background: bool | None = Field(
        None, description="write from a copy in host memory while steps go on; default: from GPUs"
    )
    keep_checkpoints: PositiveInt = Field(2, description="the newest ones")
    keep_every_steps: PositiveInt | None = Field(None, description="and those at multiples of this, for ever")
    hang_timeout_s: PositiveInt = Field(600, description="a rank silent for this long is lost; ends the run")
    max_skipped_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="steps in a row that may be left out for a loss or gradient that is not finite"
    )
    image_every_steps: PositiveInt = Field(500, description="pictures of a clip to TensorBoard")
    validate_every_epochs: PositiveInt = 1


class Experiment(Section):
    """A whole run: what `config.yaml` in a run folder holds."""

    task: Literal["pretrain", "finetune"]
    model: ModelConfig = ModelConfig()
    tokens: TokensConfig = TokensConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    batch: BatchConfig = BatchConfig()
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = Field(
        "bf16", description="tf32: float32 weights and activations, their products in TF32 on tensor cores"
    )
    parallelism: ParallelismConfig = ParallelismConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    run: RunConfig = RunConfig()

    @property
    def in_half_precision(self) -> bool:
        """Weights and activations have 16 bits, and the optimiser steps float32 masters."""
        return self.precision in ("bf16", "fp16")

    @property
    def token_counts(self) -> TokenCounts:
        """K and V of this task."""
        t = self.tokens
        if self.task == "pretrain":
            return pretrain_counts(self.model.geometry, t.selection, t.keep_ratio, t.mask_ratio)
        return classify_counts(self.model.geometry, t.selection, t.keep_ratio)

    @property
    def candidate_geometry(self) -> ClipGeometry:
        """The clip as it is decoded: the model's own, or with more slots for IIFS to draw from."""
        own = self.model.geometry
        num_slots = exact_floor(self.tokens.frame_oversampling, own.num_slots)
        return replace(own, num_frames=num_slots * own.tubelet_size)

    @model_validator(mode="after")
    def check_agreement(self) -> Experiment:
        """What one section says must be possible under the others."""
        check_sections_agree(self)
        return self
