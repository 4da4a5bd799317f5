"""The share of the moving object that ReRo keeps, from videos rendered with and without the object.

Shape legend: B clips, N tokens, P values of a tubelet.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from everest_ds.config.tokens import ClipGeometry, exact_floor
from everest_ds.data.synthetic import MOTIONS, render_video
from everest_ds.models.selection.rero import select_tokens, token_importance
from everest_ds.models.tubelets import to_tubelets
from study.protocol import Study

_CLIPS = 240
_VISIBLE = 12  # levels by which a pixel must differ to count as covered by the object


def object_shares(study: Study, kind: str, ratios: Sequence[float]) -> dict[float, float]:
    """Return the percentage of the object's pixels, over all frames, that lie in tokens that ReRo keeps.

    ReRo uses the `pixel` score, which needs no weights.

    Returns:
        Keep ratio -> percentage.
    """
    model = study.scale.model
    geometry = ClipGeometry(
        model["num_frames"], image_size=model["image_size"], patch_size=model["patch_size"]
    )
    with_object, without = (_tubelets(study, kind, geometry, shown) for shown in (True, False))
    covered_BN = ((with_object.int() - without.int()).abs() > _VISIBLE).sum(dim=2)
    importance_BN = token_importance(with_object, geometry.num_slots, None, "l2")
    kept = {ratio: select_tokens(importance_BN, exact_floor(ratio, geometry.num_tokens)) for ratio in ratios}
    total = covered_BN.sum()
    return {ratio: float(100 * covered_BN.gather(1, keep).sum() / total) for ratio, keep in kept.items()}


def _tubelets(study: Study, kind: str, geometry: ClipGeometry, show_object: bool) -> Tensor:
    """Render clips that no run sees, with or without the object, as tubelets (B, N, P)."""
    spec = study.spec(kind)
    clips = [
        render_video(index % len(MOTIONS), np.random.default_rng([spec.seed, index]), spec, show_object)
        for index in range(_CLIPS)
    ]
    return to_tubelets(torch.from_numpy(np.stack(clips)[:, : geometry.num_frames]), geometry)
