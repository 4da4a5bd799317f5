"""Frame stores of synthetic videos."""

from __future__ import annotations

from pathlib import Path

import pytest

from everest_ds.data.data_set import read_data_set
from everest_ds.data.store.index import StoredSamples
from everest_ds.data.store.layout import Packing
from everest_ds.data.store.pack import StorePacker
from everest_ds.data.store.shards import packing_into
from everest_ds.data.video_list import SampleTable


def samples_of(source: Path) -> SampleTable:
    return read_data_set(source, root=None, num_classes=None, labelled=False)


def pack(
    manifest: Path, out: Path, packing: Packing | None = None, shard_bytes: int = 1 << 16
) -> StorePacker:
    """Pack a data set as the command does, in one worker."""
    samples = samples_of(manifest)
    with packing_into(out, [sample.file for sample in samples]):
        root = manifest if manifest.is_dir() else manifest.parent
        packer = StorePacker(samples, root, out, packing or Packing(quality=95), 1, shard_bytes)
        packer.pack_all(lambda done: None)
        packer.finish()
    return packer


@pytest.fixture(scope="session")
def packed_motion(motion_data: Path, tmp_path_factory: pytest.TempPathFactory) -> StoredSamples:
    """The training videos of the motion data in a store of several shards; tests do not change it."""
    out = tmp_path_factory.mktemp("packed") / "train.store"
    pack(motion_data / "train.txt", out)
    store = samples_of(out)
    assert isinstance(store, StoredSamples)
    return store
