"""Initial weights drawn one module at a time, so that no process needs memory for a whole model.

Every module that owns tensors fills them in its `reset_parameters`, as is PyTorch's convention, and its
constructor calls this method after the constructors of its children. Visiting the modules in the same order
draws the same numbers as `build_model`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from everest_ds.config.schema import Experiment
from everest_ds.models import build_model

NamedTensor = tuple[str, Tensor]


def outline(config: Experiment) -> nn.Module:
    """Build the experiment's model on the meta device: names and shapes that take no memory."""
    with torch.device("meta"):
        return build_model(config)


def draw_initial_weights(config: Experiment) -> Iterator[NamedTensor]:
    """Yield all parameters and buffers by name, equal to those of `build_model` seeded with `run.seed`.

    The tensors of a module are freed when the next module is drawn, unless the caller keeps them. The random
    state of the process does not change.
    """
    random_state = torch.Generator().manual_seed(config.run.seed).get_state()
    for path, module in _children_first(outline(config)):
        if not _own_tensors(module):
            continue
        module.to_empty(device="cpu", recurse=False)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(random_state)
            module.reset_parameters()
            random_state = torch.get_rng_state()
        for name, tensor in _own_tensors(module):
            yield f"{path}{name}", tensor.detach()
        module.to_empty(device="meta", recurse=False)


def _children_first(module: nn.Module, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, child in module.named_children():
        yield from _children_first(child, f"{path}{name}.")
    yield path, module


def _own_tensors(module: nn.Module) -> list[NamedTensor]:
    return list(chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)))
