"""The peer systems of the published tables, reimplemented from their papers, and a registry of them.

The peers exist to be counted, traced and timed next to our own models. Their computation therefore matches
the originals to the last multiply-accumulate, while input shapes, keys and randomness follow our models. Each
peer has one module and one line in the registry. `everest_ds.models` does not import this package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from everest_ds.efficiency.peers.kcenter import LONG_CLIP, KCenterSampler
from everest_ds.efficiency.peers.mme import build_mme
from everest_ds.efficiency.peers.motionformer import build_motionformer
from everest_ds.efficiency.peers.mvd import build_mvd
from everest_ds.efficiency.peers.mvit import build_mvit
from everest_ds.efficiency.peers.mvit_plan import MVIT_B, MVIT_S
from everest_ds.efficiency.peers.timesformer import build_timesformer
from everest_ds.efficiency.peers.vivit import build_vivit
from everest_ds.efficiency.peers.xvit import build_xvit

__all__ = ["PEERS", "Peer", "blank_inputs"]


@dataclass(frozen=True)
class Peer:
    """A system of the published tables.

    Attributes:
        name: its name in the registry.
        build: builds it at its full published size; under `torch.device("meta")`, no weights are allocated.
        clip_shape: shape of one uint8 view, (frames, height, width, 3).
        views: number of views that the published compute figure sums.
        phase: `pretrain` for a pre-training step, which returns the loss; `finetune` for a classifier.
    """

    name: str
    build: Callable[[], nn.Module]
    clip_shape: tuple[int, int, int, int]
    views: int
    phase: Literal["pretrain", "finetune"]


def blank_inputs(model: nn.Module, num_clips: int = 1) -> tuple[Tensor, ...]:
    """Return zeros for each argument of a peer's forward pass: uint8 clips, keys, and any further inputs.

    `model(*blank_inputs(model))` runs on every device, including meta, and so can be traced and counted.
    """
    make: Any = model.blank_inputs
    return make(num_clips)


def _kcentered(build: Callable[..., nn.Module], one_per_place: bool) -> Callable[[], nn.Module]:
    # The sampler is built at the call, on the default device at that time.
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
        # X-ViT with this sampler was never released; like TimeSformer, it mixes patches at the same place.
        Peer("kcentered_xvit", _kcentered(build_xvit, True), _clip(32), 3, "finetune"),
        Peer("kcentered_motionformer", _kcentered(build_motionformer, False), _clip(32), 1, "finetune"),
        Peer("kcentered_timesformer", _kcentered(build_timesformer, True), _clip(32), 3, "finetune"),
        Peer("mme", build_mme, _clip(16), 1, "pretrain"),
        Peer("mvd", build_mvd, _clip(16), 1, "pretrain"),
    )
}
