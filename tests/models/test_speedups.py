"""Tests of training with all optimisations against a plain implementation.

The plain implementation embeds every tubelet of normalised pixels with gradient, compares whole embeddings,
stores both attention matrices, builds every target, and gathers tokens only at the end.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from everest_ds.config import Experiment
from everest_ds.models import PretrainModel, build_model
from everest_ds.models.selection.masks import split_kept
from everest_ds.models.selection.rero import select_tokens
from everest_ds.models.tubelets import PIXEL_MEAN, PIXEL_STD, to_tubelets
from everest_ds.parallel.recompute import apply_recompute
from tests.models import experiment, random_clips

STEPS = 50


def plain_loss(model: PretrainModel, clip: Tensor, keys: Tensor, config: Experiment) -> Tensor:
    counts, places = config.token_counts, config.model.geometry.tokens_per_slot
    pixels = to_tubelets(clip, config.model.geometry).unflatten(-1, (-1, 3)) / 255
    normal = ((pixels - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)).flatten(-2)
    embedded = F.linear(normal, model.encoder.embed.weight, model.encoder.embed.bias)
    change = (embedded[:, places:] - embedded[:, :-places]).norm(dim=-1).detach()
    keep = select_tokens(torch.cat([change[:, :places], change], dim=1), counts.num_kept)
    visible, predicted = split_kept(keep, counts.num_visible, keys)
    rows = torch.arange(len(clip))[:, None]
    x = model.encoder.blocks((embedded + model.encoder.positions)[rows, visible], keys)
    prediction = model.decode(model.to_decoder(model.norm(x)), visible, predicted, keys)
    targets = (pixels - pixels.mean(-2, keepdim=True)) / (pixels.std(-2, keepdim=True) + 1e-6)
    return (prediction - targets.flatten(-2)[rows, predicted]).square().mean()


def losses(config: Experiment, *, plain: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the losses of 50 training steps over five recurring batches."""
    torch.manual_seed(0)
    model = build_model(config).to(dtype)
    assert isinstance(model, PretrainModel)
    apply_recompute(model, config.recompute)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, foreach=False, fused=not plain)
    curve = []
    for step in range(STEPS):
        clips, keys = random_clips(config, 4, seed=step % 5), torch.arange(4) + 4 * step
        loss = plain_loss(model, clips, keys, config) if plain else model(clips, keys).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.detach())
    return torch.stack(curve)


def config_with(attention: str, recompute: str = "none") -> Experiment:
    config = experiment("pretrain", "rero", 0.4, attention=attention)
    return Experiment.model_validate({**config.model_dump(), "recompute": {"mode": recompute}})


@pytest.fixture(scope="module")
def plain_curve() -> Tensor:
    curve = losses(config_with("unfused"), plain=True)
    assert curve[-5:].mean() < 0.97 * curve[:5].mean()  # the model learns: a flat curve would prove nothing
    return curve


def test_fifty_steps_of_the_sparse_path_are_those_of_the_plain_one(plain_curve: Tensor) -> None:
    fast = losses(config_with("fused", recompute="mlp"), plain=False)
    torch.testing.assert_close(fast, plain_curve, rtol=1e-4, atol=0)


def test_fifty_steps_in_bfloat16_stay_near_the_plain_curve(plain_curve: Tensor) -> None:
    fast = losses(config_with("fused"), plain=False, dtype=torch.bfloat16)
    torch.testing.assert_close(fast, plain_curve, rtol=0.02, atol=0)
