"""Tests of X-ViT: the frame that each mixed channel comes from, the receptive field, and time embeddings."""

from __future__ import annotations

import torch

from everest_ds.efficiency.peers.patches import AllPatches, PatchEmbedding
from everest_ds.efficiency.peers.xvit import MixingAttention, mix_neighbours
from tests.efficiency.peers.small_peers import FRAMES, LONG, sampler

SLOTS, TOKENS, WIDTH = 4, 3, 16


def test_two_eighths_of_the_channels_come_from_the_neighbours() -> None:
    clip, slot, channel = torch.meshgrid(
        torch.arange(2), torch.arange(SLOTS), torch.arange(WIDTH), indexing="ij"
    )
    x = (1 + 1000 * clip + 100 * slot + channel)[:, :, None].expand(-1, -1, TOKENS, -1).float()
    mixed = mix_neighbours(x.flatten(0, 1), SLOTS).unflatten(0, (2, SLOTS))
    assert torch.equal(mixed[:, :-1, :, :2], x[:, 1:, :, :2])
    assert torch.equal(mixed[:, 1:, :, 2:4], x[:, :-1, :, 2:4])
    assert torch.equal(mixed[..., 4:], x[..., 4:])
    assert not mixed[:, -1, :, :2].any() and not mixed[:, 0, :, 2:4].any()


def test_a_frame_is_seen_by_itself_and_its_neighbours() -> None:
    torch.manual_seed(0)
    attention = MixingAttention(WIDTH, 2, SLOTS)
    x = torch.randn(SLOTS, TOKENS, WIDTH)
    before = attention(x)
    x[0] += 1
    changed = [not torch.equal(after, then) for after, then in zip(attention(x), before, strict=True)]
    assert changed == [True, True, False, False]


def test_a_frames_class_token_has_the_time_of_the_frame() -> None:
    embedding = PatchEmbedding(FRAMES, 8, class_per_slot=True)
    patches, key = torch.zeros(1, FRAMES.num_tokens, FRAMES.tubelet_values).byte(), torch.tensor([5])
    class_tokens, _ = embedding(patches, AllPatches(FRAMES)(patches, key))
    token = embedding.class_token + embedding.places[0]
    torch.testing.assert_close(class_tokens[0], token + embedding.times)


def test_a_segments_class_token_has_the_mean_time_of_its_patches() -> None:
    embedding = PatchEmbedding(LONG, 8, class_per_slot=True)
    patches, key = torch.zeros(1, LONG.num_tokens, LONG.tubelet_values).byte(), torch.tensor([5])
    picks = sampler(True)(patches, key)
    class_tokens, _ = embedding(patches, picks)
    frames = (picks[0] // LONG.tokens_per_slot).tolist()
    times = torch.stack([torch.stack([embedding.times[f] for f in slot]).mean(dim=0) for slot in frames])
    torch.testing.assert_close(class_tokens[0], embedding.class_token + embedding.places[0] + times)
