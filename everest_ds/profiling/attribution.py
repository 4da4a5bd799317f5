"""Attribution of operators to the modules of a model, in the forward pass and in the backward pass."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import torch
from torch import nn

OUTSIDE = ""  # the path of the model itself, and of operators that run outside of it


class RunningModule:
    """A context that tracks the innermost module of `model` that is running.

    In the forward pass, this is the module whose `forward` was entered last. In the backward pass, it is the
    module that created the running autograd node: autograd numbers nodes in the order of their creation, so
    the numbers at which the running module changed map each node to its module. Unlike tensor hooks, this
    also works through custom functions and recomputation. Recomputation is supported only where the backward
    pass runs in the thread of the forward pass, as on CPU and meta devices, since each thread numbers its
    own nodes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._paths = {module: path for path, module in model.named_modules()}
        self._entered = [OUTSIDE]
        self._first_nodes = [0]  # ascending; nodes from `_first_nodes[i]` on are made by `_makers[i]`
        self._makers = [OUTSIDE]
        self._hooks: list[Any] = []

    def now(self) -> str:
        """Return the dotted path of the running module.

        Call this at every operator, or a change of module may be missed.
        """
        path, node = self._entered[-1], torch._C._current_autograd_node()
        # Within a backward pass, more than one entered path means that a module is being recomputed.
        if node is not None and len(self._entered) == 1:
            path = self._makers[bisect_right(self._first_nodes, node._sequence_nr()) - 1]
        next_node = torch._C._autograd._get_sequence_nr()
        # A smaller node number comes from another thread, which numbers its own nodes.
        if path != self._makers[-1] and next_node >= self._first_nodes[-1]:
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
