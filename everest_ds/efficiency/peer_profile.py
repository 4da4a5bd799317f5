"""The compute and memory of a peer system at its published size, counted on its traced model."""

from __future__ import annotations

import torch
from torch import Tensor

from everest_ds.efficiency.peers import Peer, blank_inputs
from everest_ds.profiling.compute_tables import GIGA, Table, count_details, rows_beside, traced_figures
from everest_ds.profiling.mac_counter import count_forward, count_training_step
from everest_ds.profiling.memory_tables import sum_of_tensors, traced_tables
from everest_ds.profiling.memory_trace import trace_memory


def profile_peer(peer: Peer) -> dict[str, Table]:
    """Return tables `compute`, `by_module`, `by_operator` and `not_counted` of a peer system.

    The system has its published size; nothing is predicted.
    """
    with torch.device("meta"):
        model = peer.build()
        inputs = blank_inputs(model)

    def loss() -> Tensor:
        output: Tensor = model(*inputs)
        return output.sum()

    forward, training = count_forward(model, *inputs), count_training_step(loss, model)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    traced = traced_figures(trainable, forward, training)
    if peer.views > 1:
        label = f"forward, {peer.views} views as published: literature's GFLOPs"
        traced[label] = peer.views * forward.literature_macs / GIGA
    return {"compute": rows_beside("figure", {"counted": traced}), **count_details(forward, training)}


def memory_of_peer(peer: Peer) -> dict[str, Table]:
    """Return tables `memory`, `memory_peak_at` and `memory_over_time` of a peer system, without predictions.

    The step runs on one clip in float32.
    """
    with torch.device("meta"):
        shapes = blank_inputs(peer.build())
    traced = trace_memory(
        peer.build, lambda: [torch.empty_like(shape, device="cpu") for shape in shapes], sum_of_tensors
    )
    return traced_tables({}, traced)
