"""Counted compute: multiply-accumulates (MACs) of what really runs, traced operator by operator.

Tracing needs shapes only: on the meta device a ViT-H is counted in seconds, without its weights in memory.
What `compute.py` predicts in closed form must come out here to the last integer (tests hold the two
together). An operator that computes but has no formula is listed, never dropped.
"""

from __future__ import annotations

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
from everest_ds.models import build_model
from everest_ds.models.tubelets import TubeletEmbedding
from everest_ds.profiling.attribution import RunningModule
from everest_ds.profiling.compute import LITERATURE_MACS_PER_NORM_ELEMENT
from everest_ds.profiling.operators import computes, layer_norm_elements_of, macs_of


@dataclass(frozen=True)
class ComputeCount:
    """What one call computed.

    Attributes:
        macs_by_module: multiply-accumulates by dotted path of the innermost module that did them; "" for
            those of the model itself and outside of it.
        macs_by_operator: the same by operator, such as `aten.addmm`.
        layer_norm_elements_by_module: input elements of LayerNorms with gain and bias (forward passes).
        uncounted: calls of operators that compute but have no formula, such as `aten.gelu`. Views, copies
            and allocations are left out.
    """

    macs_by_module: dict[str, int]
    macs_by_operator: dict[str, int]
    layer_norm_elements_by_module: dict[str, int]
    uncounted: dict[str, int]

    @property
    def macs(self) -> int:
        """All multiply-accumulates, LayerNorm not counted."""
        return sum(self.macs_by_operator.values())

    @property
    def flops(self) -> int:
        """Floating-point operations: a multiplication and an addition for each MAC."""
        return 2 * self.macs

    @property
    def layer_norm_elements(self) -> int:
        """Input elements of all LayerNorms with gain and bias."""
        return sum(self.layer_norm_elements_by_module.values())

    @property
    def literature_macs(self) -> int:
        """What papers print as GFLOPs: MACs and 5 for each LayerNorm element (fvcore's rule)."""
        return self.macs + LITERATURE_MACS_PER_NORM_ELEMENT * self.layer_norm_elements


@dataclass(frozen=True)
class ExperimentCount:
    """What our model of an experiment computes, on `batch_size` clips.

    Attributes:
        batch_size: clips.
        num_parameters: trainable parameters.
        forward: one forward pass in evaluation mode.
        training_step: one forward and backward pass, nothing recomputed.
        embed_all_macs: embedding of all tokens once, as the published systems do; not a part of ours.
    """

    batch_size: int
    num_parameters: int
    forward: ComputeCount
    training_step: ComputeCount
    embed_all_macs: int

    @property
    def literature_macs(self) -> int:
        """One forward pass as the published systems compute it, 5 for each LayerNorm element.

        All tokens are embedded, once: for scoring and for the encoder alike.
        """
        parts = macs_by_part(self.forward)
        return self.forward.literature_macs - parts["score"] - parts["embed"] + self.embed_all_macs


def count_forward(model: nn.Module, *inputs: Any) -> ComputeCount:
    """Count one forward pass of `model` in evaluation mode, without gradient, on any device."""
    with _in_evaluation(model), torch.no_grad():
        return _count(lambda: model(*inputs), model)


def count_training_step(call: Callable[[], Tensor], model: nn.Module) -> ComputeCount:
    """Count one forward and backward pass.

    Args:
        call: runs the forward pass and returns the loss.
        model: what the modules' paths are of. Its gradients are as before afterwards.
    """
    before = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    try:
        return _count(lambda: call().backward(), model)
    finally:
        for parameter, gradient in zip(model.parameters(), before, strict=True):
            parameter.grad = gradient


def count_experiment(config: Experiment, batch_size: int = 1) -> ExperimentCount:
    """Count the experiment's own model, built on the meta device: no weights, no pixels, seconds for a ViT-H.

    Recompute is not applied: it repeats work, and repeated work is not counted.
    """
    geometry = config.candidate_geometry
    side = geometry.image_size
    with torch.device("meta"):
        model = build_model(config)
        clip_BFHWC = torch.empty(batch_size, geometry.num_frames, side, side, 3, dtype=torch.uint8)
        key_B, label_B = (torch.empty(batch_size, dtype=torch.int64) for _ in range(2))

    def loss() -> Tensor:
        output = model(clip_BFHWC, key_B)
        return output.loss if config.task == "pretrain" else F.cross_entropy(output, label_B)

    return ExperimentCount(
        batch_size=batch_size,
        num_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        forward=count_forward(model, clip_BFHWC, key_B),
        training_step=count_training_step(loss, model),
        embed_all_macs=_count_embed_all(config, batch_size).macs,
    )


def _count_embed_all(config: Experiment, batch_size: int) -> ComputeCount:
    geometry, width = config.model.geometry, config.model.shape.encoder.width
    with torch.device("meta"):
        embed = TubeletEmbedding(geometry, width)
        tubelets_BNP = torch.empty(batch_size, geometry.num_tokens, geometry.tubelet_values).byte()
    return _count(lambda: embed()(tubelets_BNP), embed)


# Module path -> part, as `compute.ComputePrediction` names them; the longest path that fits decides.
_PARTS = {
    "selector": "score",
    "encoder": "embed",
    "encoder.blocks": "encoder",
    "to_decoder": "projection",
    "decoder": "decoder",
    "head": "head",
}


def macs_by_part(count: ComputeCount) -> dict[str, int]:
    """MACs of our own model by the parts of `compute.ComputePrediction`: score, embed, encoder, ..., head.

    The encoder's own operators, outside of its blocks, embed the tokens that it sees.
    """
    macs = dict.fromkeys(_PARTS.values(), 0)
    for module, done in count.macs_by_module.items():
        macs[_PARTS[max((path for path in _PARTS if _lies_in(module, path)), key=len)]] += done
    return macs


def _lies_in(module: str, path: str) -> bool:
    return module == path or module.startswith(path + ".")


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
    """Sees every operator below autograd, those of the backward pass included, and books its MACs."""

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
            with self:  # in inference mode composite operators, such as linear, arrive in one piece
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
