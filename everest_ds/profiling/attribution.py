"""Which module of a model an operator runs for, in the forward pass and in the backward pass."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import torch
from torch import nn

OUTSIDE = ""  # the path of the model itself, and of what runs outside of it


class RunningModule:
    """Follows the innermost module of `model` that is at work, while entered as a context.

    In the forward pass that is the one whose `forward` was entered last. In the backward pass it is the one
    that made the running autograd node: autograd numbers nodes in the order that it makes them, so the
    numbers at which the module changed tell whose a node is. This sees through custom functions and
    recomputation, where hooks on tensors would not. Recomputation only where the backward pass runs in the
    thread of the forward pass, as on CPU and meta devices: each thread numbers its own nodes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._paths = {module: path for path, module in model.named_modules()}
        self._entered = [OUTSIDE]
        self._first_nodes = [0]  # ascending; nodes from `_first_nodes[i]` on are made by `_makers[i]`
        self._makers = [OUTSIDE]
        self._hooks: list[Any] = []

    def now(self) -> str:
        """Dotted path of the module at work. To be asked at every operator, or it may miss a change."""
        path, node = self._entered[-1], torch._C._current_autograd_node()
        if node is not None and len(self._entered) == 1:  # else a forward pass, repeated in the backward pass
            path = self._makers[bisect_right(self._first_nodes, node._sequence_nr()) - 1]
        next_node = torch._C._autograd._get_sequence_nr()
        if path != self._makers[-1] and next_node >= self._first_nodes[-1]:  # less: another thread
            self._first_nodes.append(next_node)
            self._makers.append(path)
        return path

    def __enter__(self) -> RunningModule:
        for module in self._paths:
            self._hooks.append(module.register_forward_pre_hook(self._enter))
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._entered.append(self._paths[module])
        self.now()

    def _leave(self, module: nn.Module, _: Any, __: Any) -> None:
        self._entered.pop()
        self.now()
