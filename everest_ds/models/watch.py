"""Recorder of the tokens that a model selects and attends to, for visualisation.

Shape legend: B clips, F frames, H x W pixels, S candidate slots, T slots, h x w tokens of one slot, N = T·h·w
tokens, n of them in the encoder, M predicted, P values of one tubelet.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from everest_ds.models.attention import attention_weights
from everest_ds.models.selection.selector import Selector, TokenSplit
from everest_ds.models.tubelets import from_tubelets, gather_tokens, to_tubelets
from everest_ds.models.vit import Attention


class Seen(NamedTuple):
    """Record of one forward pass: the clips and the tokens that the model used, on the host.

    Attributes:
        clip_BFHWC: uint8, the frames of the selected slots.
        kept_BThw: bool, True for tokens that are encoded or predicted.
        visible_BThw: bool, True for tokens that are encoded.
        attention_BThw: float32, share of each encoded token in the mean of the encoder's output, by attention
            rollout; 0 for the other tokens; the sum is 1.
        counts_BS: number of ReRo tokens in each candidate slot, by which IIFS draws. Without IIFS, the number
            of kept tokens.
        slots_BT: indices of the selected slots.
        restored_BFHWC: uint8, the clip with its predicted tokens replaced by the model's predictions; None in
            fine-tuning.
    """

    clip_BFHWC: Tensor
    kept_BThw: Tensor
    visible_BThw: Tensor
    attention_BThw: Tensor
    counts_BS: Tensor
    slots_BT: Tensor
    restored_BFHWC: Tensor | None


class Watch:
    """Context manager that records one forward pass of `model`, for the first clips of its batch.

    Args:
        model: a `PretrainModel` or a `Classifier`, possibly compiled or sharded: all values are taken by
            hooks on its own modules. Under tensor parallelism, the attention is that of this rank's heads.
        num_clips: largest number of clips to record.
    """

    def __init__(self, model: Any, num_clips: int = 1) -> None:
        self._selector: Selector = model.selector
        self._attentions = [m for m in model.encoder.modules() if isinstance(m, Attention)]
        self._normalized = getattr(model, "normalize_targets", False)
        self._num_clips = num_clips
        self._hooks = ExitStack()
        self._weights_Bnn: list[Tensor] = []  # per block, the mean over its heads
        self._selection: TokenSplit
        self._counts_BS: Tensor

    def __enter__(self) -> Watch:
        handles = [self._selector.register_forward_hook(self._on_selection)]
        handles += [one.qkv.register_forward_hook(self._on_attention(one)) for one in self._attentions]
        for handle in handles:
            self._hooks.callback(handle.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()

    def seen(self, output: Any = None) -> Seen:
        """Return the record of the forward pass.

        Args:
            output: output of the model; needed in pre-training, since it holds the predictions.
        """
        pixels_BNP, slots_BT, visible_BV, predicted_BM = self._selection
        geometry = self._selector.geometry
        visible, predicted = (self._grid(index) for index in (visible_BV, predicted_BM))
        share_Bn = _rollout(self._weights_Bnn)
        attention_BN = torch.zeros(pixels_BNP.shape[:2], device=share_Bn.device).scatter(
            1, visible_BV, share_Bn
        )
        restored = None
        if predicted_BM.shape[1]:
            restored = from_tubelets(self._restore(output.prediction_BMP), geometry).cpu()
        return Seen(
            from_tubelets(pixels_BNP, geometry).cpu(),
            visible | predicted,
            visible,
            self._in_grid(attention_BN),
            self._counts_BS.cpu(),
            slots_BT.cpu(),
            restored,
        )

    def _on_selection(self, selector: nn.Module, inputs: tuple[Any, ...], selection: TokenSplit) -> None:
        self._selection = TokenSplit(*(tensor[: self._num_clips].detach() for tensor in selection))
        clip, embedding = inputs[0][: self._num_clips], inputs[1]
        if self._selector.candidates == self._selector.geometry:
            index = torch.cat(self._selection[2:], dim=1)
            self._counts_BS = self._grid(index).flatten(2).sum(dim=2)
        else:
            candidates = to_tubelets(clip, self._selector.candidates)
            self._counts_BS = self._selector.count_tokens(candidates, embedding)

    def _on_attention(self, attention: Attention) -> Any:
        def record(module: nn.Module, inputs: tuple[Any, ...], qkv_Bnx: Tensor) -> None:
            qkv = qkv_Bnx[: self._num_clips].detach().unflatten(-1, (3, -1, attention.head_width))
            self._weights_Bnn.append(attention_weights(qkv.float()).mean(dim=1))

        return record

    def _restore(self, prediction_BMP: Tensor) -> Tensor:
        """Replace the predicted tubelets by the predictions, as uint8 (B, N, P).

        Predictions of normalised pixels are first scaled by the true mean and deviation of their tubelet, as
        VideoMAE does.
        """
        pixels_BNP, index_BM = self._selection.pixels_BNP, self._selection.predicted_BM
        guess = prediction_BMP[: self._num_clips].detach().float()
        if self._normalized:
            truth = gather_tokens(pixels_BNP, index_BM).unflatten(-1, (-1, 3)).float() / 255
            mean, std = truth.mean(dim=-2, keepdim=True), truth.std(dim=-2, keepdim=True) + 1e-6
            guess = (guess.unflatten(-1, (-1, 3)) * std + mean).flatten(-2)
        levels = (guess.clamp(0, 1) * 255).round().to(torch.uint8)
        return pixels_BNP.scatter(1, index_BM[:, :, None].expand_as(levels), levels)

    def _grid(self, index_BK: Tensor) -> Tensor:
        """Mark the given token indices in a bool grid (B, T, h, w) on the host."""
        marks = torch.zeros(len(index_BK), self._selector.geometry.num_tokens, dtype=torch.bool)
        return self._in_grid(marks.scatter(1, index_BK.cpu(), True))

    def _in_grid(self, x_BN: Tensor) -> Tensor:
        geometry = self._selector.geometry
        return x_BN.cpu().unflatten(1, (geometry.num_slots, geometry.grid_size, -1))


def _rollout(weights_Bnn: list[Tensor]) -> Tensor:
    """Compute attention rollout (Abnar and Zuidema, 2020) from the mean output token to the input tokens.

    In each block, half of a token comes from itself, through the residual connection, and half from the
    tokens that it attends to.

    Returns:
        float32 (B, n); each row sums to 1.
    """
    num_clips, n, _ = weights_Bnn[0].shape
    share_Bn = weights_Bnn[0].new_full((num_clips, n), 1 / n)
    for weights in reversed(weights_Bnn):
        share_Bn = (share_Bn + (share_Bn[:, None] @ weights)[:, 0]) / 2
    return share_Bn
