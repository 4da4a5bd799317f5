"""The rules that select the tokens of a clip, one row per rule, and the kinds of score that rules compare by.

To add a rule, write its row in `SELECTIONS` and its function in models/selection/selector.py. Token counts,
checks, predictions of compute, memory and time, and the texts of all commands follow from the row.

Symbols as in the paper: N tokens, K kept by the rule, V visible to the pre-training encoder, T slots, L
places per slot, P values of one tubelet, D width of the encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, TypeAlias

from everest_ds.config.tokens import ClipGeometry, TokenCounts, exact_floor

# Tokens that are scored at a time on a GPU: enough to fill a matrix product, few enough that their features
# never set the memory peak (a quarter of a gigabyte with ViT-L). A CPU takes fewer; predictions are for GPUs.
GPU_CHUNK_TOKENS = 2**15
# Samples along each side of a patch from which the codec score takes brightness and texture.
CODEC_SAMPLES = 4
# In VideoMAE v2, the four places of a 2x2 cell take turns: each is predicted in 2 of 4 consecutive slots.
RUNNING_CELL_PERIOD = 4


@dataclass(frozen=True)
class SelectionRule:
    """A rule that selects tokens (`tokens.selection`).

    Attributes:
        tasks: tasks that may use the rule, `pretrain` and `finetune`.
        launches: operators that the host launches for the rule in a forward pass, without its scores, beyond
            those of `none`; counted by tests/costs/test_host_work.py.
        finetune_launches: further ones in fine-tuning, where `none` draws no mask.
        shares: tasks in which the rule keeps a share of the tokens: ⌊keep_ratio·N⌋, or ⌊keep_ratio·L⌋ places
            of every slot under `masks_tubes`; in the others it keeps all N, or those that its mask shows or
            predicts.
        whole_slots: slots of which the rule keeps every token, so that the kept share must hold them.
        scores: whether the rule compares neighbouring slots by `tokens.score` and `tokens.distance`.
        packs: whether the loader's workers can apply the rule (training/token_packing.py).
        masks_tubes: whether the selected places are the same in every slot. Pre-training then hides
            ⌊mask_ratio·L⌋ of them; otherwise ⌊(1 - mask_ratio)·N⌋ of the kept tokens are visible.
        hidden_per_predicted: hidden tokens for each one that the decoder predicts, under `masks_tubes`.
        slot_multiple: number that must divide the slots of a clip.
        slot_reason: the purpose of `slot_multiple`, for the error message.
    """

    tasks: tuple[str, ...]
    launches: int
    finetune_launches: int = 0
    shares: tuple[str, ...] = ()
    whole_slots: int = 0
    scores: bool = False
    packs: bool = False
    masks_tubes: bool = False
    hidden_per_predicted: int = 1
    slot_multiple: int = 1
    slot_reason: str = ""


_BOTH = ("pretrain", "finetune")
SELECTIONS: dict[str, SelectionRule] = {
    # EVEREST: keep the tokens that change most.
    "rero": SelectionRule(_BOTH, launches=1, shares=_BOTH, scores=True, packs=True),
    # The control of EVEREST: keep as many tokens at random.
    "random": SelectionRule(_BOTH, launches=29, shares=_BOTH),
    # Run-Length Tokenization: keep the first slot, and the later tokens that change most.
    "rlt": SelectionRule(_BOTH, launches=20, shares=_BOTH, whole_slots=1),
    # Subsampling in time: keep whole slots, evenly spaced.
    "uniform": SelectionRule(_BOTH, launches=39, shares=_BOTH),
    # The mask of VideoMAE; in fine-tuning, keep the places that it would show.
    "tube": SelectionRule(_BOTH, launches=3, finetune_launches=32, shares=("finetune",), masks_tubes=True),
    # The mask of VideoMAE v2.
    "dual": SelectionRule(
        ("pretrain",),
        launches=45,
        masks_tubes=True,
        hidden_per_predicted=2,
        slot_multiple=RUNNING_CELL_PERIOD,
        slot_reason="its running cells predict every place equally often",
    ),
    # Keep all tokens.
    "none": SelectionRule(_BOTH, launches=0),
}


def sketch_width(width: int) -> int:
    """Return the size of the sketch of a `width`-wide embedding.

    A sketch has a tenth of the features, rounded down to a multiple of 8 if the tenth is 8 or more.
    """
    tenth = max(1, width // 10)
    return tenth - tenth % 8 if tenth >= 8 else tenth


@dataclass(frozen=True)
class ScoreKind:
    """A kind of features by which tokens are compared (`tokens.score`).

    Attributes:
        features: the number of features per token, as a function of D and P.
        num_maps: copies of the linear map from pixels to features that scoring adds to memory: the embedding
            rescaled to pixel levels, or the sketch before and after rescaling; 0 if the features are pixels.
        launches: operators that the host launches once per forward pass.
        chunk_launches: operators that the host launches for every chunk of scored tokens.
        distances: values of `tokens.distance` that the features preserve.
        reads_motion: whether the loader's workers compute the score, from motion vectors that only they have;
            the model then gets the indices of the kept tokens with each clip.
    """

    features: Callable[[int, int], int]
    num_maps: int
    launches: int
    chunk_launches: int
    distances: tuple[str, ...] = ("l2", "l1", "cosine")
    reads_motion: bool = False

    def map_macs(self, width: int, tubelet_values: int) -> int:
        """Return the multiply-accumulates that map one tubelet to its features."""
        return tubelet_values * self.features(width, tubelet_values) if self.num_maps else 0


SCORES: dict[str, ScoreKind] = {
    "embedding": ScoreKind(lambda width, _: width, num_maps=1, launches=3, chunk_launches=4),
    "sketch": ScoreKind(
        lambda width, _: sketch_width(width),
        num_maps=2,
        launches=39,
        chunk_launches=4,
        distances=("l2", "cosine"),
    ),
    "pixel": ScoreKind(lambda _, values: values, num_maps=0, launches=2, chunk_launches=15),
    "codec": ScoreKind(
        lambda _, __: 0, num_maps=0, launches=0, chunk_launches=0, distances=("l2",), reads_motion=True
    ),
}

if TYPE_CHECKING:
    SelectionName: TypeAlias = str
    ScoreName: TypeAlias = str
else:
    SelectionName, ScoreName = Literal[tuple(SELECTIONS)], Literal[tuple(SCORES)]


def scored_slots(num_slots: int, distance: str) -> int:
    """Return the number of slots whose pixels are mapped to features.

    L2 and L1 distances are computed on the change of the pixels between neighbouring slots, so the first slot
    is not mapped; the cosine distance needs the features of every slot.
    """
    return num_slots if distance == "cosine" else num_slots - 1


@lru_cache  # cached: each part of a memory or time prediction asks for these counts
def pretrain_counts(
    geometry: ClipGeometry, selection: str, keep_ratio: float, mask_ratio: float
) -> TokenCounts:
    """Return the token counts of pre-training with the rule `selection` (paper section 3)."""
    rule, num_tokens = SELECTIONS[selection], geometry.num_tokens
    if rule.masks_tubes:
        hidden_places = exact_floor(mask_ratio, geometry.tokens_per_slot)
        predicted = hidden_places * geometry.num_slots // rule.hidden_per_predicted
        visible = geometry.num_slots * (geometry.tokens_per_slot - hidden_places)
        return TokenCounts(num_tokens, visible + predicted, visible)
    kept = exact_floor(keep_ratio, num_tokens) if "pretrain" in rule.shares else num_tokens
    return TokenCounts(num_tokens, kept, int((1 - Fraction(repr(mask_ratio))) * num_tokens))


@lru_cache
def classify_counts(geometry: ClipGeometry, selection: str, keep_ratio: float) -> TokenCounts:
    """Return the token counts of fine-tuning and inference: all kept tokens are visible."""
    rule, num_tokens = SELECTIONS[selection], geometry.num_tokens
    if "finetune" in rule.shares and rule.masks_tubes:
        kept = geometry.num_slots * exact_floor(keep_ratio, geometry.tokens_per_slot)
    else:
        kept = exact_floor(keep_ratio, num_tokens) if "finetune" in rule.shares else num_tokens
    return TokenCounts(num_tokens, kept, kept)
