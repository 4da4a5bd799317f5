"""Tests of augmentation: it matches PIL, treats all frames alike, and ignores how a batch is split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from pydantic import ValidationError

from everest_ds.config.schema import AugmentConfig
from everest_ds.data import augment_ops as ops
from everest_ds.data.augment import Augmentation, erase, mix_clips, rand_augment
from everest_ds.data.clip_batches import ClipBatch
from tests.training.runs import experiment

ALL = {"rand_augment_ops": 4, "erase_probability": 0.7, "mixup_alpha": 0.8, "cutmix_alpha": 1.0}


def picture() -> torch.Tensor:
    """Draw a clip of one non-square frame that is dark on the left."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 200, (1, 40, 52, 3), generator=generator)
    return (values * torch.linspace(0.1, 1, 52)[:, None] + 20).to(torch.uint8)


def batch(count: int) -> tuple[ClipBatch, list[int]]:
    clips = torch.randint(0, 256, (count, 4, 32, 32, 3), generator=torch.Generator().manual_seed(1)).byte()
    keys = [1000 + i for i in range(count)]
    return ClipBatch(clips, torch.arange(count) % 6, torch.tensor(keys), torch.arange(count)), keys


PIL: list[tuple[ops.Operation, Callable[[Image.Image], Image.Image]]] = [
    (ops.auto_contrast, ImageOps.autocontrast),
    (ops.equalize, ImageOps.equalize),
    (ops.invert, ImageOps.invert),
    (ops.posterize, lambda image: ImageOps.posterize(image, 2)),
    (ops.solarize, lambda image: ImageOps.solarize(image, 128)),
    (ops.color, lambda image: ImageEnhance.Color(image).enhance(1.45)),
    (ops.contrast, lambda image: ImageEnhance.Contrast(image).enhance(1.45)),
    (ops.brightness, lambda image: ImageEnhance.Brightness(image).enhance(1.45)),
    (ops.sharpness, lambda image: ImageEnhance.Sharpness(image).enhance(1.45)),
    (ops.rotate, lambda image: image.rotate(-15, Image.Resampling.BILINEAR, fillcolor=ops.FILL)),
]


@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 40, 64, 3), (3, 4, 150, 3)])
@pytest.mark.parametrize("highest", [0, 3, 255])
def test_a_histogram_counts_every_value_of_each_colour(shape: tuple[int, ...], highest: int) -> None:
    clip = torch.randint(0, highest + 1, shape, generator=torch.Generator().manual_seed(2)).byte()
    expected = [np.bincount(clip[..., colour].numpy().ravel(), minlength=256) for colour in range(3)]
    counts = ops.histogram(clip)
    assert counts.dtype == torch.int64 and counts.tolist() == np.stack(expected).tolist()


@pytest.mark.parametrize("ours, theirs", PIL, ids=[ours.__name__ for ours, _ in PIL])
def test_an_operation_does_what_pil_does(ours: ops.Operation, theirs: Callable[..., Image.Image]) -> None:
    clip = picture()
    expected = np.asarray(theirs(Image.fromarray(clip[0].numpy()))).astype(int)
    got = ours(clip, 0.5, 1)[0].numpy().astype(int)
    difference = np.abs(expected - got)
    if ours is ops.rotate:  # ours blends the outermost pixels with the fill colour
        difference = difference[12:-12, 14:-14]
    assert difference.max() <= 1, (difference.max(), (difference > 1).mean())


@pytest.mark.parametrize("operation", ops.OPERATIONS, ids=lambda operation: operation.__name__)
def test_a_still_clip_stays_still(operation: ops.Operation) -> None:
    clip = picture().expand(3, -1, -1, -1).contiguous()
    changed = operation(clip, 0.7, -1)
    assert changed.dtype == torch.uint8 and changed.shape == clip.shape
    assert torch.equal(changed[0], changed[1]) and torch.equal(changed[0], changed[2])


def test_shear_and_shift_move_pixels_as_far_as_they_say() -> None:
    clip = torch.zeros(1, 20, 20, 3, dtype=torch.uint8)
    clip[0, 10, 10] = 255
    moved = ops.translate_x(clip, 2 / (0.45 * 20), 1)
    assert moved[0, 10, 8].tolist() == [255] * 3 and moved[0, :, -2:].float().mean() > 100  # filled
    assert ops.translate_y(clip, 2 / (0.45 * 20), -1)[0, 12, 10].tolist() == [255] * 3


def test_noise_fills_one_box_of_all_frames_alike() -> None:
    clip = torch.zeros(5, 64, 64, 3, dtype=torch.uint8)
    erase(clip, 7, 0.999)
    erased = clip.any(dim=3)
    assert torch.equal(clip[0], clip[4]) and 0.01 < erased[0].float().mean() < 0.4
    rows, columns = erased[0].any(dim=1).nonzero(), erased[0].any(dim=0).nonzero()
    box = erased[0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert box.float().mean() > 0.9
    untouched = torch.zeros_like(clip)
    erase(untouched, 7, 0.0)
    assert not untouched.any()


def test_splitting_a_batch_over_ranks_changes_nothing(tmp_path: Path) -> None:
    config = experiment(tmp_path, tmp_path, "finetune", augment=ALL)
    whole, keys = batch(8)
    whole = Augmentation(config)(whole, keys)
    parts, keys = batch(8)
    halves = [
        Augmentation(config)(ClipBatch(*(t[part] for t in parts)), keys[part])
        for part in (slice(0, 4), slice(4, 8))
    ]
    for name in ("clip", "label"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(half, name) for half in halves]))
    assert whole.label.sum(dim=1).allclose(torch.ones(8)) and (whole.label > 0).sum() > 8
    before, _ = batch(8)
    assert not torch.equal(whole.clip, before.clip)


def test_repeats_of_a_sample_are_not_mixed_with_each_other(tmp_path: Path) -> None:
    config = experiment(tmp_path, tmp_path, "finetune", augment={"mixup_alpha": 1.0}, data={"repeats": 2})
    clips, keys = batch(4)
    clips = clips._replace(label=torch.tensor([1, 1, 3, 3]))
    labels = Augmentation(config)(clips, keys).label
    assert (labels[:, [1, 3]] > 0).all() and not labels[:, [0, 2, 4, 5]].any()


def test_cutmix_swaps_a_box_and_counts_its_pixels() -> None:
    one, other = torch.zeros(2, 32, 32, 3).byte(), torch.full((2, 32, 32, 3), 200).byte()
    for seed in range(20):
        a, b = one.clone(), other.clone()
        kept = mix_clips(a, b, np.random.default_rng(seed), AugmentConfig(cutmix_alpha=1.0))
        assert (a == 0).float().mean().item() == pytest.approx(kept)
        assert torch.equal(a, 200 - b)


def test_what_is_off_changes_nothing(tmp_path: Path) -> None:
    config = experiment(tmp_path, tmp_path, "finetune")
    (clips, keys), (same, _) = batch(2), batch(2)
    done = Augmentation(config)(clips, keys)
    assert all(torch.equal(a, b) for a, b in zip(done, same, strict=True))
    clip = same.clip[0].clone()
    rand_augment(clip, 3, AugmentConfig())
    assert torch.equal(clip, same.clip[0])


@pytest.mark.parametrize(
    "task, sections, message",
    [
        ("finetune", {"augment": {"mixup_alpha": 0.8}, "batch": {"micro_batch_size": 1}}, "multiple of 2"),
        ("finetune", {"data": {"repeats": 3}}, "multiple of data.repeats=3"),
        ("pretrain", {"augment": {"erase_probability": 0.5}}, "task finetune"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, task: str, sections: dict[str, dict[str, float]], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        experiment(tmp_path, tmp_path, task, **sections)
