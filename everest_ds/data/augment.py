"""Augmentation for fine-tuning beyond crops and flips: RandAugment, random erasing, mixup and cutmix.

Every augmentation works in place on uint8 batches on the device. Its random numbers are derived from the
clips' keys, and so from (seed, epoch, sample): they are the same on any number of ranks and workers, and
after a restart. Mixing pairs neighbours of the epoch's order, which always share a micro-batch.

Shape legend: B clips, F frames, H x W pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from everest_ds.config import Experiment
from everest_ds.config.schema import AugmentConfig
from everest_ds.data.augment_ops import FILL, OPERATIONS
from everest_ds.data.clip_batches import ClipBatch

# Seeds beside a clip's key that make the draws for each purpose independent (`clips` uses 1).
_COLOURS, _ERASING, _MIXING = 2, 3, 4
# As in VideoMAE's fine-tuning: each operation is applied with probability 0.5 and with varying strength.
_OPERATION_PROBABILITY, _STRENGTH_STD, _MAX_MAGNITUDE = 0.5, 0.5, 10.0
_ERASED_AREA, _ERASED_LOG_ASPECT = (0.02, 1 / 3), (math.log(0.3), -math.log(0.3))
_ERASED_STD = (58, 57, 57)  # ImageNet's standard deviation, so that the noise resembles normalised pixels
_CUTMIX_SHARE = 0.5  # share of mixed pairs that get cutmix if mixup is enabled too


class Augmentation:
    """The augmentation that the section `augment` of a config describes; by default, it changes nothing."""

    def __init__(self, config: Experiment) -> None:
        self.config = config.augment
        self.repeats = config.data.repeats
        self.num_classes = config.model.num_classes or 0

    def __call__(self, batch: ClipBatch, keys: list[int]) -> ClipBatch:
        """Augment the batch in place and return it; labels become float32 (B, classes) if clips are mixed.

        Args:
            batch: the batch, on the device.
            keys: the keys of its clips on the host, as copying them from the device would synchronise.
        """
        for clip, key in zip(batch.clip, keys, strict=True):
            rand_augment(clip, key, self.config)
            erase(clip, key, self.config.erase_probability)
        return self._mix(batch, keys) if self.config.mixes else batch

    def _mix(self, batch: ClipBatch, keys: list[int]) -> ClipBatch:
        # one_hot() would synchronise with the device to check the range of the labels.
        labels = torch.zeros(len(keys), self.num_classes, device=batch.label.device)
        labels.scatter_(1, batch.label[:, None], 1.0)
        for one in range(len(keys)):
            # Clips of one sample are neighbours too, but are not mixed with each other.
            group, repeat = divmod(one, self.repeats)
            if group % 2 == 0:
                other = (group + 1) * self.repeats + repeat
                rng = np.random.default_rng((keys[one], keys[other], _MIXING))
                kept = mix_clips(batch.clip[one], batch.clip[other], rng, self.config)
                own = labels[one].clone()
                labels[one] = kept * own + (1 - kept) * labels[other]
                labels[other] = kept * labels[other] + (1 - kept) * own
        return batch._replace(label=labels)


def rand_augment(clip_FHWC: Tensor, key: int, config: AugmentConfig) -> None:
    """Apply randomly chosen RandAugment operations to a clip, in place."""
    rng = np.random.default_rng((key, _COLOURS))
    for operation in rng.choice(len(OPERATIONS), config.rand_augment_ops):
        apply, sign = rng.random() < _OPERATION_PROBABILITY, 1 if rng.random() < 0.5 else -1
        magnitude = rng.normal(config.rand_augment_magnitude, _STRENGTH_STD)
        strength = float(np.clip(magnitude / _MAX_MAGNITUDE, 0, 1))
        if apply:
            clip_FHWC.copy_(OPERATIONS[operation](clip_FHWC, strength, sign))


def erase(clip_FHWC: Tensor, key: int, probability: float) -> None:
    """Fill a random box of a clip with noise, in place, with the given probability.

    The noise is the same in every frame: varying noise would count as the strongest motion, and ReRo would
    keep all its tokens.
    """
    rng = np.random.default_rng((key, _ERASING))
    if rng.random() >= probability:
        return
    height, width = clip_FHWC.shape[1:3]
    top, left, box_height, box_width = _erased_box(height, width, rng)
    generator = torch.Generator(clip_FHWC.device).manual_seed(int(rng.integers(2**63)))
    shape = (box_height, box_width)
    for colour, (mean, std) in enumerate(zip(FILL, _ERASED_STD, strict=True)):
        noise = torch.randn(shape, generator=generator, device=clip_FHWC.device)
        values = (noise * std + mean).round().clamp(0, 255).to(torch.uint8)
        clip_FHWC[:, top : top + box_height, left : left + box_width, colour] = values


def mix_clips(one: Tensor, other: Tensor, rng: np.random.Generator, config: AugmentConfig) -> float:
    """Mix two clips (F, H, W, 3) into each other, in place; return the share that each keeps of itself."""
    share = _CUTMIX_SHARE if config.mixup_alpha else 1.0
    if config.cutmix_alpha and rng.random() < share:
        return _cutmix(one, other, float(rng.beta(config.cutmix_alpha, config.cutmix_alpha)), rng)
    kept = float(rng.beta(config.mixup_alpha, config.mixup_alpha))
    mine, theirs = one.float(), other.float()
    one.copy_((kept * mine + (1 - kept) * theirs).round())
    other.copy_((kept * theirs + (1 - kept) * mine).round())
    return kept


def _cutmix(one: Tensor, other: Tensor, kept: float, rng: np.random.Generator) -> float:
    height, width = one.shape[1:3]
    side = math.sqrt(1 - kept)
    top, bottom = _span(height, side, rng)
    left, right = _span(width, side, rng)
    box = (slice(None), slice(top, bottom), slice(left, right))
    cut = one[box].clone()
    one[box] = other[box]
    other[box] = cut
    return 1 - (bottom - top) * (right - left) / (height * width)


def _span(length: int, share: float, rng: np.random.Generator) -> tuple[int, int]:
    """Draw an interval that covers `share` of `length` around a random centre, clipped to the picture."""
    center, half = int(rng.integers(length)), int(length * share) // 2
    return max(0, center - half), min(length, center + half)


def _erased_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = height * width * rng.uniform(*_ERASED_AREA)
        aspect = math.exp(rng.uniform(*_ERASED_LOG_ASPECT))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return 0, 0, height // 4, width // 4
