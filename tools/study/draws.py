"""The study of `data.draws`: what it costs to train again and again on the same few clips of each video.

A run on a token cache is bit-equal to one with the same `data.draws` and no cache, so these runs need none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everest_ds.config import Experiment
from everest_ds.data.synthetic import SyntheticSpec
from study.protocol import (
    DENSE,
    EVEREST,
    KEEP_RATIO,
    PLAIN,
    SHORT,
    Chain,
    Run,
    Study,
    Tokens,
    pretrain_tokens,
)
from study.report import FIGURES, Scores, scores, table

FRESH = "fresh"  # name of the arm that draws new clips in every epoch
ARMS: dict[str, int | None] = {FRESH: None, "16 draws": 16, "4 draws": 4, "1 draw": 1}
_STEPS_PER_EPOCH = 10  # few videos and many epochs, so that even 16 draws recur
_TUNED_STEPS = 2  # times as many steps of fine-tuning as in the study of selections


@dataclass(frozen=True)
class DrawsStudy(Study):
    """The runs with each number of draws: chains that differ in pre-training, and fine-tunings of the first.

    Attributes:
        kinds: kinds of data.
    """

    kinds: tuple[str, ...] = (PLAIN,)

    def spec(self, kind: str) -> SyntheticSpec:
        """Return the spec of a kind's videos: twice as long as a clip, so that clips differ in time too."""
        frames, size = self.scale.model["num_frames"], self.scale.model["image_size"]
        return SyntheticSpec(2 * frames, size, self.data_seed, kind, pace=4.0)

    def chains(self) -> Iterator[list[Run]]:
        """Yield a chain for each kind of data, seed and number of draws."""
        for kind in self.kinds:
            for seed in self.scale.seeds:
                for arm in ARMS:
                    yield list(self._chain(kind, seed, arm))

    def _chain(self, kind: str, seed: int, arm: str) -> Iterator[Run]:
        chain, scale = Chain(self, kind, seed, arm.replace(" ", "-"), "steps"), self.scale
        yield _cycling(chain.run("pretrain", "pretrain", scale.pretrain_steps, _PRETRAINED), arm)
        yield chain.run(SHORT, "finetune", scale.short_steps, DENSE)
        if arm == FRESH:
            steps = _TUNED_STEPS * scale.finetune_steps
            for other in ARMS:
                yield _cycling(chain.run(f"tuned, {other}", "finetune", steps, _TUNED), other)


_PRETRAINED: Tokens = {**pretrain_tokens(EVEREST), "score": "pixel"}
_TUNED: Tokens = {"selection": EVEREST, "keep_ratio": KEEP_RATIO, "score": "pixel"}


def _cycling(run: Run, arm: str) -> Run:
    """Return the run on a few videos in many epochs that cycle through the draws of `arm`, with crops."""
    tree = run.config.model_dump()
    clips = _STEPS_PER_EPOCH * run.config.batch.micro_batch_size
    epochs = max(1, run.num_steps // _STEPS_PER_EPOCH)
    assert run.config.data.train is not None
    tree["data"] |= {
        "train": run.config.data.train.with_name(f"visits-{clips}.txt"),
        "draws": ARMS[arm],
        "train_crop": "multi_scale",
    }
    tree["schedule"] |= {"epochs": epochs, "warmup_epochs": epochs / 10}
    config = Experiment.model_validate(tree)
    return run._replace(num_steps=epochs * _STEPS_PER_EPOCH, config=config)


def render(rows: Sequence[Mapping[str, Any]], num_runs: int, kinds: Sequence[str]) -> str:
    """Return the table of the study as Markdown."""
    lines = [dict(_row(rows, kind, arm)) for kind in kinds for arm in ARMS]
    return f"{table(lines)}\n\n{len(rows)} of {num_runs} runs.\n"


def _row(rows: Sequence[Mapping[str, Any]], kind: str, arm: str) -> Iterator[tuple[str, str]]:
    yield "data", kind
    yield "clips of a video", arm
    for figure, what in FIGURES.items():
        yield from _against(what, *(_of_pretraining(rows, kind, each, figure) for each in (arm, FRESH)))
    tuned = (scores(rows, kind, f"tuned, {each}", pretrained=FRESH) for each in (arm, FRESH))
    yield from _against("fine-tuned on draws", *tuned)


def _of_pretraining(rows: Sequence[Mapping[str, Any]], kind: str, arm: str, figure: str) -> Scores:
    return scores(rows, kind, SHORT, figure, pretrained=arm.replace(" ", "-"))


def _against(what: str, mine: Scores, fresh: Scores) -> Iterator[tuple[str, str]]:
    yield f"{what}, top-1", mine.text()
    yield f"{what}, against fresh", "" if mine == fresh else mine.minus(fresh).text("+")
