"""The protocol: which runs there are at which scale, as configs of the real trainer. No torch.

A *chain* is one pre-training and the fine-tunings that start from it. A seed stands for all that is random in
a chain; all chains on a kind of data see the same videos.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

from everest_ds.config import Experiment
from everest_ds.data.synthetic import MOTIONS, SyntheticSpec
from everest_ds.profiling.compute import predict_macs
from everest_ds.training.schedule import REFERENCE_BATCH

Tokens = dict[str, Any]  # the section of a config
Budget = Literal["steps", "compute"]  # what all arms of a comparison have equally much of

KINDS = PLAIN, BUSY, PAUSES = ("plain", "busy", "pauses")  # of data
EVEREST, NOTHING = "rero", "nothing"
SELECTIONS = (EVEREST, "tube", "dual", "random", "none")  # of pre-training
KEEP_RATIOS = (0.2, 0.4, 0.6, 0.8)  # of fine-tuning; at 1 all selections are the dense one
KEEP_RATIO = 0.6  # EVEREST's
OVERSAMPLINGS = (1.0, 1.5, 3.0)  # of frames: without IIFS, EVEREST's, and all that a paused video has
PAUSES_KEEP_RATIOS = (KEEP_RATIO, 0.2)  # also what IIFS counts: it tells slots apart the better, the fewer
DENSE: Tokens = {"selection": "none"}
SHORT = "short"  # the fine-tuning that judges a pre-training, beside the probe

# Chosen on other seeds of runs and videos than those that a study reports.
_PRETRAIN_LR, _FINETUNE_LR = 2e-3, 1.5e-3
_PRETRAIN_KEEP_RATIO, _MASK_RATIO = 0.3, 0.875


@dataclass(frozen=True)
class Scale:
    """How large a study is.

    Attributes:
        model: this section of all configs.
        videos: of each kind of data, by split.
        seeds: of the chains.
        pretrain_steps: of every pre-training at equal steps; EVEREST's at equal compute.
        short_steps: of the dense fine-tunings that compare pre-trainings: few, so that those matter.
        finetune_steps: of the fine-tunings that compare kept tokens; the dense one's at equal compute.
        clips: of a step.
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
        name: its place in the chain.
        kind: of data.
        seed: of the chain.
        pretrained: by which selection the chain is, or NOTHING.
        budget: what the chain's pre-training has as much of as the others'.
        num_steps: of the optimiser.
        config: what the trainer gets: one epoch over a manifest with a line a clip: any number of steps
            is possible.
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
        """Predicted compute of the whole run, forward and backward."""
        return predict_macs(self.config).training_macs * self.num_clips

    @property
    def num_clips(self) -> int:
        """Of all steps."""
        return self.num_steps * self.config.batch.micro_batch_size


@dataclass(frozen=True)
class Study:
    """All runs of a scale, in a folder.

    Attributes:
        data_seed: draws the videos.
    """

    scale: Scale
    out: Path
    data_seed: int = 1

    def data(self, kind: str) -> Path:
        """The folder of a kind's videos and manifests."""
        return self.out / "data" / kind

    def spec(self, kind: str) -> SyntheticSpec:
        """The videos of a kind: two frames longer than a clip, or three times as long where things pause."""
        frames, size = self.scale.model["num_frames"], self.scale.model["image_size"]
        if kind == PAUSES:
            return SyntheticSpec(3 * frames, size, self.data_seed, kind, pace=2.0)
        return SyntheticSpec(frames + 2, size, self.data_seed, kind, pace=4.0)

    @property
    def num_videos(self) -> int:
        """Of all kinds and splits."""
        return len(KINDS) * sum(self.scale.videos.values())

    @property
    def num_runs(self) -> int:
        """Of all chains."""
        return sum(len(chain) for chain in self.chains())

    def chains(self) -> Iterator[list[Run]]:
        """EVEREST's own first, by far the longest; then what its pre-training is compared with."""
        places = [(kind, seed) for seed in self.scale.seeds for kind in (PLAIN, BUSY)]
        for kind, seed in places:
            everest = _Chain(self, kind, seed, EVEREST, "steps")
            yield [*everest.pretrained_and_tuned(), *everest.by_tokens()]
        for kind, seed in places:
            yield list(_Chain(self, kind, seed, NOTHING, "steps").pretrained_and_tuned())
            for selection in SELECTIONS[1:]:
                chain = _Chain(self, kind, seed, selection, "steps")
                control = [chain.kept("random", KEEP_RATIO)] if selection == "random" else []
                yield [*chain.pretrained_and_tuned(), *control]
                yield list(_Chain(self, kind, seed, selection, "compute").pretrained_and_tuned())


@dataclass(frozen=True)
class _Chain:
    study: Study
    kind: str
    seed: int
    selection: str
    budget: Budget

    @property
    def folder(self) -> Path:
        return self.study.out / "runs" / f"{self.kind}-{self.seed}" / f"{self.selection}-{self.budget}"

    def pretrained_and_tuned(self) -> Iterator[Run]:
        scale = self.study.scale
        if self.selection != NOTHING:
            tokens, everest = _pretrain_tokens(self.selection), _pretrain_tokens(EVEREST)
            share = self._cost("pretrain", everest) / self._cost("pretrain", tokens)
            steps = scale.pretrain_steps * (share if self.budget == "compute" else 1)
            yield self._run("pretrain", "pretrain", round(steps), tokens)
        yield self._run(SHORT, "finetune", scale.short_steps, DENSE)

    def by_tokens(self) -> Iterator[Run]:
        """The same weights, fine-tuned on more or fewer tokens."""
        steps = self.study.scale.finetune_steps
        yield self._run("dense", "finetune", steps, DENSE)
        for selection in (EVEREST, "random"):
            for ratio in KEEP_RATIOS:
                yield self.kept(selection, ratio)
        everest = {"selection": EVEREST, "keep_ratio": KEEP_RATIO}
        share = self._cost("finetune", DENSE) / self._cost("finetune", everest)
        yield self._run(f"{EVEREST}-{KEEP_RATIO}-compute", "finetune", round(steps * share), everest)
        if self.kind == PLAIN:
            yield from self._on_pauses()

    def _on_pauses(self) -> Iterator[Run]:
        for alpha, ratio in product(OVERSAMPLINGS, PAUSES_KEEP_RATIOS):
            tokens = {"selection": EVEREST, "keep_ratio": ratio, "frame_oversampling": alpha}
            steps = self.study.scale.finetune_steps
            yield self._run(f"iifs-{alpha}-{ratio}", "finetune", steps, tokens, PAUSES)

    def kept(self, selection: str, ratio: float) -> Run:
        """Fine-tuned on this share of the tokens."""
        tokens = {"selection": selection, "keep_ratio": ratio}
        return self._run(f"{selection}-{ratio}", "finetune", self.study.scale.finetune_steps, tokens)

    def _cost(self, task: str, tokens: Tokens) -> int:
        return predict_macs(Experiment.model_validate(self._tree(task, tokens))).training_macs

    def _tree(self, task: str, tokens: Tokens) -> dict[str, Any]:
        """A config, but for what belongs to one run of it."""
        pretrain, clips = task == "pretrain", self.study.scale.clips
        lr = (_PRETRAIN_LR if pretrain else _FINETUNE_LR) * REFERENCE_BATCH / clips
        return {
            "task": task,
            "model": self.study.scale.model | {"num_classes": None if pretrain else len(MOTIONS)},
            "tokens": tokens,
            # Plain pixels, as in the demo: so few steps do not get below the mean of normalised ones.
            "loss": {"normalize_targets": False},
            "optimizer": {"betas": (0.9, 0.95 if pretrain else 0.999), "clip_grad_norm": 1.0},
            "schedule": {"epochs": 1, "warmup_epochs": 0.1, "base_lr": lr},
            "batch": {"micro_batch_size": clips},
            "parallelism": {"zero_stage": 1},
        }

    def _run(self, name: str, task: str, steps: int, tokens: Tokens, kind: str | None = None) -> Run:
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
        seldom = 10**6  # steps: at the end only
        often = {"log_every_steps": 20, "save_every_steps": seldom, "image_every_steps": seldom}
        tree["run"] = {"dir": self.folder / name, "seed": self.seed, **often}
        config = Experiment.model_validate(tree)
        return Run(name, kind, self.seed, self.selection, self.budget, steps, config)


def _pretrain_tokens(selection: str) -> Tokens:
    return {"selection": selection, "keep_ratio": _PRETRAIN_KEEP_RATIO, "mask_ratio": _MASK_RATIO}
