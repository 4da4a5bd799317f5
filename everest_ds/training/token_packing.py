"""Packing of clips in the loader's workers, and their restoring on the device.

Shape legend: B clips, N tokens, K kept tokens, P values of a tubelet.
"""

from __future__ import annotations

from everest_ds.config import Experiment
from everest_ds.config.checks import can_pack_tokens
from everest_ds.config.tokens import ClipGeometry
from everest_ds.data.clip_batches import PackedBatch
from everest_ds.models.selection.packer import Packer
from everest_ds.models.tubelets import from_tubelets


def training_packer(config: Experiment) -> Packer | None:
    """Return what selects the tokens of training clips in the loader; None if the model does."""
    if not (config.data.sends_tokens or config.tokens.reads_motion):
        return None
    return Packer(config, keeps_clips=not config.data.sends_tokens)


def possible_packer(config: Experiment) -> Packer | None:
    """Return the packer of a run that may set `data.pack_tokens`, whether it does or not; None for others."""
    return training_packer(config) or (Packer(config) if can_pack_tokens(config) else None)


def unpack(batch: PackedBatch, geometry: ClipGeometry) -> PackedBatch:
    """Restore the clips of a packed batch on its device; whole clips stay as they are.

    Discarded tubelets are black; the model does not read them.
    """
    if batch.holds_clips:
        return batch
    tubelets_BKP, keep_BK = batch.clip, batch.kept.long()
    pixels_BNP = tubelets_BKP.new_zeros(len(tubelets_BKP), geometry.num_tokens, tubelets_BKP.shape[2])
    pixels_BNP.scatter_(1, keep_BK[:, :, None].expand_as(tubelets_BKP), tubelets_BKP)
    return batch._replace(clip=from_tubelets(pixels_BNP, geometry), kept=keep_BK)
