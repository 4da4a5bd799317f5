"""The original systems' models, run from clones of their repositories for comparison and never shipped.

    git clone https://github.com/sunilhoho/EVEREST
    git clone https://github.com/MCG-NJU/VideoMAE

None of their code is copied here: the modules are imported from the clone, and the work of their training
loops around the model (un-normalising the pixels, targets of all tokens, mixed precision) is reimplemented.
The timing favours them by leaving out their loader's normalisation, gradient norms, logging, and the
activation checkpointing of their fine-tuning scripts.

Shape legend: B clips, F frames, H x W pixels, C = 3 colours, N tokens, P values per tubelet, M predicted.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from everest_ds.config import Experiment
from everest_ds.errors import UsageError, nearest
from everest_ds.models.tubelets import PIXEL_MEAN, PIXEL_STD

REPOSITORIES = {
    "everest": "https://github.com/sunilhoho/EVEREST",
    "videomae": "https://github.com/MCG-NJU/VideoMAE",
}
_SIZES = {"vit_small": "small", "vit_base": "base", "vit_large": "large", "vit_huge": "huge"}
# Both repositories use these module names, so each clone's modules are removed from sys.modules after use.
_THEIR_MODULES = ("modeling_pretrain", "modeling_finetune", "masking_generator")


@dataclass(frozen=True)
class PeerBatch:
    """A batch as a peer's loader delivers it.

    Attributes:
        video_BCFHW: float32 pixels, normalised by ImageNet's statistics.
        hidden_BN: bool mask, True for tokens hidden from the encoder; None if the model selects the tokens.
        label_B: int64 labels for fine-tuning, otherwise None.
    """

    video_BCFHW: Tensor
    hidden_BN: Tensor | None
    label_B: Tensor | None


@dataclass(frozen=True)
class Peer:
    """A peer's model with the input preparation and the loss of its training loop.

    Attributes:
        name: name of the peer.
        model: the model.
        prepare: (uint8 clips (B, F, H, W, 3), labels or None) -> batch; this loader's work is not timed.
        loss: batch -> scalar loss of a forward pass, as in the peer's engine.
    """

    name: str
    model: nn.Module
    prepare: Callable[[Tensor, Tensor | None], PeerBatch]
    loss: Callable[[PeerBatch], Tensor]


def load_peer(name: str, folder: Path, config: Experiment) -> Peer:
    """Build a peer's model for the phase, backbone and token ratios of `config`, in float32 on the CPU.

    Args:
        name: `everest` or `videomae`.
        folder: clone of the peer's repository.
        config: the experiment to reproduce.

    Raises:
        UsageError: the peer is unknown, `folder` is not a clone, or the peer's code does not support the clip
            or backbone.
    """
    if name not in REPOSITORIES:
        raise UsageError("unknown peer", given=name, allowed=nearest(name, REPOSITORIES))
    _check_clip(config)
    with their_modules(folder, REPOSITORIES[name]) as load:
        if config.task == "pretrain":
            return _pretraining(name, load, config)
        return _fine_tuning(name, load, config)


def _check_clip(config: Experiment) -> None:
    model = config.model
    clip = (model.num_frames, model.tubelet_size, model.image_size)
    if model.backbone not in _SIZES or clip != (16, 2, 224):
        raise UsageError(
            "the peers' code does not support this clip or backbone",
            given=f"{model.backbone}, {model.num_frames} frames of {model.image_size} pixels",
            allowed=f"16 frames of 224 pixels in tubelets of 2, {', '.join(_SIZES)}",
        )


def _pretraining(name: str, load: Callable[[str], Any], config: Experiment) -> Peer:
    factories, size = load("modeling_pretrain"), _SIZES[config.model.backbone]
    depth, tokens = config.model.shape.decoder.depth, config.tokens
    if name == "everest":
        model = getattr(factories, f"pretrain_videoms_{size}_patch16_224")(
            decoder_depth=depth,
            motion_centric_masking=True,
            motion_centric_masking_ratio=_dropped(tokens.keep_ratio),
            masking_ratio=tokens.mask_ratio,
        )
        return Peer(name, model, lambda clip, _: PeerBatch(to_video(clip), None, None), _own_mask_loss(model))
    model = getattr(factories, f"pretrain_videomae_{size}_patch16_224")(decoder_depth=depth)
    geometry = config.model.geometry
    window = (geometry.num_slots, geometry.grid_size, geometry.grid_size)
    draw_mask = load("masking_generator").TubeMaskingGenerator(window, tokens.mask_ratio)

    def prepare(clip_BFHWC: Tensor, _: Tensor | None) -> PeerBatch:
        masks = [torch.from_numpy(draw_mask()) for _ in clip_BFHWC]
        return PeerBatch(to_video(clip_BFHWC), torch.stack(masks).bool().to(clip_BFHWC.device), None)

    return Peer(name, model, prepare, _given_mask_loss(model))


def _fine_tuning(name: str, load: Callable[[str], Any], config: Experiment) -> Peer:
    arguments: dict[str, Any] = {
        "num_classes": config.model.num_classes,
        "all_frames": config.model.num_frames,
        "tubelet_size": config.model.tubelet_size,
        "drop_path_rate": 0.0,
        "use_mean_pooling": True,
        "init_scale": 0.001,
    }
    if name == "everest":
        arguments |= {"mcm": True, "mcm_ratio": _dropped(config.tokens.keep_ratio)}
    size = _SIZES[config.model.backbone]
    model = getattr(load("modeling_finetune"), f"vit_{size}_patch16_224")(**arguments)

    def loss(batch: PeerBatch) -> Tensor:
        assert batch.label_B is not None
        return F.cross_entropy(model(batch.video_BCFHW), batch.label_B)

    return Peer(name, model, lambda clip, label: PeerBatch(to_video(clip), None, label), loss)


def _dropped(keep_ratio: float) -> float:
    return round(1 - keep_ratio, 10)  # rounded, so that 1 - 0.3 is exactly 0.7


def _own_mask_loss(model: nn.Module) -> Callable[[PeerBatch], Tensor]:
    """Return EVEREST's loss: it builds targets of all tokens; the model returns which tokens it predicted."""

    def loss(batch: PeerBatch) -> Tensor:
        target_BNP = all_targets(batch.video_BCFHW)
        prediction_BMP, (_, not_predicted_BN) = model(batch.video_BCFHW, None)
        return F.mse_loss(prediction_BMP, _rows(target_BNP, ~not_predicted_BN))

    return loss


def _given_mask_loss(model: nn.Module) -> Callable[[PeerBatch], Tensor]:
    """Return VideoMAE's loss: it builds targets of all tokens, and the model predicts the hidden ones."""

    def loss(batch: PeerBatch) -> Tensor:
        assert batch.hidden_BN is not None
        target_BMP = _rows(all_targets(batch.video_BCFHW), batch.hidden_BN)
        return F.mse_loss(model(batch.video_BCFHW, batch.hidden_BN), target_BMP)

    return loss


def _rows(x_BNP: Tensor, chosen_BN: Tensor) -> Tensor:
    return x_BNP[chosen_BN].unflatten(0, (x_BNP.shape[0], -1))


def to_video(clip_BFHWC: Tensor) -> Tensor:
    """Convert uint8 clips (B, F, H, W, 3) to normalised float32 (B, 3, F, H, W), as the peers' loaders do."""
    mean, std = (torch.tensor(values, device=clip_BFHWC.device) for values in (PIXEL_MEAN, PIXEL_STD))
    return ((clip_BFHWC / 255 - mean) / std).permute(0, 4, 1, 2, 3).contiguous()


@torch.no_grad()
def all_targets(video_BCFHW: Tensor) -> Tensor:
    """Compute the targets (B, N, P) of every token: the pixels, standardised within each tubelet."""
    mean, std = (
        torch.tensor(values, device=video_BCFHW.device).view(3, 1, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD)
    )
    pixels = video_BCFHW * std + mean
    tubelets = rearrange(pixels, "b c (s t) (h p) (w q) -> b (s h w) (t p q) c", t=2, p=16, q=16)
    centred = tubelets - tubelets.mean(dim=2, keepdim=True)
    return (centred / (tubelets.var(dim=2, keepdim=True).sqrt() + 1e-6)).flatten(2)


# --- Weights ------------------------------------------------------------------------------------------------

_INSIDE_A_BLOCK = [(r"\.attention\.", ".attn.")]
_TO_PRETRAINING = [
    (r"^encoder\.embed\.", "encoder.patch_embed.proj."),
    (r"^norm\.", "encoder.norm."),
    (r"^to_decoder\.", "encoder_to_decoder."),
    (r"^decoder\.(\d+)\.", r"decoder.blocks.\1."),
    (r"^decoder_norm\.", "decoder.norm."),
    (r"^head\.", "decoder.head."),
]
_TO_FINE_TUNING = [
    (r"^encoder\.embed\.", "patch_embed.proj."),
    (r"^encoder\.", ""),
    (r"^norm\.", "fc_norm."),
]


def their_name(ours: str, task: str) -> str:
    """Return the peers' name of a parameter of ours: `0.attention.proj.bias` -> `0.attn.proj.bias`."""
    for pattern, replacement in _TO_PRETRAINING if task == "pretrain" else _TO_FINE_TUNING:
        ours, replaced = re.subn(pattern, replacement, ours)
        if replaced:
            break
    for pattern, replacement in _INSIDE_A_BLOCK:
        ours = re.sub(pattern, replacement, ours)
    return ours


def in_our_layout(theirs: Tensor, ours: Tensor) -> Tensor:
    """Reshape a peer's tensor to its counterpart; colour comes last in the input of our embedding."""
    if theirs.ndim == 5:  # Conv3d (D, colour, frame, row, column)
        return theirs.permute(0, 2, 3, 4, 1).flatten(1)
    return theirs.reshape(ours.shape)


@torch.no_grad()
def copy_weights(ours: nn.Module, theirs: nn.Module, task: str) -> None:
    """Copy all of our model's weights into the peer's model.

    Raises:
        KeyError: a parameter on one side has no counterpart on the other.
    """
    target = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        counterpart = target.pop(their_name(name, task))
        in_our_layout(counterpart, parameter)  # raises if the shapes do not correspond
        if counterpart.ndim == 5:
            width, colours, *kernel = counterpart.shape
            counterpart.copy_(parameter.view(width, *kernel, colours).permute(0, 4, 1, 2, 3))
        else:
            counterpart.copy_(parameter.view(counterpart.shape))
    if target:
        raise KeyError(f"no counterpart for the peer's {', '.join(target)}")


# --- Importing from a clone ---------------------------------------------------------------------------------


@contextmanager
def their_modules(
    folder: Path, repository: str, modules: Sequence[str] = _THEIR_MODULES
) -> Iterator[Callable[[str], Any]]:
    """Yield a function that imports a clone's modules; restore sys.modules and sys.path on exit.

    Args:
        folder: the clone.
        repository: URL of the repository, named in the error.
        modules: names of all modules that are imported directly or indirectly; the first must exist.

    Raises:
        UsageError: `folder` does not contain the first module.
    """
    first = modules[0].replace(".", "/") + ".py"
    if not (folder / first).is_file():
        raise UsageError(
            f"{folder}: contains no {first}", fix=f"git clone {repository}, and give that folder"
        )
    borrowed = {**dict.fromkeys(modules), **_timm_names()}
    before = {name: sys.modules.pop(name) for name in borrowed if name in sys.modules}
    sys.modules.update({name: module for name, module in borrowed.items() if module is not None})
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(folder.resolve()))
        for name in borrowed:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def _timm_names() -> dict[str, ModuleType]:
    """Return replacements for timm's modules, with the four names that the peers import.

    The old timm version that the peers need no longer installs everywhere.
    """
    layers, registry = ModuleType("timm.models.layers"), ModuleType("timm.models.registry")
    timm, models = ModuleType("timm"), ModuleType("timm.models")
    models.__dict__.update(layers=layers, registry=registry)
    timm.__dict__.update(models=models)
    layers.__dict__.update(trunc_normal_=nn.init.trunc_normal_, to_2tuple=_pair, drop_path=_no_drop_path)
    registry.__dict__.update(register_model=lambda factory: factory)
    return {module.__name__: module for module in (timm, models, layers, registry)}


def _pair(value: int) -> tuple[int, int]:
    return value, value


def _no_drop_path(*_: object) -> Tensor:
    raise NotImplementedError("drop path is not supported in the peers' models")
