"""The training step of a plain PyTorch loop, for comparison with the step of DeepSpeed's engine."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from everest_ds.config import Experiment, plan_ranks
from everest_ds.models.initial_weights import outline
from everest_ds.parallel.recompute import apply_recompute
from everest_ds.parallel.sharded_init import DTYPES, InitialWeights
from everest_ds.training.engine_step import MeasuredStep, noise_weights
from everest_ds.training.optimization import parameter_groups


class PlainStep(MeasuredStep):
    """One optimiser step on one device without DeepSpeed, in the same phases as `EngineStep`.

    Weights have the config's precision, with float32 masters in half precision. Gradients accumulate in the
    precision of the weights; fp16 has no loss scale. The optimiser is torch's fused AdamW.

    Attributes:
        model: the model in training.
        optimizer: its optimiser, over the float32 masters if there are any.
    """

    def __init__(
        self,
        config: Experiment,
        device: torch.device,
        weights: InitialWeights | None = None,
        learning_rate: float = 0.0,
    ) -> None:
        super().__init__(config, device, plan_ranks(config, 1).grad_accum_steps, learning_rate, share=0)
        self.model = outline(config).to_empty(device=device).train()
        _copy_weights(self.model, weights or noise_weights(config, device))
        groups = parameter_groups(self.model, config.optimizer)
        apply_recompute(self.model, config.recompute)
        self._weights: list[Tensor] = [weight for group in groups for weight in group["params"]]
        self._half = config.in_half_precision
        if self._half:
            groups = [{**group, "params": [w.detach().clone() for w in group["params"]]} for group in groups]
            self.model.to(DTYPES[config.precision])
        self._masters: list[Tensor] = [master for group in groups for master in group["params"]]
        betas, eps = config.optimizer.betas, config.optimizer.eps
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
        self._max_norm = config.optimizer.clip_grad_norm
        self._trained, self._optimized = self.model, self
        self._passes = 0

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of this micro-batch's share of the step's mean loss."""
        (loss / self.micro_batches if self.micro_batches > 1 else loss).backward()

    @torch.no_grad()
    def update(self) -> bool:
        """Update the weights if this is the last micro-batch; return False, as no update is ever skipped."""
        self._passes += 1
        if self._passes % self.micro_batches == 0:
            if self._half:
                _give_gradients(self._masters, self._weights)
            if self._max_norm is not None:
                nn.utils.clip_grad_norm_(self._masters, self._max_norm)
            self.optimizer.step()
            if self._half:
                torch._foreach_copy_(self._weights, self._masters)
                self.optimizer.zero_grad()
            self.model.zero_grad()
        return False


def _copy_weights(model: nn.Module, weights: InitialWeights) -> None:
    tensors = dict(chain(model.named_parameters(), model.named_buffers()))
    with torch.no_grad():
        for name, whole in weights():
            tensors[name].copy_(whole)


def _give_gradients(masters: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Set the gradient of each master to that of its weight, cast to float32."""
    wide = [torch.empty_like(master) for master in masters]
    torch._foreach_copy_(wide, [weight.grad for weight in weights if weight.grad is not None])
    for master, gradient in zip(masters, wide, strict=True):
        master.grad = gradient
