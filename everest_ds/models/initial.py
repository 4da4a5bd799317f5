"""Initial weights one module at a time, so that no process needs memory for a whole model.

Every module that has tensors of its own fills them in its `reset_parameters`, PyTorch's name for that; its
constructor calls it after those of its children. Going through the modules in that order, the numbers drawn
are those of `build_model`, bit for bit.
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
    """The model that the experiment trains, on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return build_model(config)


def draw(config: Experiment) -> Iterator[NamedTensor]:
    """Parameters and buffers by name, as `torch.manual_seed(run.seed)` and `build_model` would make them.

    A module's tensors live until the next module's are asked for, unless the caller keeps them. The process's
    generator stays as it is.
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
