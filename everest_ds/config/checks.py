"""Validation rules that span several sections of a config."""

from __future__ import annotations

from typing import TYPE_CHECKING

from everest_ds.config.mesh_shape import check_degrees
from everest_ds.config.selections import CODEC_SAMPLES, SCORES, SELECTIONS

if TYPE_CHECKING:
    from everest_ds.config.schema import Experiment


def check_sections_agree(config: Experiment) -> None:
    """Run every check that spans two or more sections.

    Raises:
        ValueError: if two settings contradict each other; the message names the keys, their values and a fix.
    """
    _check_task(config)
    _check_tokens(config)
    _check_schedule(config)
    _check_probes(config)
    _check_micro_batch(config)
    _check_motion(config)
    _check_packing(config)
    _check_zero_stage(config)
    check_degrees(config)
    _check_recompute(config)


def _check_task(config: Experiment) -> None:
    allowed = [name for name, rule in SELECTIONS.items() if config.task in rule.tasks]
    if config.tokens.selection not in allowed:
        raise ValueError(
            f"tokens.selection={config.tokens.selection} is not available for task {config.task};"
            f" allowed: {', '.join(allowed)}"
        )
    if config.task == "finetune" and config.model.num_classes is None:
        raise ValueError("model.num_classes is missing: fine-tuning needs the number of classes")


def _check_scores(config: Experiment) -> None:
    tokens, num_slots = config.tokens, config.model.geometry.num_slots
    preserved = tokens.score_kind.distances
    if tokens.distance not in preserved:
        raise ValueError(
            f"tokens: score={tokens.score} does not preserve distance={tokens.distance}; use"
            f" distance={', '.join(preserved)} or score=embedding"
        )
    if tokens.rule.scores and num_slots < 2:
        raise ValueError(
            f"tokens.selection={tokens.selection} compares neighbouring slots, but the clip has only one"
        )
    if tokens.frame_oversampling > 1 and config.candidate_geometry.num_slots == num_slots:
        raise ValueError(
            f"tokens.frame_oversampling={tokens.frame_oversampling:g} adds no slot to {num_slots};"
            f" use 1 (no IIFS) or at least {1 + 1 / num_slots:.3g}"
        )


def _check_tokens(config: Experiment) -> None:
    _check_scores(config)
    counts, num_slots = config.token_counts, config.model.geometry.num_slots
    rule = config.tokens.rule
    if num_slots % rule.slot_multiple:
        raise ValueError(
            f"tokens.selection={config.tokens.selection} needs a multiple of {rule.slot_multiple} slots, so"
            f" that {rule.slot_reason}; model.num_frames={config.model.num_frames} at"
            f" tubelet_size={config.model.tubelet_size} gives {num_slots}"
        )
    whole = rule.whole_slots * config.model.geometry.tokens_per_slot
    if counts.num_kept < whole:
        raise ValueError(
            f"tokens.selection={config.tokens.selection} keeps all {whole} tokens of {rule.whole_slots} slot,"
            f" but keep_ratio={config.tokens.keep_ratio:g} leaves {counts.num_kept} of the clip; use at"
            f" least {rule.whole_slots / num_slots:.3g}"
        )
    where = f"keep_ratio={config.tokens.keep_ratio:g}, mask_ratio={config.tokens.mask_ratio:g}"
    if counts.num_kept < 1 or counts.num_visible < 1:
        raise ValueError(
            f"tokens: {where} leaves {counts.num_kept} kept and {counts.num_visible} visible of"
            f" {counts.num_tokens} tokens; raise keep_ratio or lower mask_ratio"
        )
    if config.task == "pretrain" and counts.num_predicted < 1:
        raise ValueError(
            f"tokens: {where} leaves nothing to predict ({counts.num_kept} kept, all visible);"
            " keep_ratio must exceed 1 - mask_ratio"
        )


def _check_micro_batch(config: Experiment) -> None:
    micro, repeats, augment = config.batch.micro_batch_size, config.data.repeats, config.augment
    if micro % repeats:
        raise ValueError(
            f"batch.micro_batch_size={micro} clips is not a multiple of data.repeats={repeats},"
            " the number of clips cut from each video"
        )
    if augment.mixes and micro % (2 * repeats):
        raise ValueError(
            f"augment.mixup_alpha and cutmix_alpha mix pairs of clips: batch.micro_batch_size={micro} is not"
            f" a multiple of {2 * repeats} (2 x data.repeats)"
        )
    if config.task == "pretrain" and augment.changes:
        raise ValueError(
            "augment is set for task pretrain, which would reconstruct the augmented pixels;"
            " use it with task finetune only"
        )


def can_pack_tokens(config: Experiment) -> bool:
    """Return whether a run may set `data.pack_tokens`."""
    return _selects_without_weights(config) and not config.augment.changes


def _selects_without_weights(config: Experiment) -> bool:
    """Return whether tokens are selected by the clip alone, which needs no weights of the model."""
    tokens = config.tokens
    return tokens.rule.packs and not tokens.score_kind.num_maps and tokens.frame_oversampling == 1


def _check_motion(config: Experiment) -> None:
    tokens, model = config.tokens, config.model
    if tokens.score_kind.reads_motion and tokens.frame_oversampling > 1:
        raise ValueError(
            f"tokens.score={tokens.score} needs frame_oversampling=1, because the loader's workers select the"
            f" tokens before frames are drawn; given: {tokens.frame_oversampling:g}; use tokens.score=pixel"
        )
    if tokens.reads_motion and model.patch_size % CODEC_SAMPLES:
        raise ValueError(
            f"tokens.score={tokens.score} takes {CODEC_SAMPLES} samples along each side of a patch;"
            f" model.patch_size={model.patch_size} is not a multiple of {CODEC_SAMPLES}"
        )


def _check_packing(config: Experiment) -> None:
    data = config.data
    key = "data.pack_tokens" if data.token_cache is None else "data.token_cache"
    if data.sends_tokens and not _selects_without_weights(config):
        packing = " or ".join(name for name, rule in SELECTIONS.items() if rule.packs)
        scores = " or ".join(name for name, kind in SCORES.items() if not kind.num_maps)
        raise ValueError(
            f"{key} lets data-loading workers select tokens, but they have no model weights to"
            f" score tokens with; use tokens.selection={packing}, score={scores} and frame_oversampling=1"
        )
    selecting = key if data.sends_tokens else f"tokens.score={config.tokens.score}"
    if (data.sends_tokens or config.tokens.reads_motion) and config.augment.changes:
        raise ValueError(
            f"{selecting} selects tokens before augment changes the clips; turn one of the two off"
        )
    if data.token_cache is not None and data.draws is None:
        raise ValueError(
            "data.token_cache holds a few draws of each sample, but data.draws is not set: set it to their"
            " number, for example data.draws=4"
        )


def _check_schedule(config: Experiment) -> None:
    if config.schedule.warmup_epochs >= config.schedule.epochs:
        raise ValueError(
            f"schedule.warmup_epochs ({config.schedule.warmup_epochs:g}) must be smaller than schedule.epochs"
            f" ({config.schedule.epochs}); fix: lower schedule.warmup_epochs too, or set run.max_steps to try"
            " out the first steps of the whole schedule"
        )


def _check_probes(config: Experiment) -> None:
    every_steps = config.run.probe_every_steps
    if every_steps is None:
        return
    if config.task == "finetune":
        raise ValueError(
            f"run.probe_every_steps={every_steps} probes an encoder during pre-training, but the task is"
            " finetune; leave it out, and set data.val to validate the classifier"
        )
    if config.data.probe_train is None:
        raise ValueError(
            f"run.probe_every_steps={every_steps} is set, but data.probe_train is not: name a manifest or"
            " frame store of labelled videos"
        )


def _check_recompute(config: Experiment) -> None:
    recompute = config.recompute
    if recompute.offload_to_cpu and recompute.mode in ("none", "gelu"):
        raise ValueError(
            f"recompute.offload_to_cpu moves the inputs of recomputed modules, but mode {recompute.mode}"
            " recomputes no module: set recompute.mode to attention, mlp, blocks or full"
        )
    if recompute.partition and (recompute.mode != "full" or config.parallelism.tensor == 1):
        raise ValueError(
            f"recompute.partition has no effect at recompute.mode={recompute.mode} and"
            f" parallelism.tensor={config.parallelism.tensor}; set mode=full and tensor above 1"
        )


def _check_zero_stage(config: Experiment) -> None:
    """Check that DeepSpeed supports the other settings at the ZeRO stage."""
    stage = config.parallelism.zero_stage
    if config.precision == "bf16" and stage == 0:
        raise ValueError(
            "precision=bf16 needs parallelism.zero_stage 1, 2 or 3: DeepSpeed 0.19 takes a hidden first step"
            " in bf16 at stage 0; use zero_stage=1 or precision=fp32"
        )
    if config.precision == "fp16" and stage == 0:
        raise ValueError(
            "precision=fp16 needs parallelism.zero_stage 1, 2 or 3: at stage 0, DeepSpeed 0.19 keeps the"
            " float32 weights in flat tensors without the parameter names that a checkpoint needs; use"
            " zero_stage=1, which also needs less memory"
        )
    if config.run.max_skipped_steps and stage == 0:
        raise ValueError(
            "run.max_skipped_steps is set at parallelism.zero_stage=0, but DeepSpeed 0.19 never skips a step"
            " at stage 0; use zero_stage 1, 2 or 3, or max_skipped_steps=0"
        )
    if config.model.compile and stage == 3:
        raise ValueError(
            "model.compile=true does not work with parallelism.zero_stage=3: its hooks gather weights inside"
            " a block, so each block would be a separate graph; use zero_stage 0 to 2 or model.compile=false"
        )
