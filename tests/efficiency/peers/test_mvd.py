"""Tests of MVD's training step: counts, teachers, loss, positions, and learning on real clips."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from everest_ds.config.backbones import TransformerShape
from everest_ds.config.tokens import ClipGeometry
from everest_ds.efficiency.peers.mvd import MVD, build_mvd
from everest_ds.efficiency.peers.teachers import BiasedAttention
from everest_ds.models.positions import image_positions, video_positions
from everest_ds.models.selection.masks import split_tubes
from everest_ds.models.tubelets import to_tubelets
from everest_ds.models.vit import Attention
from everest_ds.profiling.mac_counter import count_forward
from tests.efficiency.peers.real_clips import real_clips

GEOMETRY = ClipGeometry(num_frames=4, image_size=64)  # 2 slots of 4 x 4 places
KEYS = torch.tensor([5, 6])


def small_mvd(attention: str = "fused") -> MVD:
    torch.manual_seed(0)
    student, teacher = TransformerShape(64, 2, 4), TransformerShape(96, 2, 4)
    return build_mvd(GEOMETRY, student, teacher, mask_ratio=0.75, attention=attention)


def random_clips() -> Tensor:
    return torch.randint(0, 256, (2, 4, 64, 64, 3), generator=torch.Generator().manual_seed(0)).byte()


def by_part(counts: dict[str, int]) -> Counter[str]:
    parts: Counter[str] = Counter()
    for module, count in counts.items():
        parts[module.partition(".")[0]] += count
    return parts


def test_counts_of_the_published_size() -> None:
    with torch.device("meta"):
        model = build_mvd()
    count = count_forward(model, *model.blank_inputs(1))
    assert by_part(count.macs_by_module) == {
        "student": 77_259_079_680,
        "image_teacher": 140_504_481_792,
        "video_teacher": 180_344_586_240,
    }
    assert by_part(count.layer_norm_elements_by_module) == {
        "student": 14_868_480,
        "image_teacher": 29_048_832,
        "video_teacher": 28_901_376,
    }
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 116_942_592
    assert sum(p.numel() for p in model.image_teacher.parameters()) == 85_647_360
    assert sum(p.numel() for p in model.video_teacher.parameters()) == 86_227_200


@pytest.mark.parametrize("attention", ["fused", "unfused"])
def test_the_student_learns_real_clips_and_the_teachers_do_not(attention: str) -> None:
    model = small_mvd(attention)
    clips = real_clips(GEOMETRY, "bikes.mp4", "carphone_pristine.mp4")
    taught = [p.clone() for p in (*model.image_teacher.parameters(), *model.video_teacher.parameters())]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = model(clips, KEYS)
        optimizer.zero_grad()
        loss.backward()
        still = [name for name, p in model.student.named_parameters() if p.grad is None or not p.grad.any()]
        assert still == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    unchanged = (*model.image_teacher.parameters(), *model.video_teacher.parameters())
    assert all(map(torch.equal, taught, unchanged))
    assert all(p.grad is None for p in unchanged)


def test_attention_kernels_agree() -> None:
    clips = random_clips()
    torch.testing.assert_close(small_mvd("fused")(clips, KEYS), small_mvd("unfused")(clips, KEYS))


def test_blank_inputs_fit() -> None:
    model = small_mvd()
    assert model(*model.blank_inputs(2)).isfinite()


def test_loss_compares_masked_tokens_with_both_teachers() -> None:
    model = small_mvd().eval()
    clips = random_clips()
    visible_BV, masked_BM = split_tubes(GEOMETRY, model.num_visible, KEYS)
    masked = torch.zeros(2, GEOMETRY.num_tokens, dtype=torch.bool)
    masked[torch.arange(2)[:, None], masked_BM] = True
    predictions = model.student(to_tubelets(clips, GEOMETRY), visible_BV, masked_BM, KEYS)
    targets = [teacher(clips, KEYS)[masked] for teacher in (model.image_teacher, model.video_teacher)]
    expected = sum(F.smooth_l1_loss(p.flatten(0, 1), t) for p, t in zip(predictions, targets, strict=True))
    torch.testing.assert_close(model(clips, KEYS), expected)


def test_the_image_teacher_sees_the_first_frame_of_a_slot_alone() -> None:
    teacher, clips = small_mvd().image_teacher, random_clips()
    before = teacher(clips, KEYS)
    clips[:, 1::2] = 0
    assert torch.equal(teacher(clips, KEYS), before)
    clips[:, 2] = 0  # the first frame of slot 1
    after = teacher(clips, KEYS)
    places = GEOMETRY.tokens_per_slot
    assert torch.equal(after[:, :places], before[:, :places])
    assert not torch.isclose(after[:, places:], before[:, places:]).all(dim=-1).any()


def test_decoders_drop_their_own_paths() -> None:
    """Encoder and decoders draw drop path from different keys, so that they do not drop the same blocks."""
    student = small_mvd().student
    keys: list[list[int]] = []
    for part in (student.encoder, student.image_decoder, student.video_decoder):
        part.blocks.register_forward_pre_hook(lambda _, inputs: keys.append(inputs[1].tolist()))
    visible_BV, masked_BM = split_tubes(GEOMETRY, 8, KEYS)
    student(to_tubelets(random_clips(), GEOMETRY), visible_BV, masked_BM, KEYS)
    assert len({tuple(k) for k in keys}) == 3


def test_a_bias_of_the_keys_changes_nothing() -> None:
    torch.manual_seed(0)
    biased, plain = BiasedAttention(32, 4), Attention(32, 4)
    torch.nn.init.normal_(biased.k_bias)
    plain.load_state_dict({k: v for k, v in biased.state_dict().items() if k != "k_bias"})
    x_BnD = torch.randn(2, 5, 32)
    torch.testing.assert_close(biased(x_BnD), plain(x_BnD))


def test_positions_one_by_one() -> None:
    def waves(place: int, width: int) -> list[float]:
        angles = [place / 10000 ** (2 * i / width) for i in range(width // 2)]
        return [*map(math.sin, angles), *map(math.cos, angles)]

    video, image = video_positions(GEOMETRY, 32), image_positions(4, 32)
    for slot, row, column in np.ndindex(2, 4, 4):
        expected = waves(slot, 8) + waves(column, 12) + waves(row, 12)
        np.testing.assert_allclose(video[16 * slot + 4 * row + column], expected, atol=1e-6)
        np.testing.assert_allclose(image[4 * row + column], waves(column, 16) + waves(row, 16), atol=1e-6)
