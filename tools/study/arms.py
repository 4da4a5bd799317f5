"""The arms of the study: the ways to choose tokens that are compared, one line per arm."""

from __future__ import annotations

from typing import Any, NamedTuple

Tokens = dict[str, Any]  # the section of a config

KINDS = PLAIN, BUSY, PANNING, PAUSES = ("plain", "busy", "panning", "pauses")  # kinds of data
EVEREST = "rero"
DENSE: Tokens = {"selection": "none"}


class Arm(NamedTuple):
    """A way to choose the tokens of a run.

    Attributes:
        label: name in tables and plots.
        tokens: the `tokens` section of its configs, without the ratios that all arms share.
        kinds: kinds of data on which it is compared.
        ranking: one of `RANKINGS` of study/videos.py, by which the loader ranks tokens in place of the codec
            score; None for the rule and score of `tokens`.
        at_equal_steps: whether it is also compared at equal steps, besides equal compute.
    """

    label: str
    tokens: Tokens
    kinds: tuple[str, ...] = KINDS
    ranking: str | None = None
    at_equal_steps: bool = True


def _rero(score: str, **tokens: Any) -> Tokens:
    return {"selection": "rero", "score": score, **tokens}


# In fine-tuning, from the same weights; `CHEAPEST` sets the compute.
CHEAPEST = "random"
TUNED = {
    EVEREST: Arm("ReRo, embedding", _rero("embedding")),
    "sketch": Arm("ReRo, sketch", _rero("sketch")),
    "pixel": Arm("ReRo, pixel", _rero("pixel")),
    "codec": Arm("ReRo, codec", _rero("codec")),
    "rlt": Arm("RLT's rule", {"selection": "rlt"}),
    CHEAPEST: Arm("random", {"selection": "random"}),
    "tube": Arm("tube", {"selection": "tube"}),
    "uniform": Arm("uniform in time", {"selection": "uniform"}),
    "camera": Arm("ReRo, pixel, less camera", _rero("codec"), ranking="camera"),
    "oracle": Arm("oracle, true motion", _rero("codec"), ranking="motion"),
    "dense": Arm("dense", DENSE, at_equal_steps=False),
    "iifs-1.5": Arm("ReRo, IIFS α 1.5", _rero("embedding", frame_oversampling=1.5), (PAUSES,)),
    "iifs-3": Arm("ReRo, IIFS α 3", _rero("embedding", frame_oversampling=3.0), (PAUSES,)),
}
# In pre-training, judged by a linear probe; EVEREST sets the compute. On `panning`, features of so short a
# pre-training are at chance; `plain` and more rules were compared earlier (docs/study.md).
PRETRAINED = {
    EVEREST: Arm("ReRo, embedding", _rero("embedding"), (BUSY,)),
    "rlt": Arm("RLT's rule", {"selection": "rlt"}, (BUSY,)),
    "random": Arm("random", {"selection": "random"}, (BUSY,)),
    "tube": Arm("VideoMAE's tubes", {"selection": "tube"}, (BUSY,)),
}
