"""Tests against the released code of EVEREST and VideoMAE: outputs, losses, gradients and kept tokens.

The tests need clones, whose paths are in EVEREST_CODE and VIDEOMAE_CODE. The released code runs unchanged on
the weights and clips of EVEREST-DS; only its random choice of visible tokens is replaced.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peers import REPOSITORIES, Peer, copy_weights, in_our_layout, load_peer, their_name, to_video
from torch import Tensor, nn

from everest_ds.config import Experiment
from everest_ds.models import build_model
from tests.models import experiment, random_clips

VIDEOS = Path(__file__).parents[3] / "shared" / "data" / "videos"
BACKBONES = ("vit_small", "vit_base")
KEY = torch.tensor([12345])
LABEL = torch.tensor([3])
KEEP = {"pretrain": 0.3, "finetune": 0.6}
NUM_TOKENS = 1568
# Largest allowed difference, relative to the largest value, in float32 (unit roundoff 6e-8). Another order of
# summation changes outputs by 7e-7 and gradients by up to 3e-6.
OUTPUT_TOLERANCE = 5e-6
GRADIENT_TOLERANCE = 2e-5
LOSS_TOLERANCE = 2e-6

pytestmark = pytest.mark.slow


def clone_of(name: str) -> Path:
    variable = f"{name.upper()}_CODE"
    if variable not in os.environ:
        pytest.skip(f"git clone {REPOSITORIES[name]} and set {variable} to that folder")
    return Path(os.environ[variable])


def full_size(task: str, selection: str, backbone: str) -> Experiment:
    return experiment(
        task, selection, keep_ratio=KEEP[task], backbone=backbone, num_frames=16, image_size=224
    )


def clip_for(config: Experiment) -> Tensor:
    """Return a uint8 clip (1, 16, 224, 224, 3): of a real video if there is one, else noise."""
    video = VIDEOS / "bikes.mp4"
    if not video.is_file() or importlib.util.find_spec("decord") is None:
        return random_clips(config, 1)
    import decord

    reader = decord.VideoReader(str(video), num_threads=1)
    frames = reader.get_batch(np.arange(16) * 4 % len(reader)).asnumpy()
    top, left = (frames.shape[1] - 224) // 2, (frames.shape[2] - 224) // 2
    return torch.from_numpy(frames[None, :, top : top + 224, left : left + 224].copy())


def randomize(model: nn.Module) -> None:
    """Perturb all parameters, because a swap of two biases at 0 or two gains at 1 would go unnoticed."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def pair(name: str, config: Experiment) -> tuple[nn.Module, Peer]:
    """Build the EVEREST-DS model and the released model with equal weights."""
    peer = load_peer(name, clone_of(name), config)
    torch.manual_seed(0)
    ours = build_model(config)
    randomize(ours)
    copy_weights(ours, peer.model, config.task)
    return ours, peer


def hidden(shown_BK: Tensor) -> Tensor:
    """Return the hidden tokens as a mask for the released code: bool (B, N), False at `shown_BK`."""
    return torch.ones(len(shown_BK), NUM_TOKENS, dtype=torch.bool).scatter(1, shown_BK, False)


def capture(results: list[Any], module: nn.Module) -> None:
    module.register_forward_hook(lambda _, __, output: results.append(output))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    """Check that two tensors differ by at most `tolerance` times the largest value."""
    difference = (actual - expected).abs().max().item() / expected.abs().max().item()
    assert difference < tolerance, f"{name}: differs by {difference:.2g} of its largest value"


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, task: str) -> None:
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        expected, actual = gradients.pop(their_name(name, task)), parameter.grad
        assert expected is not None and actual is not None, name
        assert_close(actual, in_our_layout(expected, actual), GRADIENT_TOLERANCE, name)
    assert not gradients


def kept_by(ours: nn.Module, config: Experiment, clip: Tensor) -> Tensor:
    """Return the token indices (1, K) that the classifier passes to its encoder."""
    seen: list[Tensor] = []
    shape = (1, config.token_counts.num_kept)
    hook = ours.get_submodule("encoder").register_forward_pre_hook(
        lambda _, args: seen.extend(a for a in args if isinstance(a, Tensor) and a.shape == shape)
    )
    with torch.no_grad():
        ours(clip, KEY)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(("name", "selection"), [("everest", "rero"), ("videomae", "tube")])
def test_pretraining_outputs_loss_and_gradients(
    name: str, selection: str, backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = full_size("pretrain", selection, backbone)
    ours, peer = pair(name, config)
    clip = clip_for(config)
    output = ours(clip, KEY)
    masks = hidden(output.visible_BV), hidden(output.predicted_BM)
    batch = peer.prepare(clip, None)
    if name == "everest":
        monkeypatch.setattr(peer.model.encoder, "mcm_step", lambda *_: masks)
    else:
        assert batch.hidden_BN is not None
        batch.hidden_BN.copy_(masks[0])
    theirs: list[Any] = []
    capture(theirs, peer.model.get_submodule("decoder"))
    loss = peer.loss(batch)
    # the released code returns predictions in ascending order of the tokens
    in_order = output.prediction_BMP[0, output.predicted_BM[0].argsort()]
    assert_close(in_order, theirs[0][0], OUTPUT_TOLERANCE, "prediction")
    torch.testing.assert_close(output.loss, loss, rtol=LOSS_TOLERANCE, atol=0)
    output.loss.backward()
    loss.backward()
    assert_same_gradients(ours, peer.model, "pretrain")


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(("name", "selection"), [("everest", "rero"), ("videomae", "none")])
def test_fine_tuning_logits_loss_and_gradients(
    name: str, selection: str, backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = full_size("finetune", selection, backbone)
    ours, peer = pair(name, config)
    clip = clip_for(config)
    if name == "everest":
        mask = hidden(kept_by(ours, config, clip))
        monkeypatch.setattr(peer.model, "mcm_step", lambda *_: mask)
    theirs: list[Any] = []
    capture(theirs, peer.model)
    loss = peer.loss(peer.prepare(clip, LABEL))
    logits = ours(clip, KEY)
    assert_close(logits, theirs[0], OUTPUT_TOLERANCE, "logits")
    own_loss = F.cross_entropy(logits, LABEL)
    torch.testing.assert_close(own_loss, loss, rtol=LOSS_TOLERANCE, atol=0)
    own_loss.backward()
    loss.backward()
    assert_same_gradients(ours, peer.model, "finetune")


def test_the_released_counts_in_floating_point_are_the_exact_ones_at_full_size() -> None:
    """The released `int((1 - ratio) * N)` equals the count in exact arithmetic."""
    pretrain = full_size("pretrain", "rero", "vit_small").token_counts
    assert (pretrain.num_kept, pretrain.num_visible) == (int((1 - 0.7) * 1568), int((1 - 0.9) * 1568))
    assert (pretrain.num_kept, pretrain.num_visible) == (470, 156)
    assert full_size("finetune", "rero", "vit_small").token_counts.num_kept == int((1 - 0.4) * 1568) == 940


def borderline(peer: Peer, clip: Tensor, tokens: set[int], num_kept: int) -> bool:
    """Return whether `tokens` are as important as the last kept token, to within 1e-5 in float64."""
    projection = next(m for m in peer.model.modules() if isinstance(m, nn.Conv3d))
    weight = projection.weight.detach().double()
    video = F.conv3d(to_video(clip).double(), weight, stride=projection.stride)
    change = video.diff(dim=2).norm(dim=1).flatten(2)
    importance = torch.cat([change[:, :1], change], dim=1).flatten()
    threshold = importance.sort(descending=True).values[num_kept - 1]
    return all(abs(importance[token] - threshold) < 1e-5 * threshold for token in tokens)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_released_selection_keeps_the_same_tokens(task: str, backbone: str) -> None:
    config = full_size(task, "rero", backbone)
    ours, peer = pair("everest", config)
    clip = clip_for(config)
    masks: list[Any] = []
    chooser: Any = peer.model.encoder if task == "pretrain" else peer.model
    released = chooser.mcm_step

    def choose(*args: Any) -> Any:
        masks.append(released(*args))
        return masks[0]

    chooser.mcm_step = choose
    with torch.no_grad():
        peer.loss(peer.prepare(clip, LABEL))
        output = ours(clip, KEY)
    if task == "pretrain":  # the split of the kept tokens is random, so only their union is compared
        theirs_N = ~masks[0][0][0] | ~masks[0][1][0]
        kept = torch.cat([output.visible_BV, output.predicted_BM], dim=1)
    else:
        theirs_N, kept = ~masks[0][0], kept_by(ours, config, clip)
    theirs, mine = set(theirs_N.nonzero().flatten().tolist()), set(kept[0].tolist())
    assert len(theirs) == len(mine) == {"pretrain": 470, "finetune": 940}[task]
    assert len(theirs ^ mine) <= 4
    assert borderline(peer, clip, theirs ^ mine, len(mine))
