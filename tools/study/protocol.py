"""The protocol of the study: the runs of each scale, as configs of the real trainer.

A *chain* is one pre-training and the fine-tunings that start from it. A seed fixes everything random in a
chain; all chains on a kind of data see the same videos.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

from everest_ds.config import Experiment
from everest_ds.config.sections import REFERENCE_BATCH
from everest_ds.costs.compute import predict_macs
from everest_ds.data.synthetic import MOTIONS, SyntheticSpec

Tokens = dict[str, Any]  # the section of a config
Budget = Literal["steps", "compute"]  # the quantity that is equal for all arms of a comparison

KINDS = PLAIN, BUSY, PAUSES = ("plain", "busy", "pauses")  # kinds of data
EVEREST, NOTHING = "rero", "nothing"
SELECTIONS = (EVEREST, "tube", "dual", "random", "none")  # in pre-training
KEEP_RATIOS = (0.2, 0.4, 0.6, 0.8)  # in fine-tuning; at 1, every selection is dense
KEEP_RATIO = 0.6  # EVEREST's value
OVERSAMPLINGS = (1.0, 1.5, 3.0)  # of frames: without IIFS, EVEREST's value, and all frames of a paused video
# IIFS draws slots by their kept tokens: the lower the keep ratio, the better it tells slots apart.
PAUSES_KEEP_RATIOS = (KEEP_RATIO, 0.2)
DENSE: Tokens = {"selection": "none"}
STORE = ".store"  # ending of the name of a folder of frames that stands for the manifest beside it
SHORT = "short"  # name of the fine-tuning that, with the probe, judges a pre-training

# These values were chosen on seeds of runs and videos that no study reports.
_PRETRAIN_LR, _FINETUNE_LR = 2e-3, 1.5e-3
_PRETRAIN_KEEP_RATIO, _MASK_RATIO = 0.3, 0.875


@dataclass(frozen=True)
class Scale:
    """The size of a study.

    Attributes:
        model: the `model` section of all configs.
        videos: number of videos of each kind of data, by split.
        seeds: seeds of the chains.
        pretrain_steps: steps of every pre-training at equal steps, and of EVEREST's at equal compute.
        short_steps: steps of the dense fine-tunings that compare pre-trainings: few, so that these matter.
        finetune_steps: steps of the fine-tunings that compare kept tokens; the run at equal compute takes
            more.
        clips: clips per step.
    """

    model: dict[str, Any]
    videos: dict[str, int]
    seeds: tuple[int, ...]
    pretrain_steps: int
    short_steps: int
    finetune_steps: int
    clips: int


_TINY = {"backbone": "vit_tiny", "num_frames": 8, "image_size": 32, "patch_size": 8}
_SMALL = {"backbone": "vit_small", "num_frames": 16, "image_size": 64, "patch_size": 8}
SCALES = {
    "smoke": Scale(_TINY, {"train": 24, "test": 24}, (0,), 2, 2, 3, 8),
    "small": Scale(_TINY, {"train": 1500, "test": 900}, (1, 2, 3), 700, 80, 180, 32),
    "large": Scale(_SMALL, {"train": 9000, "test": 3000}, (1, 2, 3, 4, 5), 9000, 1500, 3000, 128),
}


class Run(NamedTuple):
    """One run of the trainer.

    Attributes:
        name: place of the run in its chain.
        kind: kind of data.
        seed: seed of the chain.
        pretrained: token selection of the chain's pre-training, or NOTHING.
        budget: quantity in which the chain's pre-training equals the others.
        num_steps: optimiser steps.
        config: config for the trainer: one epoch over a manifest with a line per clip, so that any number of
            steps is possible.
    """

    name: str
    kind: str
    seed: int
    pretrained: str
    budget: Budget
    num_steps: int
    config: Experiment

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
    """

    scale: Scale
    out: Path
    data_seed: int = 1

    def data(self, kind: str) -> Path:
        """Return the folder of a kind's videos and manifests."""
        return self.out / "data" / kind

    def spec(self, kind: str) -> SyntheticSpec:
        """Return the spec of a kind's videos: clips plus two frames, or three clips long with pauses."""
        frames, size = self.scale.model["num_frames"], self.scale.model["image_size"]
        if kind == PAUSES:
            return SyntheticSpec(3 * frames, size, self.data_seed, kind, pace=2.0)
        return SyntheticSpec(frames + 2, size, self.data_seed, kind, pace=4.0)

    @property
    def num_videos(self) -> int:
        """Return the number of videos of all kinds and splits."""
        return len(KINDS) * sum(self.scale.videos.values())

    @property
    def num_runs(self) -> int:
        """Return the number of runs of all chains."""
        return sum(len(chain) for chain in self.chains())

    def chains(self) -> Iterator[list[Run]]:
        """Yield EVEREST's chains, by far the longest, then those with which its pre-training is compared."""
        places = [(kind, seed) for seed in self.scale.seeds for kind in (PLAIN, BUSY)]
        for kind, seed in places:
            everest = Chain(self, kind, seed, EVEREST, "steps")
            yield [*everest.pretrained_and_tuned(), *everest.by_tokens()]
        for kind, seed in places:
            yield list(Chain(self, kind, seed, NOTHING, "steps").pretrained_and_tuned())
            for selection in SELECTIONS[1:]:
                chain = Chain(self, kind, seed, selection, "steps")
                control = [chain.kept("random", KEEP_RATIO)] if selection == "random" else []
                yield [*chain.pretrained_and_tuned(), *control]
                yield list(Chain(self, kind, seed, selection, "compute").pretrained_and_tuned())


@dataclass(frozen=True)
class Chain:
    """A pre-training and the fine-tunings that start from it.

    Attributes:
        study: the study, which has the sizes.
        kind, seed: kind of data, and seed of the runs.
        selection: token selection of the pre-training, NOTHING for none, or another name of the chain.
        budget: quantity in which the pre-training equals the others.
    """

    study: Study
    kind: str
    seed: int
    selection: str
    budget: Budget

    @property
    def folder(self) -> Path:
        """Return the folder of the chain's runs."""
        return self.study.out / "runs" / f"{self.kind}-{self.seed}" / f"{self.selection}-{self.budget}"

    def pretrained_and_tuned(self) -> Iterator[Run]:
        """Yield the pre-training and the short fine-tuning that judges it."""
        scale = self.study.scale
        if self.selection != NOTHING:
            tokens, everest = pretrain_tokens(self.selection), pretrain_tokens(EVEREST)
            share = self._cost("pretrain", everest) / self._cost("pretrain", tokens)
            steps = scale.pretrain_steps * (share if self.budget == "compute" else 1)
            yield self.run("pretrain", "pretrain", round(steps), tokens)
        yield self.run(SHORT, "finetune", scale.short_steps, DENSE)

    def by_tokens(self) -> Iterator[Run]:
        """Yield fine-tunings of the same weights on more or fewer tokens."""
        steps = self.study.scale.finetune_steps
        yield self.run("dense", "finetune", steps, DENSE)
        for selection in (EVEREST, "random"):
            for ratio in KEEP_RATIOS:
                yield self.kept(selection, ratio)
        everest = {"selection": EVEREST, "keep_ratio": KEEP_RATIO}
        share = self._cost("finetune", DENSE) / self._cost("finetune", everest)
        yield self.run(f"{EVEREST}-{KEEP_RATIO}-compute", "finetune", round(steps * share), everest)
        if self.kind == PLAIN:
            yield from self._on_pauses()

    def _on_pauses(self) -> Iterator[Run]:
        for alpha, ratio in product(OVERSAMPLINGS, PAUSES_KEEP_RATIOS):
            tokens = {"selection": EVEREST, "keep_ratio": ratio, "frame_oversampling": alpha}
            steps = self.study.scale.finetune_steps
            yield self.run(f"iifs-{alpha}-{ratio}", "finetune", steps, tokens, PAUSES)

    def kept(self, selection: str, ratio: float) -> Run:
        """Return a fine-tuning on this share of the tokens."""
        tokens = {"selection": selection, "keep_ratio": ratio}
        return self.run(f"{selection}-{ratio}", "finetune", self.study.scale.finetune_steps, tokens)

    def _cost(self, task: str, tokens: Tokens) -> int:
        return predict_macs(Experiment.model_validate(self._tree(task, tokens))).training_macs

    def _tree(self, task: str, tokens: Tokens) -> dict[str, Any]:
        """Return a config tree without the settings of one run (data and run folder)."""
        pretrain, clips = task == "pretrain", self.study.scale.clips
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
            "parallelism": {"zero_stage": 1},
        }

    def run(self, name: str, task: str, steps: int, tokens: Tokens, kind: str | None = None) -> Run:
        """Return a run of this chain, whose manifest lists a video for each of its clips."""
        kind = kind or self.kind
        tree, data = self._tree(task, tokens), self.study.data(kind)
        if task == "finetune" and self.selection != NOTHING:
            tree["model"]["init_from"] = self.folder / "pretrain"
        tree["data"] = {
            "train": data / f"visits-{steps * self.study.scale.clips}.txt",
            "test": data / "test.txt",
            "class_names": data / "classes.txt",
            "frame_stride": 1,
            "sampling": "segments" if kind == PAUSES else "stride",
            "train_crop": "center",
            "test_segments": 1,
            "test_crops": 1,
            "num_workers": 0,
        }
        seldom = 10**6  # steps: more than a run has, so that it saves and draws at the end only
        often = {"log_every_steps": 20, "save_every_steps": seldom, "image_every_steps": seldom}
        tree["run"] = {"dir": self.folder / name, "seed": self.seed, **often}
        config = Experiment.model_validate(tree)
        return Run(name, kind, self.seed, self.selection, self.budget, steps, config)


def pretrain_tokens(selection: str) -> Tokens:
    """Return the `tokens` section of a pre-training with this selection."""
    return {"selection": selection, "keep_ratio": _PRETRAIN_KEEP_RATIO, "mask_ratio": _MASK_RATIO}
