"""The protocol of the study: the runs of each scale, as configs of the real trainer.

A *chain* is one pre-training and the fine-tunings that start from it. A seed fixes everything random in a
chain; all chains on a kind of data see the same videos.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from everest_ds.config import Experiment
from everest_ds.config.sections import REFERENCE_BATCH
from everest_ds.costs.compute import predict_macs
from everest_ds.data.synthetic import MOTIONS, SyntheticSpec
from study.arms import CHEAPEST, DENSE, EVEREST, KINDS, PAUSES, PRETRAINED, TUNED, Arm, Tokens

BUDGETS = STEPS, COMPUTE = ("steps", "compute")  # the quantity that is equal for all arms of a comparison
KEEP_RATIO = 0.25  # in fine-tuning: whole slots and whole tubes, so that all arms keep equally many tokens
PRETRAIN, TUNE = ("pretrain", "finetune")
STORE = ".store"  # ending of the name of a folder of frames that stands for the manifest beside it

# These values were chosen on seeds of runs and videos that no study reports.
_PRETRAIN_LR, _FINETUNE_LR = 2e-3, 1.5e-3
_PRETRAIN_KEEP_RATIO, _MASK_RATIO = 0.3, 0.875
_SAME_COMPUTE = 0.005  # compute that differs by less counts as equal
# Videos are rendered larger than clips, so that macroblocks of 16 pixels are smaller than patches.
_ENLARGEMENT = 3


@dataclass(frozen=True)
class Scale:
    """The size of a study.

    Attributes:
        model: the `model` section of all configs.
        videos: number of videos of each kind of data, by split.
        seeds: seeds of the chains.
        pretrain_steps: steps of every pre-training at equal steps, and of EVEREST's at equal compute.
        finetune_steps: steps of every fine-tuning at equal steps, and of the cheapest arm at equal compute.
        clips: clips per step.
        precision: precision of all runs; float32 is the faster one for small models on a CPU.
    """

    model: dict[str, Any]
    videos: dict[str, int]
    seeds: tuple[int, ...]
    pretrain_steps: int
    finetune_steps: int
    clips: int
    precision: str


_TINY = {"backbone": "vit_tiny", "num_frames": 16, "image_size": 32, "patch_size": 8}
_SMALL = {"backbone": "vit_small", "num_frames": 16, "image_size": 64, "patch_size": 8}
SCALES = {
    "smoke": Scale(_TINY, {"train": 24, "test": 24}, (0,), 2, 3, 8, "fp32"),
    "small": Scale(_TINY, {"train": 1500, "test": 900}, (1, 2, 3), 500, 180, 32, "fp32"),
    "large": Scale(_SMALL, {"train": 9000, "test": 3000}, (1, 2, 3, 4, 5), 9000, 3000, 128, "bf16"),
}


class Run(NamedTuple):
    """One run of the trainer.

    Attributes:
        name: place of the run in its chain.
        kind: kind of data.
        seed: seed of the chain.
        arm: the arm that the run belongs to.
        budgets: the comparisons that the run belongs to; empty if its weights only start others.
        num_steps: optimiser steps.
        config: config for the trainer: one epoch over a manifest with a line per clip, so that any number of
            steps is possible.
        ranking: as in `Arm`.
        probed: dense fine-tuning from a pre-training that a linear probe judges; None: no probe.
    """

    name: str
    kind: str
    seed: int
    arm: str
    budgets: tuple[str, ...]
    num_steps: int
    config: Experiment
    ranking: str | None = None
    probed: Experiment | None = None

    @property
    def training_macs(self) -> int:
        """Return the predicted multiply-accumulates of the whole run, forward and backward."""
        return predict_macs(self.config).training_macs * self.num_clips

    @property
    def num_clips(self) -> int:
        """Return the number of clips of all steps."""
        return self.num_steps * self.config.batch.micro_batch_size


@dataclass(frozen=True)
class Study:
    """All runs of a scale, in a folder.

    Attributes:
        scale: size of the study.
        out: folder of the study.
        data_seed: seed of the videos.
        kinds: kinds of data that the runs read.
    """

    scale: Scale
    out: Path
    data_seed: int = 1
    kinds: tuple[str, ...] = KINDS

    def data(self, kind: str) -> Path:
        """Return the folder of a kind's videos and manifests."""
        return self.out / "data" / kind

    def has_data(self, kind: str) -> bool:
        """Return whether all videos of a kind have been written."""
        return (self.data(kind) / "test.txt").is_file()  # written last

    def spec(self, kind: str, enlargement: int = _ENLARGEMENT) -> SyntheticSpec:
        """Return the spec of a kind's videos: clips plus two frames, or three clips long with pauses."""
        frames, size = self.scale.model["num_frames"], enlargement * self.scale.model["image_size"]
        length = 3 * frames if kind == PAUSES else frames + 2
        return SyntheticSpec(length, size, self.data_seed, kind, pace=2.0)

    @property
    def num_videos(self) -> int:
        """Return the number of videos of all kinds and splits."""
        return len(self.kinds) * sum(self.scale.videos.values())

    @property
    def num_runs(self) -> int:
        """Return the number of runs of all chains."""
        return sum(len(chain) for chain in self.chains())

    def chains(self) -> Iterator[list[Run]]:
        """Yield EVEREST's chains, by far the longest, then the pre-trainings that rival its own."""
        places = [(kind, seed) for kind in self.kinds for seed in self.scale.seeds]
        for kind, seed in places:
            yield list(Chain(self, kind, seed).pretrained_and_tuned())
        for kind, seed in places:
            yield from Chain(self, kind, seed).other_pretrainings()


@dataclass(frozen=True)
class Chain:
    """A pre-training and the fine-tunings that start from it.

    Attributes:
        study: the study, which has the sizes.
        kind, seed: kind of data, and seed of the runs.
        name: name of the pre-training: EVEREST, or that of another chain.
    """

    study: Study
    kind: str
    seed: int
    name: str = EVEREST

    @property
    def folder(self) -> Path:
        """Return the folder of the chain's runs."""
        return self.study.out / "runs" / f"{self.kind}-{self.seed}" / self.name

    def pretrained_and_tuned(self) -> Iterator[Run]:
        """Yield EVEREST's pre-training and the fine-tunings of its weights in all arms."""
        compared = BUDGETS if self.kind in PRETRAINED[EVEREST].kinds else ()
        yield self._pretraining(EVEREST, compared, self.study.scale.pretrain_steps)
        for name, arm in TUNED.items():
            if self.kind in arm.kinds:
                for budgets, steps in self._steps(TUNE, arm, TUNED[CHEAPEST]):
                    run = self.run(f"{name}-{steps}", TUNE, steps, finetune_tokens(arm))
                    yield run._replace(arm=name, budgets=budgets, ranking=arm.ranking)

    def other_pretrainings(self) -> Iterator[list[Run]]:
        """Yield a chain for each pre-training that is compared with EVEREST's."""
        for name, arm in PRETRAINED.items():
            if name != EVEREST and self.kind in arm.kinds:
                for budgets, steps in self._steps(PRETRAIN, arm, PRETRAINED[EVEREST]):
                    chain = Chain(self.study, self.kind, self.seed, f"{name}-{steps}")
                    yield [chain._pretraining(name, budgets, steps)]

    def _pretraining(self, name: str, budgets: tuple[str, ...], steps: int) -> Run:
        arm = PRETRAINED[name]
        run = self.run("pretrain", PRETRAIN, steps, pretrain_tokens(arm))
        probed = self.run("probe", TUNE, steps, DENSE).config if budgets else None
        return run._replace(arm=name, budgets=budgets, ranking=arm.ranking, probed=probed)

    def _steps(self, task: str, arm: Arm, reference: Arm) -> Iterator[tuple[tuple[str, ...], int]]:
        """Yield the budgets and the steps of each run of an arm: one if both budgets mean the same steps."""
        scale = self.study.scale
        steps = scale.pretrain_steps if task == PRETRAIN else scale.finetune_steps
        share = self._cost(task, reference) / self._cost(task, arm)
        affordable = steps if abs(share - 1) < _SAME_COMPUTE else max(1, round(steps * share))
        if not arm.at_equal_steps:
            yield (COMPUTE,), affordable
        elif affordable == steps:
            yield BUDGETS, steps
        else:
            yield from (((STEPS,), steps), ((COMPUTE,), affordable))

    def _cost(self, task: str, arm: Arm) -> int:
        tokens = pretrain_tokens(arm) if task == PRETRAIN else finetune_tokens(arm)
        return predict_macs(Experiment.model_validate(self._tree(task, tokens))).training_macs

    def _tree(self, task: str, tokens: Tokens) -> dict[str, Any]:
        """Return a config tree without the settings of one run (data and run folder)."""
        pretrain, clips = task == PRETRAIN, self.study.scale.clips
        lr = (_PRETRAIN_LR if pretrain else _FINETUNE_LR) * REFERENCE_BATCH / clips
        return {
            "task": task,
            "model": self.study.scale.model | {"num_classes": None if pretrain else len(MOTIONS)},
            "tokens": tokens,
            # Plain pixels, as in the demo: with normalised ones, so few steps only learn the mean.
            "loss": {"normalize_targets": False},
            "optimizer": {"betas": (0.9, 0.95 if pretrain else 0.999), "clip_grad_norm": 1.0},
            "schedule": {"epochs": 1, "warmup_epochs": 0.1, "base_lr": lr},
            "batch": {"micro_batch_size": clips},
            "precision": self.study.scale.precision,
            "parallelism": {"zero_stage": 1},
        }

    def run(self, name: str, task: str, steps: int, tokens: Tokens) -> Run:
        """Return a run of this chain, whose manifest lists a video for each of its clips."""
        tree, data = self._tree(task, tokens), self.study.data(self.kind)
        if task == TUNE:
            tree["model"]["init_from"] = self.folder / "pretrain"
        tree["data"] = {
            "train": data / f"visits-{steps * self.study.scale.clips}.txt",
            "test": data / "test.txt",
            "class_names": data / "classes.txt",
            "decode_short_side": self.study.scale.model["image_size"],
            "frame_stride": 1,
            "sampling": "segments" if self.kind == PAUSES else "stride",
            "train_crop": "center",
            "test_segments": 1,
            "test_crops": 1,
            "num_workers": 0,
        }
        seldom = 10**6  # steps: more than a run has, so that it saves and draws at the end only
        often = {"log_every_steps": 20, "save_every_steps": seldom, "image_every_steps": seldom}
        tree["run"] = {"dir": self.folder / name, "seed": self.seed, **often}
        config = Experiment.model_validate(tree)
        return Run(name, self.kind, self.seed, self.name, (), steps, config)


def pretrain_tokens(arm: Arm) -> Tokens:
    """Return the `tokens` section of a pre-training in this arm."""
    return {**arm.tokens, "keep_ratio": _PRETRAIN_KEEP_RATIO, "mask_ratio": _MASK_RATIO}


def finetune_tokens(arm: Arm) -> Tokens:
    """Return the `tokens` section of a fine-tuning in this arm."""
    return {**arm.tokens, "keep_ratio": KEEP_RATIO}
