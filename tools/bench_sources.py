"""The forms of data that `bench_data.py` reads: videos as given, copies of them, stores and a token cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import typer
from loader_cells import CACHE, TOKENS, Cell, enough, experiment

from everest_ds.config import Experiment
from everest_ds.console import progress_of
from everest_ds.data.decoding.open_video import open_sample
from everest_ds.data.frames import ClipFrames
from everest_ds.data.ledger import Ledger
from everest_ds.data.maintenance.reencode import Encoding, plan_jobs, reencode_videos
from everest_ds.data.store.fill_cache import CacheFiller
from everest_ds.data.store.index import StoredSamples, open_store
from everest_ds.data.store.layout import Packing
from everest_ds.data.store.pack import StorePacker
from everest_ds.data.store.shard_copier import ShardCopier
from everest_ds.data.store.staging import plan_copies, read_from_stage
from everest_ds.data.store.token_cache import TokenCache, open_token_cache
from everest_ds.data.video_files import VIDEO_SUFFIXES
from everest_ds.data.video_list import Sample, read_manifest
from everest_ds.errors import DataError
from everest_ds.models.selection.packer import Packer

_STALL_S = 600.0


def find_videos(place: Path) -> list[Sample]:
    """Return the samples that are long enough for a clip, and print the others with the reason.

    Raises:
        DataError: no sample is long enough.
    """
    if place.is_dir():
        paths = sorted(p for p in place.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
        samples = [Sample(path.absolute(), 0) for path in paths]
    else:
        samples = list(read_manifest(place, root=None, num_classes=None, labelled=False))
    data = experiment(Cell("", "pyav", 0, 1), 8, 224).data
    needed, fit = ClipFrames.of(16, data).needed, []
    for sample in samples:
        try:
            with open_sample(sample, data) as video:
                if video.num_frames < needed:
                    raise DataError(f"{sample.name}: {video.num_frames} frames, but a clip spans {needed}")
            fit.append(sample)
        except DataError as error:
            typer.echo(f"left out: {error}", err=True)
    if not fit:
        raise DataError(f"{place}: no video is long enough for a clip", allowed=f"at least {needed} frames")
    return fit


def reencoded(samples: Sequence[Sample], out: Path, encoding: Encoding) -> list[Sample]:
    """Re-encode the samples, as `everest-ds data reencode` does, and return the copies."""
    out.mkdir()
    root = Path(os.path.commonpath([sample.path.parent for sample in samples]))
    with progress_of(f"re-encoding, GOP {encoding.gop}", len(samples)) as on_progress:
        made = reencode_videos(
            plan_jobs(samples, root, out),
            Ledger.read(out / "ledger"),
            encoding,
            workers=os.cpu_count() or 1,
            on_progress=on_progress,
        )
    if made.failed:
        sample, reason = made.failed[0]
        raise DataError(f"{sample.name}: cannot be re-encoded", given=reason)
    return made.samples


def packed(samples: Sequence[Sample], out: Path, packing: Packing) -> StoredSamples:
    """Pack the samples, as `everest-ds data pack` does, and return those of the store."""
    out.mkdir()
    packer = StorePacker(samples, Path("/"), out, packing, os.cpu_count() or 1)
    with progress_of("packing", len(samples)) as on_progress:
        packer.pack_all(on_progress)
    packer.finish()
    return open_store(out)


def distinct(samples: Sequence[Sample], count: int, folder: Path) -> list[Sample]:
    """Return `count` samples of names of their own, which are links to the videos of `samples` in turn.

    A store or cache of them has data of its own for each, so that one reading does not serve the next.
    """
    found = []
    for number, sample in enumerate(enough(samples, count)):
        link = folder / f"{number:06d}{sample.path.suffix}"
        link.symlink_to(sample.path)
        found.append(Sample(link, sample.label, sample.span))
    return found


def filled_cache(samples: Sequence[Sample], out: Path, batch_size: int, size: int) -> TokenCache:
    """Fill a token cache with one draw of each sample, and open it."""
    config = experiment(Cell(CACHE, TOKENS, os.cpu_count() or 1, 1), batch_size, size)
    data = config.data.model_copy(update={"token_cache": out})
    return fill_cache(config.model_copy(update={"data": data}), samples)


def fill_cache(config: Experiment, samples: Sequence[Sample]) -> TokenCache:
    """Fill the token cache of a config, as `everest-ds data cache` does, and open it."""
    assert config.data.token_cache is not None
    filler = CacheFiller(config, samples, Packer(config), config.data.token_cache)
    with progress_of("filling a token cache", len(samples)) as on_progress:
        filler.fill(on_progress)
    filler.finish()
    cache = open_token_cache(config, samples)
    assert cache is not None
    return cache


def staged(samples: StoredSamples, folder: Path) -> Sequence[Sample]:
    """Copy the shards to a folder, as `data.stage` does, and return the samples that are read from there."""
    with ShardCopier(plan_copies(folder, [samples]), _STALL_S) as copier:
        while not copier.progress(wait_s=1.0).finished:
            pass
    return read_from_stage(samples, folder)
