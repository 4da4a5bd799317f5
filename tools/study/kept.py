"""The share of the moving object that the arms keep, on test videos.

Shape legend: B clips, F frames, H x W pixels, T slots, G x G places of a slot, N = T·G·G tokens, K kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from everest_ds.config import Experiment
from everest_ds.data import reading
from everest_ds.data.frames import ClipFrames
from everest_ds.data.transforms import crop_motion, view_box
from everest_ds.data.video_list import Sample, read_manifest
from everest_ds.models import Classifier
from everest_ds.models.selection.packer import Packer
from everest_ds.models.selection.selector import Selector
from everest_ds.models.tubelets import PixelMap
from study.arms import TUNED
from study.protocol import Study
from study.videos import keep_videos_in_memory, ranked_by, whole_picture

_CLIPS = 240


def object_shares(study: Study, kind: str) -> dict[str, float]:
    """Return the percentage of the moving object that lies in the tokens that an arm keeps.

    Arms that score by the embedding use initial weights. Arms that draw frames are left out: their clips show
    other moments.

    Returns:
        Name of the arm -> percentage.
    """
    keep_videos_in_memory()
    runs = [run for chain in study.chains() for run in chain if run.kind == kind]
    configs = {run.arm: run.config for run in runs if run.config.task == "finetune"}
    samples = read_manifest(study.data(kind) / "test.txt", root=None, num_classes=None, labelled=True)[
        :_CLIPS
    ]
    scene = study.spec(kind, 1)
    with ranked_by("motion", scene):
        _, moved_BTGG2 = read_clips(samples, configs["oracle"])
    object_BN = moved_BTGG2.abs().sum(dim=-1).flatten(1)
    torch.manual_seed(0)
    embedding = PixelMap(*(t.detach() for t in Classifier(configs["oracle"]).encoder.embed()))
    shares = {}
    for name, config in configs.items():
        if config.candidate_geometry == config.model.geometry:
            with ranked_by(TUNED[name].ranking, scene):
                keep_BK = kept_tokens(config, *read_clips(samples, config), embedding)
            shares[name] = float(100 * object_BN.gather(1, keep_BK).sum() / object_BN.sum())
    return shares


def read_clips(samples: Sequence[Sample], config: Experiment) -> tuple[Tensor, Tensor]:
    """Read the middle clips of videos: uint8 (B, F, H, W, 3), and how tubelets have moved (B, T, G, G, 2)."""
    geometry, clips, moved = config.candidate_geometry, [], []
    for sample in samples:
        with reading.open_sample(sample, config.data, True) as video:
            indices = ClipFrames.of(geometry.num_frames, config.data).for_view(video.num_frames, 0, 1)
            pictures = video.read_needed(indices, whole_picture)
        assert pictures.motion is not None
        clips.append(pictures.pixels)
        moved.append(crop_motion(pictures.motion, view_box(*pictures.size, 0, 1), geometry))
    return torch.stack(clips), torch.stack(moved)


def kept_tokens(
    config: Experiment, clip_BFHWC: Tensor, moved_BTGG2: Iterable[Tensor], embedding: PixelMap
) -> Tensor:
    """Return the indices (B, K) of the tokens that a config keeps of clips with this movement."""
    if config.tokens.reads_motion:
        pack = Packer(config, keeps_clips=True)
        kept = [pack(*clip)[1] for clip in zip(clip_BFHWC, moved_BTGG2, strict=True)]
        return torch.stack(kept).long()
    return Selector(config).kept(clip_BFHWC, embedding, torch.arange(len(clip_BFHWC))).keep_BK
