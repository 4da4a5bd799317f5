"""Tests of all peer classifiers: published counts, independent clips, randomness by key, and learning."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from everest_ds.config.tokens import ClipGeometry
from everest_ds.efficiency.peers import PEERS, blank_inputs
from everest_ds.efficiency.peers.layers import drop_path_rates
from everest_ds.efficiency.peers.motionformer import build_motionformer
from everest_ds.efficiency.peers.mvit import build_mvit
from everest_ds.efficiency.peers.mvit_plan import MVIT_S
from everest_ds.efficiency.peers.vivit import build_vivit
from everest_ds.efficiency.peers.xvit import build_xvit
from everest_ds.profiling.mac_counter import ComputeCount, count_forward, count_training_step
from tests.efficiency.peers.real_clips import real_clips
from tests.efficiency.peers.small_peers import NUM_CLASSES, SMALL, noise, randomized, small

KEYS = torch.tensor([5, 6])
MVIT_S_3_7_6 = replace(MVIT_S, depths=(3, 7, 6))

# Weights without gradient: only the class token of the last block is used, as in the released Motionformer.
IDLE = {
    f"body.blocks.1.attention.trajectory_{part}.{kind}" for part in ("q", "kv") for kind in ("weight", "bias")
}


def counted(build: Callable[[], nn.Module]) -> tuple[ComputeCount, int]:
    with torch.device("meta"):
        model = build()
    count = count_forward(model, *blank_inputs(model))
    return count, sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("build", "macs", "norm_elements", "parameters"),
    [
        pytest.param(build, *numbers, id=name)
        for name, build, *numbers in [
            ("mvit_b", PEERS["mvit_b"].build, 70_325_070_528, 30_720_960, 36_513_232),
            (
                "mvit_b_conv",
                lambda: build_mvit(pooling="conv"),
                70_599_407_808,
                40_895_424,
                36_610_672,
            ),
            ("mvit_s", PEERS["mvit_s"].build, 31_635_548_672, 16_468_992, 26_110_096),
            ("mvit_s_3", lambda: build_mvit(MVIT_S_3_7_6), 29_771_112_704, 14_863_104, 25_911_824),
            ("vivit", PEERS["vivit_l_fe"].build, 3_969_138_491_392, 635_880_448, 606_877_072),
            (
                "vivit_32",
                lambda: build_vivit(ClipGeometry(num_frames=32)),
                992_473_710_592,
                159_007_744,
                606_827_920,
            ),
            ("motionformer", PEERS["motionformer"].build, 369_358_731_264, 30_124_800, 108_554_128),
            ("timesformer", PEERS["timesformer"].build, 195_830_280_192, 44_640_000, 121_566_352),
            ("xvit", PEERS["xvit"].build, 140_573_922_816, 30_273_792, 94_381_456),
        ]
    ],
)
def test_counts_of_the_published_sizes(
    build: Callable[[], nn.Module], macs: int, norm_elements: int, parameters: int
) -> None:
    count, num_parameters = counted(build)
    assert count.macs == macs
    assert count.layer_norm_elements == norm_elements
    assert num_parameters == parameters


@pytest.mark.parametrize(
    ("published_gmacs", "build"),
    [
        (958.8, lambda: build_motionformer(ClipGeometry(image_size=336))),
        (1185.1, lambda: build_motionformer(ClipGeometry(num_frames=32))),
        (850 / 3, lambda: build_xvit(ClipGeometry(num_frames=16, tubelet_size=1))),
    ],
)
def test_counts_of_other_published_geometries(published_gmacs: float, build: Callable[[], nn.Module]) -> None:
    count, _ = counted(build)
    assert count.literature_macs / 1e9 == pytest.approx(published_gmacs, rel=0.01)


@pytest.mark.parametrize(
    ("name", "backbone_macs"),
    [
        ("kcentered_xvit", 140_573_922_816),
        ("kcentered_timesformer", 195_830_280_192),
        # Patches of one frame replace tubelets of two, and there is no layer before the logits.
        ("kcentered_motionformer", 369_358_731_264 - 1568 * 768 * 768 - 768 * 768),
    ],
)
def test_a_sampler_is_counted_apart_from_its_backbone(name: str, backbone_macs: int) -> None:
    count, _ = counted(PEERS[name].build)
    assert count.macs_by_module["sampler"] == 8 * 784**2 * 771
    assert count.macs - count.macs_by_module["sampler"] == backbone_macs


@pytest.mark.parametrize("name", PEERS)
def test_registry_tells_the_clips_shape(name: str) -> None:
    peer = PEERS[name]
    with torch.device("meta"):
        clips, keys, *_ = blank_inputs(peer.build(), 3)
    assert peer.name == name
    assert clips.shape == (3, *peer.clip_shape) and clips.dtype == torch.uint8
    assert keys.shape == (3,)


def test_our_own_models_do_not_load_the_others() -> None:
    code = "import everest_ds.models, sys; sys.exit(any('models.peers' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", SMALL)
def test_a_clip_does_not_depend_on_its_batch(name: str) -> None:
    model = randomized(small(name))
    clips = noise(model)
    together = model(clips, KEYS)
    assert together.shape == (2, NUM_CLASSES)
    assert not torch.allclose(together[0], together[1], atol=1e-2)
    for i in range(2):
        torch.testing.assert_close(model(clips[i : i + 1], KEYS[i : i + 1])[0], together[i])


@pytest.mark.parametrize("name", SMALL)
def test_every_frame_matters(name: str) -> None:
    """Changing any frame, or with a sampler any segment of frames, changes the logits."""
    model = randomized(small(name))
    clips = noise(model, 1)
    before = model(clips, KEYS[:1])
    step = 3 if name.startswith("kcentered") else 1
    for first in range(0, clips.shape[1], step):
        changed = clips.clone()
        changed[:, first : first + step] = 255 - changed[:, first : first + step]
        assert not torch.allclose(model(changed, KEYS[:1]), before, atol=1e-4), first


@pytest.mark.parametrize("name", ["mvit_max", "timesformer", "motionformer", "xvit"])
def test_randomness_of_training_is_the_keys(name: str) -> None:
    model = randomized(small(name)).train()
    keys = torch.arange(32)
    clips = noise(model, 1).expand(len(keys), -1, -1, -1, -1)
    logits = model(clips, keys)
    assert torch.equal(model(clips, keys), logits)
    torch.testing.assert_close(model(clips, keys.flip(0)), logits.flip(0))
    assert len(logits.unique(dim=0)) > 1


@pytest.mark.parametrize("name", SMALL)
def test_learns_real_clips(name: str) -> None:
    model = small(name).eval()  # dropout would mask the decrease of the loss
    frames, side, _, _ = model.clip_shape
    clips = real_clips(ClipGeometry(frames, 1, side), "bikes.mp4", "carphone_pristine.mp4")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(model(clips, KEYS), torch.tensor([1, 3]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # The gradients are those of the last step, as TimeSformer's temporal attention is off in the first.
    still = {path for path, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == (IDLE if "motionformer" in name else set())
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("name", SMALL)
def test_backward_costs_two_forward_passes_but_for_pixels_and_the_sampler(name: str) -> None:
    model = small(name)
    inputs = blank_inputs(model, 2)
    forward = count_forward(model, *inputs).macs_by_module
    step = count_training_step(lambda: model(*inputs).square().mean(), model)
    passes = {"sampler": 1, "embedding": 2, "stem": 2, "": 2}  # ViViT's embedding belongs to ""
    assert step.macs == sum(passes.get(module, 3) * macs for module, macs in forward.items())


def test_drop_path_grows_linearly() -> None:
    assert drop_path_rates(3, 0.2) == pytest.approx([0, 0.1, 0.2])
    assert drop_path_rates(1, 0.2) == [0]
