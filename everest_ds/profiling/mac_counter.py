"""Counted compute: multiply-accumulates (MACs) of a real model, traced operator by operator.

Tracing needs shapes only: on the meta device a ViT-H is counted in seconds, without its weights in memory.
The counts equal the closed-form predictions of costs/compute.py exactly (the tests compare them). Operators
that compute but have no formula are listed, never dropped.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from everest_ds.config.schema import Experiment
from everest_ds.costs.compute import LITERATURE_MACS_PER_NORM_ELEMENT
from everest_ds.data.clip_batches import blank_batch
from everest_ds.models import build_model
from everest_ds.models.tubelets import TubeletEmbedding
from everest_ds.profiling.operator_formulas import computes, layer_norm_elements_of, macs_of

OUTSIDE = ""  # the path of the model itself, and of operators that run outside of it


@dataclass(frozen=True)
class ComputeCount:
    """The compute of one call, by module and by operator.

    Attributes:
        macs_by_module: multiply-accumulates by dotted path of the innermost module that executed them; "" is
            the model itself and everything outside of it.
        macs_by_operator: multiply-accumulates by operator, such as `aten.addmm`.
        layer_norm_elements_by_module: input elements of LayerNorms with gain and bias (forward passes).
        uncounted: number of calls of operators that compute but have no formula, such as `aten.gelu`. Views,
            copies and allocations are left out.
    """

    macs_by_module: dict[str, int]
    macs_by_operator: dict[str, int]
    layer_norm_elements_by_module: dict[str, int]
    uncounted: dict[str, int]

    @property
    def macs(self) -> int:
        """Number of multiply-accumulates, not counting LayerNorm."""
        return sum(self.macs_by_operator.values())

    @property
    def flops(self) -> int:
        """Number of floating-point operations: one multiplication and one addition per MAC."""
        return 2 * self.macs

    @property
    def layer_norm_elements(self) -> int:
        """Number of input elements of all LayerNorms with gain and bias."""
        return sum(self.layer_norm_elements_by_module.values())

    @property
    def literature_macs(self) -> int:
        """Number that papers print as GFLOPs: MACs plus 5 per LayerNorm element (fvcore's rule)."""
        return self.macs + LITERATURE_MACS_PER_NORM_ELEMENT * self.layer_norm_elements


@dataclass(frozen=True)
class ExperimentCount:
    """The counted compute of an experiment's model on `batch_size` clips.

    Attributes:
        batch_size: number of clips.
        num_parameters: number of trainable parameters.
        forward: one forward pass in evaluation mode.
        training_step: one forward and backward pass, without recomputation.
        embed_all_macs: embedding of all tokens once, as in the published systems; the model does not do this.
    """

    batch_size: int
    num_parameters: int
    forward: ComputeCount
    training_step: ComputeCount
    embed_all_macs: int

    @property
    def literature_macs(self) -> int:
        """MACs of one forward pass in the published systems, plus 5 per LayerNorm element.

        Those systems embed all tokens once and use the embedding both for scoring and for the encoder.
        """
        parts = macs_by_part(self.forward)
        return self.forward.literature_macs - parts["score"] - parts["embed"] + self.embed_all_macs


def count_forward(model: nn.Module, *inputs: Any) -> ComputeCount:
    """Count the compute of a forward pass of `model` in evaluation mode, without gradients, on any device."""
    with _in_evaluation(model), torch.no_grad():
        return _count(lambda: model(*inputs), model)


def count_training_step(call: Callable[[], Tensor], model: nn.Module) -> ComputeCount:
    """Count the compute of one forward and backward pass.

    Args:
        call: a function that runs the forward pass and returns the loss.
        model: the model whose module paths label the counts. Its gradients are restored afterwards.
    """
    before = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    try:
        return _count(lambda: call().backward(), model)
    finally:
        for parameter, gradient in zip(model.parameters(), before, strict=True):
            parameter.grad = gradient


def count_experiment(config: Experiment, batch_size: int = 1) -> ExperimentCount:
    """Count the compute of the experiment's model, built on the meta device without weights or pixels.

    Activation recomputation is not applied, since repeated work is not counted. A ViT-H takes seconds.
    """
    with torch.device("meta"):
        model, batch = build_model(config), blank_batch(config, batch_size)
        embed = TubeletEmbedding(config.model.geometry, config.model.shape.encoder.width)
        tubelets_BNP = torch.empty(batch_size, config.model.geometry.num_tokens, embed.in_features).byte()

    def loss() -> Tensor:
        output = model(*batch.arguments)
        return output.loss if config.task == "pretrain" else F.cross_entropy(output, batch.label)

    return ExperimentCount(
        batch_size=batch_size,
        num_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        forward=count_forward(model, *batch.arguments),
        training_step=count_training_step(loss, model),
        embed_all_macs=_count(lambda: embed()(tubelets_BNP), embed).macs,
    )


# Module path -> part of `ComputePrediction` (costs/compute.py); the longest matching path decides.
_PARTS = {
    "selector": "score",
    "encoder": "embed",
    "encoder.blocks": "encoder",
    "to_decoder": "projection",
    "decoder": "decoder",
    "head": "head",
}


def macs_by_part(count: ComputeCount) -> dict[str, int]:
    """Return MACs by the parts of costs/compute.py's `ComputePrediction`: score, embed, encoder, ..., head.

    The encoder's operators outside of its blocks count as embedding.
    """
    macs = dict.fromkeys(_PARTS.values(), 0)
    for module, done in count.macs_by_module.items():
        containing = [path for path in _PARTS if f"{module}.".startswith(f"{path}.")]
        macs[_PARTS[max(containing, key=len)]] += done
    return macs


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training


def _count(call: Callable[[], object], model: nn.Module) -> ComputeCount:
    with RunningModule(model) as running, _CountingMode(running) as counts:
        call()
    return ComputeCount(
        macs_by_module=dict(counts.by_module),
        macs_by_operator=dict(counts.by_operator),
        layer_norm_elements_by_module=dict(counts.norms),
        uncounted=dict(counts.uncounted),
    )


class _CountingMode(TorchDispatchMode):
    """A dispatch mode that adds up the MACs of every operator, including those of the backward pass."""

    def __init__(self, running: RunningModule) -> None:
        super().__init__()
        self._running = running
        self.by_module: Counter[str] = Counter()
        self.by_operator: Counter[str] = Counter()
        self.norms: Counter[str] = Counter()
        self.uncounted: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = macs_of(func)
        if formula is None:
            # In inference mode, composite operators such as linear are dispatched without being decomposed.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        module, out = self._running.now(), func(*args, **kwargs)
        if formula is not None:
            macs = formula(out, *args)
            self.by_module[module] += macs
            self.by_operator[str(func.overloadpacket)] += macs
        elif (elements := layer_norm_elements_of(func, args)) is not None:
            self.norms[module] += elements
        elif computes(func):
            self.uncounted[str(func.overloadpacket)] += 1
        return out


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
