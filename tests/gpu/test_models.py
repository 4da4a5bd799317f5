"""Tests of the models on a CUDA device: no synchronisation, capture as a CUDA graph, results as on a CPU."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import ON_CUDA
from tests.models import TASKS_AND_SELECTIONS, built, experiment, loss_of, random_clips

pytestmark = ON_CUDA
KEYS = torch.tensor([101, 202])
every_mode = pytest.mark.parametrize(("task", "selection"), TASKS_AND_SELECTIONS)


@every_mode
def test_no_forward_or_backward_pass_waits_for_the_device(task: str, selection: str) -> None:
    config = experiment(task, selection, drop_path=0.1)
    model, clips, keys = built(config).cuda(), random_clips(config, 2).cuda(), KEYS.cuda()
    loss_of(model(clips, keys)).backward()  # libraries may synchronise in the first step
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(model(clips, keys)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_mode
def test_a_step_replays_as_a_cuda_graph(task: str, selection: str) -> None:
    """A step captured once can be replayed on other clips: shapes are static, and the host reads no value."""
    config = experiment(task, selection, drop_path=0.1)
    model, clips, keys = built(config).cuda(), random_clips(config, 2).cuda(), KEYS.cuda()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries must initialise outside the capture
            loss_of(model(clips, keys)).backward()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_of(model(clips, keys))
        captured.backward()
    for seed in (1, 2):
        clips.copy_(random_clips(config, 2, seed))
        keys.add_(seed)
        graph.replay()
        torch.testing.assert_close(captured, loss_of(model(clips, keys)))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_loss_and_gradients_are_those_of_a_cpu(task: str, dtype: torch.dtype, bound: float) -> None:
    """Loss and gradients agree with float32 on a CPU for the same kept tokens.

    The kept tokens are given, because devices may break near ties between scores differently.
    """
    config = experiment(task, "rero")
    clips, num_kept = random_clips(config, 2), config.token_counts.num_kept
    kept = torch.stack([torch.randperm(config.model.geometry.num_tokens)[:num_kept].sort().values] * 2)
    reference, model = built(config), built(config).to("cuda", dtype)
    expected, loss = (
        loss_of(net(clips.to(device), KEYS.to(device), kept.to(device)))
        for net, device in ((reference, "cpu"), (model, "cuda"))
    )
    expected.backward()
    loss.backward()
    assert float(loss) == pytest.approx(float(expected), rel=bound)
    for (name, ours), cpu in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None and cpu.grad is not None, name
        difference = (ours.grad.cpu().float() - cpu.grad).norm() / cpu.grad.norm()
        assert difference < 3 * bound, name
