"""The config schema of a run: one section each for model, tokens, data, loss, optimizer, ..., run.

Every section is immutable and rejects unknown keys. Checks that span several sections live in `checks.py`;
all checks run before a GPU is used.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from everest_ds.config.backbones import BACKBONES, LAYER_NORM_EPS, Backbone
from everest_ds.config.checks import check_sections_agree
from everest_ds.config.mesh_shape import TensorDegree
from everest_ds.config.position_clip import PositionClip
from everest_ds.config.sections import (
    ConfigSection,
    Epsilon,
    LossConfig,
    NonNegative,
    OptimizerConfig,
    PositiveInt,
    Probability,
    Ratio,
    ScheduleConfig,
)
from everest_ds.config.selections import (
    SCORES,
    SELECTIONS,
    ScoreKind,
    ScoreName,
    SelectionName,
    SelectionRule,
    classify_counts,
    pretrain_counts,
)
from everest_ds.config.tokens import ClipGeometry, TokenCounts, exact_floor

Decoder = Literal["decord", "pyav", "torchcodec"]
DECODERS: tuple[str, ...] = get_args(Decoder)
_SHARING = [
    name if rule.shares == rule.tasks else f"{name} in {' and '.join(rule.shares)}"
    for name, rule in SELECTIONS.items()
    if rule.shares
]


class ModelConfig(ConfigSection):
    """The Vision Transformer and the shape of its input clip."""

    backbone: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"] = Field(
        "vit_base", description="widths, depths and heads of encoder and decoder"
    )
    num_frames: PositiveInt = Field(16, description="frames of the clip")
    tubelet_size: PositiveInt = Field(2, description="frames of a token")
    image_size: PositiveInt = Field(224, description="height and width of the clip, in pixels")
    patch_size: PositiveInt = Field(16, description="height and width of a token, in pixels")
    drop_path: Probability = Field(0.0, description="stochastic depth rate of the last encoder block")
    head_drop: Probability = Field(0.0, description="dropout rate before the head; fine-tuning only")
    num_classes: Annotated[int, Field(ge=2)] | None = Field(
        None, description="number of classes; fine-tuning only"
    )
    decoder_depth: PositiveInt | None = Field(
        None, description="blocks of the decoder (pre-training); default: as the backbone defines"
    )
    positions: Literal["flat", "grid"] = Field(
        "flat", description="sine table over token indices (VideoMAE), or over slot, row and column (MVD)"
    )
    positions_from: PositionClip | None = Field(
        None, description="interpolate the encoder's table from that of {num_frames: N, image_size: PIXELS}"
    )
    norm_eps: Epsilon = Field(LAYER_NORM_EPS, description="epsilon of all LayerNorms but the last")
    last_norm_eps: Epsilon = Field(
        LAYER_NORM_EPS, description="epsilon of the LayerNorm before the head; 1e-5 in transformers' VideoMAE"
    )
    attention: Literal["fused", "unfused"] = Field(
        "fused", description="unfused stores the attention matrices, as in the published memory figures"
    )
    compile: bool | None = Field(
        None, description="torch.compile for the blocks; default: on for GPUs, except at ZeRO stage 3"
    )
    init_from: Path | None = Field(
        None, description="initial encoder weights: a run, or a file in any layout (docs/library.md)"
    )

    @property
    def geometry(self) -> ClipGeometry:
        """The tubelet grid of the model's input clip."""
        return ClipGeometry(self.num_frames, self.tubelet_size, self.image_size, self.patch_size)

    @property
    def position_geometry(self) -> ClipGeometry:
        """The tubelet grid for which the encoder's position table is computed before it is interpolated."""
        return replace(self.geometry, **dict(self.positions_from or {}))

    @property
    def shape(self) -> Backbone:
        """The widths, depths and heads of encoder and decoder."""
        named = BACKBONES[self.backbone]
        if self.decoder_depth is None:
            return named
        return replace(named, decoder=replace(named.decoder, depth=self.decoder_depth))

    @model_validator(mode="after")
    def check_clip(self) -> ModelConfig:
        """Check that clips divide into tubelets."""
        self.geometry.check_sizes()
        self.position_geometry.check_sizes("positions_from.")
        return self


class TokensConfig(ConfigSection):
    """The token selection of a model; selections.py describes its rules and scores."""

    selection: SelectionName = Field("rero", description="rule that selects the tokens")
    keep_ratio: Ratio = Field(
        0.3, description=f"rho: share of all tokens that is kept ({', '.join(_SHARING)})"
    )
    mask_ratio: Probability = Field(0.9, description="share of all tokens hidden from the encoder")
    score: ScoreName = Field(
        "embedding",
        description="input of ReRo: embeddings (exact), a random projection of them, pixels, or the motion"
        " vectors of the video file and a thumbnail",
    )
    distance: Literal["l2", "l1", "cosine"] = Field(
        "l2", description="distance between neighbouring slots in ReRo"
    )
    frame_oversampling: Annotated[float, Field(ge=1.0, le=8.0)] = Field(
        1.0,
        description="alpha of IIFS: decode alpha times the slots, draw from them weighted by motion; 1: off",
    )

    @property
    def rule(self) -> SelectionRule:
        """The row of `selection` in the table of rules."""
        return SELECTIONS[self.selection]

    @property
    def score_kind(self) -> ScoreKind:
        """The row of `score` in the table of scores."""
        return SCORES[self.score]

    @property
    def reads_motion(self) -> bool:
        """True if the loader's workers select the tokens, by the motion vectors of the video files."""
        return self.rule.scores and self.score_kind.reads_motion

    @property
    def scores(self) -> bool:
        """True if a model scores tokens, for its rule or to draw frames (IIFS)."""
        return (self.rule.scores and not self.reads_motion) or self.frame_oversampling > 1


class DataConfig(ConfigSection):
    """The manifests (`path label` lines) or frame stores of a data set, and how clips are cut from them."""

    train: Path | None = Field(None, description="manifest or frame store of the training videos")
    val: Path | None = Field(None, description="manifest or frame store for validation; null: no validation")
    test: Path | None = Field(None, description="manifest or frame store for `everest-ds evaluate`")
    probe_train: Path | None = Field(
        None, description="labelled manifest or frame store that the probes of a frozen encoder learn from"
    )
    probe_test: Path | None = Field(
        None, description="as probe_train, for testing the probes; null: a fifth of data.probe_train"
    )
    root: Path | None = Field(
        None, description="base folder of relative paths in manifests; default: the manifest's folder"
    )
    stage: Path | None = Field(
        None,
        description="local folder of every node to copy frame stores and the token cache to before the run,"
        " e.g. $SLURM_TMPDIR",
    )
    class_names: Path | None = Field(
        None, description="text file of class names, one per line, in label order"
    )
    frame_stride: PositiveInt = Field(4, description="distance between the frames of a clip in its video")
    sampling: Literal["stride", "segments"] = Field(
        "stride", description="frames at a fixed stride, or one from each of num_frames equal segments"
    )
    short_videos: Literal["leave_out", "hold_last_frame"] = Field(
        "leave_out",
        description="videos shorter than a clip: skip and report them, or repeat their last frame",
    )
    train_crop: Literal["multi_scale", "random_resized", "center"] = Field(
        "multi_scale", description="how training cuts a clip out of its frames"
    )
    horizontal_flip: bool = Field(
        False, description="flip clips at random in training; unsuitable if labels name left or right"
    )
    test_segments: PositiveInt = Field(5, description="clips of a test video, at different times")
    test_crops: PositiveInt = Field(3, description="crops of a test clip, at different positions")
    num_workers: Annotated[int, Field(ge=0)] = Field(4, description="decoding processes per rank")
    repeats: PositiveInt = Field(
        1, description="random crops per decoded clip in training; an epoch decodes each video once"
    )
    draws: PositiveInt | None = Field(
        None,
        description="random draws (frames, crops, flips) per sample, through which epochs cycle; null: a new"
        " draw in every epoch",
    )
    pack_tokens: bool = Field(
        False, description="workers select tokens and send only these; needs tokens.score=pixel or codec"
    )
    token_cache: Path | None = Field(
        None,
        description="folder with the kept tokens of data.draws draws, which training reads instead of"
        " videos; `everest-ds data cache` fills it",
    )
    read_timeout_s: PositiveInt = Field(
        60, description="a video that takes longer to read counts as unreadable"
    )
    max_broken_pct: Annotated[float, Field(ge=0, le=100)] = Field(
        1.0, description="share of an epoch's videos that may be unreadable before the run stops"
    )
    decoder: Decoder = Field(
        "pyav", description="PyAV replaces the others for files whose frames they cannot locate exactly"
    )
    decode_short_side: PositiveInt | None = Field(
        None, description="short side, in pixels, to which PyAV shrinks larger frames while decoding"
    )

    @property
    def sends_tokens(self) -> bool:
        """True if workers send kept tokens, selected by them or read from a token cache."""
        return self.pack_tokens or self.token_cache is not None


class AugmentConfig(ConfigSection):
    """The fine-tuning augmentations besides crops and flips, computed on the device; 0 disables each."""

    rand_augment_ops: Annotated[int, Field(ge=0)] = Field(
        0, description="operations drawn per clip; each is applied with probability 0.5"
    )
    rand_augment_magnitude: Annotated[float, Field(ge=0, le=10)] = Field(7.0, description="their strength")
    erase_probability: Probability = Field(0.0, description="probability that a clip gets a box of noise")
    mixup_alpha: NonNegative = Field(
        0.0, description="mix pairs of clips; the share is drawn from Beta(alpha, alpha)"
    )
    cutmix_alpha: NonNegative = Field(
        0.0, description="paste a box of a paired clip; area from Beta(alpha, alpha)"
    )

    @property
    def changes(self) -> bool:
        """True if any augmentation is on."""
        return self != AugmentConfig()

    @property
    def mixes(self) -> bool:
        """True if clips are mixed, so that a target holds a share of each class."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


class BatchConfig(ConfigSection):
    """The clips of an optimiser step. A given `global_batch_size` holds for any number of ranks."""

    micro_batch_size: PositiveInt = Field(8, description="clips per rank in one forward pass")
    global_batch_size: PositiveInt | None = Field(None, description="clips per optimiser step, all ranks")
    grad_accum_steps: PositiveInt | None = Field(None, description="default: derived from global_batch_size")


class ParallelismConfig(ConfigSection):
    """The distribution of the model and its training states over the ranks."""

    tensor: TensorDegree = Field(
        1, description="adjacent ranks of a node that split every layer; the rest is data parallelism"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="selects ds_configs/zeroN.json (N: the stage)")
    offload_to_cpu: bool = Field(
        False, description="optimiser (and stage-3 weights) in host memory: zeroN_offload.json"
    )
    offload_to_nvme: Path | None = Field(
        None, description="stage 3: folder on a local disk for optimiser states; weights in host memory"
    )
    ds_config: Path | None = Field(
        None, description="your own DeepSpeed JSON file; docs/parallel.md says what is used of it"
    )

    @model_validator(mode="after")
    def check_offload(self) -> ParallelismConfig:
        """Check that the stage supports the requested offload and that no second setting contradicts it."""
        if self.offload_to_cpu and self.zero_stage < 2:
            raise ValueError(f"offload_to_cpu needs zero_stage 2 or 3, not {self.zero_stage}")
        if self.offload_to_nvme is not None and self.zero_stage < 3:
            raise ValueError(f"offload_to_nvme needs zero_stage 3, not {self.zero_stage}")
        if self.offload_to_cpu and self.offload_to_nvme is not None:
            raise ValueError(
                "offload_to_cpu and offload_to_nvme are both set; offload_to_nvme already keeps the weights"
                " in host memory"
            )
        for key in ("offload_to_cpu", "offload_to_nvme"):
            if getattr(self, key) and self.ds_config is not None:
                raise ValueError(
                    f"{key} selects a shipped DeepSpeed file, but ds_config is set; offload in that file"
                )
        return self


class RecomputeConfig(ConfigSection):
    """Activation checkpointing, which saves memory at the price of a second forward pass."""

    mode: Literal["none", "gelu", "attention", "mlp", "blocks", "full"] = Field(
        "none", description="recomputed modules: a part of each block, every n-th block, or every block"
    )
    every: Annotated[int, Field(ge=2)] = Field(
        2, description="n of mode `blocks`: recompute every n-th block"
    )
    offload_to_cpu: bool = Field(False, description="store the inputs of recomputed modules in host memory")
    partition: bool = Field(
        False, description="mode `full`: split the stored activations over the tensor-parallel ranks"
    )


class RunConfig(ConfigSection):
    """The run folder, the seed, and how often a run logs, saves, validates and probes.

    When a run is resumed, these settings may change, except `seed`, `max_skipped_steps` and
    `validate_every_epochs`.
    """

    dir: Path = Field(Path("runs/default"), description="the run folder")
    seed: int = Field(0, description="seed of the initial weights, the order of samples and all draws")
    log_every_steps: PositiveInt = Field(10, description="interval of reports")
    save_every_steps: PositiveInt = Field(500, description="interval of checkpoints")
    save_in_background: bool | None = Field(
        None, description="write checkpoints from a host copy while training continues; default: on for GPUs"
    )
    keep_checkpoints: PositiveInt = Field(2, description="number of newest checkpoints to keep")
    keep_every_steps: PositiveInt | None = Field(
        None, description="also keep every checkpoint at a multiple of this step"
    )
    hang_timeout_s: PositiveInt = Field(
        600, description="time without progress after which a rank counts as lost and the run ends"
    )
    max_skipped_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="consecutive steps that may be skipped for a non-finite loss or gradient"
    )
    image_every_steps: PositiveInt = Field(500, description="interval of clip images in TensorBoard")
    validate_every_epochs: PositiveInt = Field(1, description="interval of validations; fine-tuning only")
    probe_every_steps: PositiveInt | None = Field(
        None, description="interval of probes of the encoder; pre-training only, needs data.probe_train"
    )
    max_steps: PositiveInt | None = Field(
        None,
        description="save and end after this step of the schedule, as for a smoke test; default: its end",
    )


class Experiment(ConfigSection):
    """The complete config of a run, as `config.yaml` in a run folder stores it."""

    task: Literal["pretrain", "finetune"] = Field(description="what the run trains; recipes set it")
    model: ModelConfig = ModelConfig()
    tokens: TokensConfig = TokensConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    batch: BatchConfig = BatchConfig()
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = Field(
        "bf16", description="tf32: float32 weights and activations, matrix products in TF32 on tensor cores"
    )
    parallelism: ParallelismConfig = ParallelismConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    run: RunConfig = RunConfig()

    @property
    def in_half_precision(self) -> bool:
        """True if weights and activations have 16 bits; the optimiser then updates float32 masters."""
        return self.precision in ("bf16", "fp16")

    @property
    def token_counts(self) -> TokenCounts:
        """The numbers of kept (K) and visible (V) tokens for this task."""
        t = self.tokens
        if self.task == "pretrain":
            return pretrain_counts(self.model.geometry, t.selection, t.keep_ratio, t.mask_ratio)
        return classify_counts(self.model.geometry, t.selection, t.keep_ratio)

    @property
    def candidate_geometry(self) -> ClipGeometry:
        """The geometry of the decoded clip: the model's own, or one with more slots for IIFS to draw from."""
        own = self.model.geometry
        num_slots = exact_floor(self.tokens.frame_oversampling, own.num_slots)
        return replace(own, num_frames=num_slots * own.tubelet_size)

    @model_validator(mode="after")
    def check_agreement(self) -> Experiment:
        """Check the rules that span several sections."""
        check_sections_agree(self)
        return self
