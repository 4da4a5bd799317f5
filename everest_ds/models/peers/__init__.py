"""The other systems of the published tables, written from their papers: one module and one line here each.

They are for counting, tracing and timing next to our own, so what is computed is theirs to the last
multiply-accumulate, and shapes, keys and randomness are as in our own models. `everest_ds.models` does not
import this package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from everest_ds.models.peers.kcenter import LONG_CLIP, KCenterSampler
from everest_ds.models.peers.mme import build_mme
from everest_ds.models.peers.motionformer import build_motionformer
from everest_ds.models.peers.mvd import build_mvd
from everest_ds.models.peers.mvit import build_mvit
from everest_ds.models.peers.mvit_plan import MVIT_B, MVIT_S
from everest_ds.models.peers.timesformer import build_timesformer
from everest_ds.models.peers.vivit import build_vivit
from everest_ds.models.peers.xvit import build_xvit

__all__ = ["PEERS", "Peer", "blank_inputs"]


@dataclass(frozen=True)
class Peer:
    """A system of the published tables.

    Attributes:
        name: in the registry.
        build: makes it at its full published size; under `torch.device("meta")` without any weights.
        clip_shape: one view, (frames, height, width, 3), uint8.
        views: how many views the published figure sums.
        phase: whether it is a pre-training step, which returns the loss, or a classifier.
    """

    name: str
    build: Callable[[], nn.Module]
    clip_shape: tuple[int, int, int, int]
    views: int
    phase: Literal["pretrain", "finetune"]


def blank_inputs(model: nn.Module, num_clips: int = 1) -> tuple[Tensor, ...]:
    """Zeros for each argument of a system's forward pass: uint8 clips, keys, and what else it takes.

    For those who trace: `model(*blank_inputs(model))` runs, on any device, meta included.
    """
    make: Any = model.blank_inputs
    return make(num_clips)


def _kcentered(build: Callable[..., nn.Module], one_per_place: bool) -> Callable[[], nn.Module]:
    # the sampler is made in the call, on the device that is the default then
    return lambda: build(LONG_CLIP, sampler=KCenterSampler(LONG_CLIP, one_per_place=one_per_place))


def _clip(num_frames: int) -> tuple[int, int, int, int]:
    return num_frames, 224, 224, 3


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("mvit_b", partial(build_mvit, MVIT_B), _clip(16), 1, "finetune"),
        Peer("mvit_s", partial(build_mvit, MVIT_S), _clip(16), 1, "finetune"),
        Peer("vivit_l_fe", build_vivit, _clip(128), 1, "finetune"),
        Peer("xvit", build_xvit, _clip(8), 3, "finetune"),
        Peer("motionformer", build_motionformer, _clip(16), 1, "finetune"),
        Peer("timesformer", build_timesformer, _clip(8), 3, "finetune"),
        # X-ViT with this sampler was never released; it mixes what is at the same place, as TimeSformer does
        Peer("kcentered_xvit", _kcentered(build_xvit, True), _clip(32), 3, "finetune"),
        Peer("kcentered_motionformer", _kcentered(build_motionformer, False), _clip(32), 1, "finetune"),
        Peer("kcentered_timesformer", _kcentered(build_timesformer, True), _clip(32), 3, "finetune"),
        Peer("mme", build_mme, _clip(16), 1, "pretrain"),
        Peer("mvd", build_mvd, _clip(16), 1, "pretrain"),
    )
}
