"""Small classifiers of every kind for tests that run them: 2 or more slots of 4 x 4 places, 5 classes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from everest_ds.config.backbones import TransformerShape
from everest_ds.config.tokens import ClipGeometry
from everest_ds.efficiency.peers.kcenter import KCenterSampler
from everest_ds.efficiency.peers.layers import VideoClassifier
from everest_ds.efficiency.peers.motionformer import build_motionformer
from everest_ds.efficiency.peers.mvit import build_mvit
from everest_ds.efficiency.peers.mvit_plan import MViTShape
from everest_ds.efficiency.peers.timesformer import build_timesformer
from everest_ds.efficiency.peers.vivit import build_vivit
from everest_ds.efficiency.peers.xvit import build_xvit

NUM_CLASSES = 5
SHAPE = TransformerShape(64, 2, 4)
TUBELETS = ClipGeometry(num_frames=8, image_size=64)
FRAMES = ClipGeometry(num_frames=4, tubelet_size=1, image_size=64)
LONG = ClipGeometry(num_frames=12, tubelet_size=1, image_size=64)
MVIT = MViTShape(32, (1, 2, 2), stem_kernel=7, stem_stride=4, stem_padding=3, kv_stride=4)


def sampler(one_per_place: bool) -> KCenterSampler:
    return KCenterSampler(LONG, num_segments=4, one_per_place=one_per_place)


SMALL: dict[str, Callable[[], VideoClassifier]] = {
    "mvit_max": lambda: build_mvit(MVIT, 8, 64, NUM_CLASSES, "max"),
    "mvit_conv": lambda: build_mvit(MVIT, 8, 64, NUM_CLASSES, "conv"),
    "vivit": lambda: build_vivit(TUBELETS, SHAPE, 2, NUM_CLASSES),
    "timesformer": lambda: build_timesformer(FRAMES, SHAPE, NUM_CLASSES),
    "motionformer": lambda: build_motionformer(TUBELETS, SHAPE, NUM_CLASSES),
    "xvit": lambda: build_xvit(FRAMES, SHAPE, NUM_CLASSES),
    "kcentered_timesformer": lambda: build_timesformer(LONG, SHAPE, NUM_CLASSES, sampler(True)),
    "kcentered_motionformer": lambda: build_motionformer(LONG, SHAPE, NUM_CLASSES, sampler(False)),
    "kcentered_xvit": lambda: build_xvit(LONG, SHAPE, NUM_CLASSES, sampler(True)),
}


def small(name: str) -> VideoClassifier:
    """Build the classifier `name` of `SMALL`, with the same weights each time."""
    torch.manual_seed(0)
    return SMALL[name]()


def noise(model: VideoClassifier, num_clips: int = 2) -> Tensor:
    """Draw random clips for `model`: uint8 (num_clips, F, H, W, 3)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (num_clips, *model.clip_shape), generator=generator).byte()


def randomized(model: VideoClassifier) -> VideoClassifier:
    """Perturb all weights, as initial biases of zero and gains of one would hide a missing part."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
