"""The parameter names of each system for a VideoMAE-like model, in one table per layout.

A layout translates the names of EVEREST-DS into those of another system, prefix by prefix; the shapes of its
tensors follow from the parameter (`tensors.py`). If the pre-training of a system does not decode pixels, only
its encoder has a counterpart in EVEREST-DS; the other keys of its files are listed as unused, with a reason.
EVEREST's released code uses the names of VideoMAE, and so do fine-tuned models of MVD and MME.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from everest_ds.errors import CheckpointError

WeightKind = Literal["pretrain", "finetune", "encoder"]
Names = tuple[str, ...]
# Name or prefix in EVEREST-DS -> name in the other system; several names if EVEREST-DS concatenates their
# tensors.
NameTable = Mapping[str, str | Names]

EMBEDDING = "encoder.embed.weight"
_BLOCK = re.compile(r"(.+?)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Layout:
    """The names that a system gives to the parameters of one kind of model.

    Attributes:
        system: name of the system, as in `--to`.
        kind: EVEREST-DS model that has all of these parameters.
        stems: names of the modules and parameters outside blocks, and of the stacks of blocks.
        block: names of the modules and parameters inside a block.
        marks: keys of the other system that distinguish this layout.
        unused: pattern of keys without a counterpart in EVEREST-DS -> reason.
    """

    system: str
    kind: WeightKind
    stems: NameTable
    block: NameTable = field(default_factory=dict)
    marks: Names = ()
    unused: Mapping[str, str] = field(default_factory=dict)

    def theirs(self, ours: str) -> Names:
        """Return the other system's names of a parameter, or none if the layout has no such parameter."""
        match = _BLOCK.fullmatch(ours)
        if match is None:
            return _translate(ours, self.stems)
        stack, index, inside = match.groups()
        return tuple(
            f"{outer}.{index}.{inner}"
            for outer in _translate(stack, self.stems)
            for inner in _translate(inside, self.block) or (inside,)
        )

    @property
    def normalizes_mean(self) -> bool:
        """True if the last LayerNorm acts on the mean of the tokens, as in classifiers, headless or not."""
        return self.kind == "finetune" or "fc_norm" in self.theirs("norm")

    def why_unused(self, key: str) -> str | None:
        """Return the reason why a key of the other system is not needed; None if the key is unknown."""
        return next((why for pattern, why in self.unused.items() if re.fullmatch(pattern, key)), None)

    def fits(self, keys: Iterable[str]) -> bool:
        """Return whether a set of keys belongs to this layout."""
        return {*self.marks, *self.theirs(EMBEDDING)} <= set(keys)


def _translate(name: str, table: NameTable) -> Names:
    for ours, theirs in table.items():
        if name == ours or name.startswith(f"{ours}."):
            names = (theirs,) if isinstance(theirs, str) else theirs
            return tuple(new + name.removeprefix(ours) for new in names)
    return ()


_ORIGINAL_BLOCK: NameTable = {"attention": "attn"}
_TRANSFORMERS_BLOCK: NameTable = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attention.qkv.weight": tuple(f"attention.attention.{part}.weight" for part in ("query", "key", "value")),
    "attention.q_bias": "attention.attention.q_bias",
    "attention.v_bias": "attention.attention.v_bias",
    "attention.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
# transformers 5 renames the biases of q and v on loading, so its state dicts have the new names.
TRANSFORMERS_RENAMED = {".query.bias": ".q_bias", ".value.bias": ".v_bias"}

_OWN_ENCODER = {"encoder.embed": "encoder.embed", "encoder.blocks": "encoder.blocks", "norm": "norm"}
_OWN_HEAD = {"head": "head"}
_OWN_DECODER = {
    **{name: name for name in ("to_decoder", "mask_token", "decoder", "decoder_norm")},
    **_OWN_HEAD,
}
_ENCODER = {
    "encoder.embed": "encoder.patch_embed.proj",
    "encoder.blocks": "encoder.blocks",
    "norm": "encoder.norm",
}
_BARE_ENCODER = {"encoder.embed": "patch_embed.proj", "encoder.blocks": "blocks", "norm": "norm"}
_TRANSFORMERS_ENCODER = {
    "encoder.embed": "embeddings.patch_embeddings.projection",
    "encoder.blocks": "encoder.layer",
    "norm": "layernorm",
}
_IN_TRANSFORMERS = {ours: f"videomae.{theirs}" for ours, theirs in _TRANSFORMERS_ENCODER.items()}
_IS_MASKED = "part of a decoder whose targets are not pixels"

LAYOUTS = (
    Layout("everest", "pretrain", {**_OWN_ENCODER, **_OWN_DECODER}, marks=("to_decoder.weight",)),
    Layout("everest", "finetune", {**_OWN_ENCODER, **_OWN_HEAD}, marks=("head.weight",)),
    Layout("everest", "encoder", _OWN_ENCODER, marks=(EMBEDDING,)),
    Layout(
        "videomae",
        "pretrain",
        {
            **_ENCODER,
            "to_decoder": "encoder_to_decoder",
            "mask_token": "mask_token",
            "decoder": "decoder.blocks",
            "decoder_norm": "decoder.norm",
            "head": "decoder.head",
        },
        _ORIGINAL_BLOCK,
        marks=("decoder.norm.weight",),
    ),
    Layout(
        "mme",
        "encoder",
        _ENCODER,
        _ORIGINAL_BLOCK,
        marks=("decoder.0.norm.weight",),
        unused={r"(decoder|encoder_to_decoder)\.\d+\..+|mask_token": _IS_MASKED},
    ),
    Layout(
        "mvd",
        "encoder",
        _BARE_ENCODER,
        _ORIGINAL_BLOCK,
        marks=("mask_token_vid",),
        unused={r"(mask_token|down|decoder|pos_embed)_(img|vid)(\..+)?": _IS_MASKED},
    ),
    Layout(
        "videomae",
        "finetune",
        {"encoder.embed": "patch_embed.proj", "encoder.blocks": "blocks", "norm": "fc_norm", "head": "head"},
        _ORIGINAL_BLOCK,
        marks=("fc_norm.weight", "head.weight"),
    ),
    Layout("videomae", "encoder", _ENCODER, _ORIGINAL_BLOCK, marks=("encoder.norm.weight",)),
    Layout("mvd", "encoder", _BARE_ENCODER, _ORIGINAL_BLOCK, marks=("norm.weight",)),
    Layout(
        "transformers",
        "pretrain",
        {
            **_IN_TRANSFORMERS,
            "to_decoder": "encoder_to_decoder",
            "mask_token": "mask_token",
            "decoder": "decoder.decoder_layers",
            "decoder_norm": "decoder.norm",
            "head": "decoder.head",
        },
        _TRANSFORMERS_BLOCK,
        marks=("encoder_to_decoder.weight",),
    ),
    Layout(
        "transformers",
        "finetune",
        {**_IN_TRANSFORMERS, "norm": "fc_norm", "head": "classifier"},
        _TRANSFORMERS_BLOCK,
        marks=("classifier.weight",),
    ),
    Layout(
        "transformers", "encoder", _TRANSFORMERS_ENCODER, _TRANSFORMERS_BLOCK, marks=("layernorm.weight",)
    ),
    # Classifiers whose head was removed.
    Layout(
        "videomae",
        "encoder",
        {**_BARE_ENCODER, "norm": "fc_norm"},
        _ORIGINAL_BLOCK,
        marks=("fc_norm.weight",),
    ),
    Layout(
        "transformers",
        "encoder",
        {**_IN_TRANSFORMERS, "norm": "fc_norm"},
        _TRANSFORMERS_BLOCK,
        marks=("fc_norm.weight",),
    ),
)
SYSTEMS = ("everest", "videomae", "mvd", "mme", "transformers")


def detect_layout(keys: Iterable[str], file: Path) -> Layout:
    """Find the layout that the given keys belong to.

    Args:
        keys: names of the tensors in a file.
        file: the file, for error messages.

    Raises:
        CheckpointError: if no known layout has these keys.
    """
    names = set(keys)
    for layout in LAYOUTS:
        if layout.fits(names):
            return layout
    known = {name for layout in LAYOUTS for name in layout.theirs(EMBEDDING)}
    raise CheckpointError(
        f"{file}: the weights have an unknown layout",
        given=f"{len(names)} keys, such as {', '.join(sorted(names)[:3])}",
        allowed=f"layouts of {', '.join(SYSTEMS)}, with one of {', '.join(sorted(known))}",
    )


def layout_of(system: str, kind: WeightKind) -> Layout:
    """Return a system's layout of one kind of model, or its encoder layout if it has no such model.

    Fine-tuned models of MVD and MME use the names of VideoMAE.
    """
    systems = ("videomae",) if kind == "finetune" and system in ("mvd", "mme") else (system,)
    fitting = [layout for layout in LAYOUTS if layout.system in systems]
    return next(layout for wanted in (kind, "encoder") for layout in fitting if layout.kind == wanted)
