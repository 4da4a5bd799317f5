"""The systems of the published tables: the models behind each row, and their memory over batch sizes.

To add a system, write a module under peers/, and add an entry to that registry and to `SYSTEMS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from everest_ds.config.schema import Experiment
from everest_ds.costs.compute import count_parameters, predict_macs
from everest_ds.costs.memory import MemoryPrediction, predict_memory
from everest_ds.efficiency.peer_counts import count_peer

NUM_RANKS = 8  # one node, as in the published tables
METHODS = ("VideoMAE", "EVEREST")

FigureKind = Literal["predicted", "counted", "measured", "published"]
K400_CLASSES = 400
K400_KEEP_RATIO = 0.4  # reproduces EVEREST's published K400 pre-training figures; the paper's default is 0.3
BACKBONES = {"ViT-S": "vit_small", "ViT-B": "vit_base", "ViT-L": "vit_large", "ViT-H": "vit_huge"}


@dataclass(frozen=True)
class Figure:
    """A figure and its origin."""

    value: float
    kind: FigureKind
    note: str = ""


class Subject(Protocol):
    """A video model whose compute and size are known without running it."""

    def compute(self) -> Figure:
        """Return the forward multiply-accumulates as in the literature, with LayerNorm at 5 per element."""

    def parameters(self) -> Figure:
        """Return the number of trainable parameters."""


@dataclass(frozen=True)
class OwnModel:
    """A model of this project, whose figures are predicted from its config alone."""

    config: Experiment
    note: str = ""

    def compute(self) -> Figure:
        """Predict the forward multiply-accumulates in the literature's convention."""
        return Figure(predict_macs(self.config).literature_macs, "predicted", self.note)

    def parameters(self) -> Figure:
        """Predict the number of trainable parameters."""
        return Figure(count_parameters(self.config), "predicted")


@dataclass(frozen=True)
class PeerModel:
    """A peer system of peers/, whose figures are counted on the meta device.

    Attributes:
        name: key in the registry of peers/.
        note: remark on its compute.
        parameters_note: remark on its parameters.
    """

    name: str
    note: str = ""
    parameters_note: str = ""

    def compute(self) -> Figure:
        """Count the forward multiply-accumulates over all views, in the literature's convention."""
        peer = count_peer(self.name)
        macs = peer.forward.literature_macs
        per_view = f"{peer.views} views of {macs / 1e9:.1f}" if peer.views > 1 else ""
        note = "; ".join(part for part in (per_view, self.note) if part)
        return Figure(peer.views * macs, "counted", note)

    def parameters(self) -> Figure:
        """Count the trainable parameters."""
        return Figure(count_peer(self.name).num_parameters, "counted", self.parameters_note)


@dataclass(frozen=True)
class System:
    """The models behind a row of the published tables.

    Attributes:
        pretrain: the model in pre-training; None if it is not a video model.
        finetune: the model in fine-tuning; None if the row has no such figure.
        pretrain_note: reason why a published pre-training figure has no counterpart.
    """

    pretrain: Subject | None
    finetune: Subject | None
    pretrain_note: str = ""


def videomae(backbone: str) -> System:
    """Return VideoMAE: pre-training with tube masking, fine-tuning on every token."""
    return System(
        OwnModel(_experiment("pretrain", backbone, {"selection": "tube"})),
        OwnModel(_experiment("finetune", backbone, {"selection": "none"})),
    )


def everest(backbone: str) -> System:
    """Return EVEREST at the keep ratios behind its published K400 figures."""
    kept = {"selection": "rero", "keep_ratio": K400_KEEP_RATIO}
    at_default = predict_macs(_experiment("pretrain", backbone, {"selection": "rero", "keep_ratio": 0.3}))
    note = f"keep ratio {K400_KEEP_RATIO}; {at_default.literature_macs / 1e9:.1f} at the paper's 0.3"
    return System(
        OwnModel(_experiment("pretrain", backbone, kept), note),
        OwnModel(
            _experiment("finetune", backbone, {"selection": "rero", "keep_ratio": 0.6}), "keep ratio 0.6"
        ),
    )


def _experiment(task: str, backbone: str, tokens: Mapping[str, Any]) -> Experiment:
    num_classes = K400_CLASSES if task == "finetune" else None
    model = {"backbone": BACKBONES[backbone], "num_classes": num_classes}
    return Experiment.model_validate({"task": task, "model": model, "tokens": tokens})


_IMAGES = (
    "cost of image pre-training, in a unit that the source does not state; one 224 x 224 image takes {} GMACs"
)
_IMAGES_B, _IMAGES_L = _IMAGES.format("17.6"), _IMAGES.format("61.6")
_KCENTERED = "the backbone without the sampler in front of it, which would add 3.8 per view"
SYSTEMS: dict[tuple[str, str], System] = {
    ("MViT", "MViT-S"): System(
        None,
        PeerModel(
            "mvit_s", "a reconstruction that has the published parameters: the config was never released"
        ),
    ),
    ("MViT", "MViT-B"): System(
        None,
        PeerModel(
            "mvit_b", "the max-pooling variant", "with max-pooling; the variant with convolutions has 36.6"
        ),
    ),
    ("ViViT FE", "ViT-L"): System(None, PeerModel("vivit_l_fe", "one view of 128 frames"), _IMAGES_L),
    ("K-centered", "XViT"): System(None, PeerModel("xvit", _KCENTERED), _IMAGES_B),
    ("K-centered", "Mformer"): System(None, PeerModel("motionformer", f"one view; {_KCENTERED}"), _IMAGES_B),
    ("K-centered", "TSformer"): System(None, PeerModel("timesformer", _KCENTERED), _IMAGES_B),
    ("MME", "ViT-B"): System(PeerModel("mme"), None),
    ("MVD", "ViT-B"): System(
        PeerModel("mvd", "77.3 for the student, 320.8 for its two frozen teachers"), None
    ),
    ("VideoMAE", "ViT-S"): videomae("ViT-S"),
    ("VideoMAE", "ViT-B"): videomae("ViT-B"),
    ("VideoMAE", "ViT-L"): videomae("ViT-L"),
    ("EVEREST", "ViT-S"): everest("ViT-S"),
    ("EVEREST", "ViT-B"): everest("ViT-B"),
    ("EVEREST", "ViT-L"): everest("ViT-L"),
    ("VideoMAE + full-token", "ViT-B"): videomae("ViT-B"),
    ("VideoMAE + EVEREST", "ViT-B"): everest("ViT-B"),
    ("MME + full-token", "ViT-B"): videomae("ViT-B"),
    ("MME + EVEREST", "ViT-B"): everest("ViT-B"),
    ("MVD + full-token", "ViT-B"): videomae("ViT-B"),
    ("MVD + EVEREST", "ViT-B"): everest("ViT-B"),
}


def trained_configs(method: str, backbone: str) -> dict[str, Experiment]:
    """Return this project's config of a method for each training phase.

    The configs use bf16, ZeRO-2 and fused attention, without recomputation.
    """
    system = SYSTEMS[method, backbone]
    phases = {"pre-training": system.pretrain, "fine-tuning": system.finetune}
    return {phase: model.config for phase, model in phases.items() if isinstance(model, OwnModel)}


def memory_by_batch(config: Experiment, batch_sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return (clips per rank, predicted peak bytes per rank) for each micro-batch size."""
    return [(size, memory_at(config, size).peak_bytes) for size in batch_sizes]


def memory_at(config: Experiment, micro_batch_size: int) -> MemoryPrediction:
    """Predict the memory of one of `NUM_RANKS` ranks at a micro-batch size."""
    batch = config.batch.model_copy(update={"micro_batch_size": micro_batch_size})
    return predict_memory(config.model_copy(update={"batch": batch}), num_ranks=NUM_RANKS)
