"""The study of the forms of data: what it costs to train on few clips of each video, or from a frame store.

A run on a token cache is bit-equal to one with the same `data.draws` and no cache, so these runs need none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from everest_ds.config import Experiment
from everest_ds.data.synthetic import SyntheticSpec
from study.arms import DENSE, EVEREST, PLAIN, PRETRAINED, Tokens
from study.protocol import PRETRAIN, STORE, TUNE, Chain, Run, Scale, Study, pretrain_tokens
from study.report import Scores, scores, table


class Source(NamedTuple):
    """A form of the training data.

    Attributes:
        draws: `data.draws`; None for new clips in every epoch.
        stored: True if the frames come from a store with the default settings.
    """

    draws: int | None = None
    stored: bool = False


FRESH = "fresh"  # name of the arm that draws new clips from the files in every epoch
SOURCES = {
    FRESH: Source(),
    "frame store": Source(stored=True),
    "16 draws": Source(16),
    "4 draws": Source(4),
    "1 draw": Source(1),
}
_MODEL = {"backbone": "vit_tiny", "num_frames": 8, "image_size": 32, "patch_size": 8}
SCALES = {
    "smoke": Scale(_MODEL, {"train": 24, "test": 24}, (0,), 2, 6, 8, "bf16"),
    "small": Scale(_MODEL, {"train": 1500, "test": 900}, (1, 2, 3), 700, 360, 32, "bf16"),
}
FIGURES = {"probe_top1": "linear probe", "top1": "fine-tuning"}
SHORT = "short"  # name of the dense fine-tuning that, with a linear probe, judges a pre-training
_SHORT_STEPS = 80  # few, so that the pre-training matters
_KEEP_RATIO = 0.6
_STEPS_PER_EPOCH = 10  # few videos and many epochs, so that even 16 draws recur


@dataclass(frozen=True)
class DrawsStudy(Study):
    """The runs on each form of the data: chains that differ in pre-training, and fine-tunings of the first.

    Attributes:
        kinds: kinds of data.
        arms: the forms of the data that are compared with new clips from the files.
    """

    kinds: tuple[str, ...] = (PLAIN,)
    arms: tuple[str, ...] = tuple(SOURCES)

    @property
    def compared(self) -> tuple[str, ...]:
        """Return the arms to run: new clips from the files, and those compared with them."""
        return FRESH, *(arm for arm in self.arms if arm != FRESH)

    def spec(self, kind: str, enlargement: int = 1) -> SyntheticSpec:
        """Return the spec of a kind's videos: twice as long as a clip, so that clips differ in time too."""
        frames, size = self.scale.model["num_frames"], enlargement * self.scale.model["image_size"]
        return SyntheticSpec(2 * frames, size, self.data_seed, kind, pace=4.0)

    def chains(self) -> Iterator[list[Run]]:
        """Yield a chain for each kind of data, seed and form of the data."""
        for kind in self.kinds:
            for seed in self.scale.seeds:
                for arm in self.compared:
                    yield list(self._chain(kind, seed, arm))

    def _chain(self, kind: str, seed: int, arm: str) -> Iterator[Run]:
        chain, scale = Chain(self, kind, seed, arm.replace(" ", "-")), self.scale
        yield _cycling(chain.run("pretrain", PRETRAIN, scale.pretrain_steps, _PRETRAINED), arm)
        short = chain.run(SHORT, TUNE, min(_SHORT_STEPS, scale.pretrain_steps), DENSE)
        yield short._replace(probed=short.config)
        if arm == FRESH:
            for other in self.compared:
                tuned = chain.run(f"tuned, {other}", TUNE, scale.finetune_steps, _TUNED)
                yield _cycling(tuned._replace(arm=other), other)


_PRETRAINED: Tokens = {**pretrain_tokens(PRETRAINED[EVEREST]), "score": "pixel"}
_TUNED: Tokens = {"selection": EVEREST, "keep_ratio": _KEEP_RATIO, "score": "pixel"}


def _cycling(run: Run, arm: str) -> Run:
    """Return the run on a few videos in many epochs, with crops, on the form of the data that `arm` names."""
    tree = run.config.model_dump()
    clips = _STEPS_PER_EPOCH * run.config.batch.micro_batch_size
    epochs = max(1, run.num_steps // _STEPS_PER_EPOCH)
    assert run.config.data.train is not None
    tree["data"] |= {
        "train": run.config.data.train.with_name(f"visits-{clips}{STORE if SOURCES[arm].stored else '.txt'}"),
        "draws": SOURCES[arm].draws,
        "train_crop": "multi_scale",
    }
    tree["schedule"] |= {"epochs": epochs, "warmup_epochs": epochs / 10}
    config = Experiment.model_validate(tree)
    return run._replace(num_steps=epochs * _STEPS_PER_EPOCH, config=config)


def render(rows: Sequence[Mapping[str, Any]], study: DrawsStudy) -> str:
    """Return the table of the study as Markdown."""
    lines = [dict(_row(rows, kind, arm)) for kind in study.kinds for arm in study.compared]
    return f"{table(lines)}\n\n{len(rows)} of {study.num_runs} runs.\n"


def _row(rows: Sequence[Mapping[str, Any]], kind: str, arm: str) -> Iterator[tuple[str, str]]:
    yield "data", kind
    yield "clips", arm
    for figure, what in FIGURES.items():
        yield from _against(what, *(_of_pretraining(rows, kind, each, figure) for each in (arm, FRESH)))
    tuned = (scores(rows, "top1", kind=kind, name=f"tuned, {each}") for each in (arm, FRESH))
    yield from _against("fine-tuned on these clips", *tuned)


def _of_pretraining(rows: Sequence[Mapping[str, Any]], kind: str, arm: str, figure: str) -> Scores:
    return scores(rows, figure, kind=kind, name=SHORT, arm=arm.replace(" ", "-"))


def _against(what: str, mine: Scores, fresh: Scores) -> Iterator[tuple[str, str]]:
    yield f"{what}, top-1", mine.text()
    yield f"{what}, against fresh", "" if mine == fresh else mine.minus(fresh).text("+")
