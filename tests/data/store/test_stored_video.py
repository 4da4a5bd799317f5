"""Tests of reading from a store: the frames are those of the tar file, and damage is named."""

from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch

from everest_ds.config import DataConfig
from everest_ds.data.decoding.open_video import open_sample
from everest_ds.data.decoding.video import Need, Size
from everest_ds.data.ledger import Ledger
from everest_ds.data.maintenance.check import check_manifest
from everest_ds.data.store.index import StoredSamples
from everest_ds.data.store.layout import Packing
from everest_ds.data.store.pack import name_in_store
from everest_ds.data.store.stored_video import check_stored
from everest_ds.data.video_list import Sample
from everest_ds.errors import DataError
from tests.data.conftest import noisy_pictures, write_video
from tests.data.store.conftest import pack, samples_of


def frames_in_tar(sample: Sample) -> dict[int, np.ndarray]:
    """Decode a sample's frames with tarfile and simplejpeg alone; its folder is found by its offset."""
    assert sample.stored is not None
    with tarfile.open(sample.stored.shard) as shard:
        first = next(member for member in shard if member.offset == sample.stored.start)
        folder = first.name.partition("/")[0]
        found = {}
        for member in shard:
            if match := re.fullmatch(folder + r"/frame\.(\d{6})\.jpg", member.name):
                content = shard.extractfile(member)
                assert content is not None
                found[int(match[1])] = simplejpeg.decode_jpeg(content.read())
    return found


def test_frames_are_those_of_the_tar_file_by_number(packed_motion: StoredSamples) -> None:
    for sample in (packed_motion[0], packed_motion[11], packed_motion[-1]):
        expected = frames_in_tar(sample)
        with open_sample(sample, DataConfig()) as video:
            assert sorted(expected) == list(range(video.num_frames))
            wanted = [19, 0, 7, 7, 3]
            assert np.array_equal(video.read(wanted), np.stack([expected[i] for i in wanted]))
            with pytest.raises(DataError, match="no such frame; given: \\[20\\]; allowed: 0..19"):
                video.read([20])


def test_a_frame_that_is_not_kept_is_represented_by_the_kept_one_before_it(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", noisy_pictures(11, 48, 64))
    (tmp_path / "list.txt").write_text("a.mp4\n")
    pack(tmp_path / "list.txt", tmp_path / "store", Packing(every=4))
    (sample,) = samples_of(tmp_path / "store")
    expected = frames_in_tar(sample)
    assert sorted(expected) == [0, 4, 8]
    with open_sample(sample, DataConfig()) as video:
        assert video.num_frames == 11
        every = video.read(range(11)).numpy()
    assert all(np.array_equal(every[i], expected[i // 4 * 4]) for i in range(11))


def test_pictures_shrink_as_those_of_a_file_do(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", noisy_pictures(2, 96, 130), crf="1")
    (tmp_path / "list.txt").write_text("a.mp4\n")
    pack(tmp_path / "list.txt", tmp_path / "store", Packing(quality=100))
    data = DataConfig(decoder="pyav", decode_short_side=48)
    pictures = []
    for source in ("list.txt", "store"):
        (sample,) = samples_of(tmp_path / source)
        with open_sample(sample, data) as video:
            pictures.append(
                video.read_needed([0, 1], lambda size: Need(range(48), range(65), 8))
            )  # smaller is not needed
    assert pictures[0].size == pictures[1].size == Size(65, 48)
    assert pictures[0].pixels.shape == pictures[1].pixels.shape
    assert (pictures[0].pixels.float() - pictures[1].pixels.float()).abs().mean() < 12  # of a noisy texture


def test_only_the_needed_part_is_decoded(packed_motion: StoredSamples) -> None:
    asked = []

    def need(size: Size) -> Need:
        asked.append(size)
        return Need(range(6), range(32), 2)

    with open_sample(packed_motion[3], DataConfig()) as video:
        part = video.read_needed([4, 2], need)
    assert asked == [Size(32, 32)]
    assert part.pixels.shape == (2, 8, 16, 3)  # a row of blocks, halved
    assert part.reduction == 2
    assert part.size == Size(32, 32)


def copied(store: StoredSamples, folder: Path) -> StoredSamples:
    shutil.copytree(store.shards.parent, folder)
    again = samples_of(folder)
    assert isinstance(again, StoredSamples)
    return again


@pytest.mark.parametrize(
    ("part", "found", "read"),
    [
        ("frame", "frame 13 is damaged", True),
        ("padding of a frame", "a header or description", False),
        ("header of a frame", "a header or description", False),
        ("records", "the list of its frames is damaged", True),
        ("description", "a header or description", False),
    ],
)
def test_a_flipped_byte_in_any_part_of_a_sample_is_found_and_named(
    packed_motion: StoredSamples, tmp_path: Path, part: str, found: str, read: bool
) -> None:
    """Training notices damage of what it reads, and a check that of all parts."""
    store = copied(packed_motion, tmp_path / "store")
    sample, other = store[5], store[6]
    assert sample.stored is not None
    with tarfile.open(sample.stored.shard) as shard:
        members = [
            m
            for m in shard
            if sample.stored.start <= m.offset < sample.stored.start + sample.stored.num_bytes
        ]
        frame = next(member for member in members if member.name.endswith("frame.000013.jpg"))
        place = {
            "frame": frame.offset_data + frame.size // 2,
            "padding of a frame": frame.offset_data + frame.size,
            "header of a frame": frame.offset + 30,
            "records": sample.stored.records_at + 140,
            "description": members[-1].offset_data + 5,
        }[part]
    frames = np.stack(list(frames_in_tar(sample).values()))
    content = bytearray(sample.stored.shard.read_bytes())
    content[place] ^= 0x40
    sample.stored.shard.write_bytes(content)
    store = samples_of(tmp_path / "store")  # type: ignore[assignment]
    with pytest.raises(DataError, match=f"{re.escape(sample.name)}: {found}.*{sample.stored.shard.name}"):
        check_stored(sample.path, sample.stored)
    if read:
        with pytest.raises(DataError, match=found), open_sample(sample, DataConfig()) as video:
            video.read([12, 13])
    else:
        with open_sample(sample, DataConfig()) as video:
            assert np.array_equal(video.read(range(20)), frames)
    checked = check_manifest(
        [sample, other],
        Ledger.of_manifest(tmp_path / "store"),
        DataConfig(),
        min_frames=1,
        workers=1,
        on_progress=lambda done: None,
    )
    assert [problem.sample for problem in checked.problems] == [sample]


def test_a_missing_or_short_shard_is_named(packed_motion: StoredSamples, tmp_path: Path) -> None:
    store = copied(packed_motion, tmp_path / "store")
    sample = store[0]
    assert sample.stored is not None
    os.truncate(sample.stored.shard, sample.stored.start + 700)
    with pytest.raises(DataError, match="this shard of the frame store is cut off"):
        open_sample(sample, DataConfig())
    gone = replace(sample, stored=sample.stored._replace(shard=tmp_path / "gone.tar"))
    with pytest.raises(DataError, match="gone.tar: this shard of the frame store is missing"):
        open_sample(gone, DataConfig())


def test_reading_leaves_nothing_open_beyond_a_bound(packed_motion: StoredSamples) -> None:
    for _ in range(3):
        for sample in packed_motion:
            with open_sample(sample, DataConfig()) as video:
                assert isinstance(video.read([0]), torch.Tensor)
    opened = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    shards = [name for name in opened if name.startswith(str(packed_motion.shards))]
    assert len(shards) == len(set(shards)) <= 64


def test_names_count_from_the_root(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    assert name_in_store(Sample(root / "a" / "b.mp4", 1, (3, 9)), root) == "a/b.mp4#3-9"
    assert (
        name_in_store(Sample(root / ".." / "other" / "c.mp4", 1), root) == str(tmp_path / "other/c.mp4")[1:]
    )


def test_the_records_are_an_ordinary_numpy_file(packed_motion: StoredSamples) -> None:
    stored = packed_motion[2].stored
    assert stored is not None
    with tarfile.open(stored.shard) as shard:
        member = next(m for m in shard if m.offset_data == stored.records_at)
        content = shard.extractfile(member)
        assert content is not None
        records = np.load(io.BytesIO(content.read()))
    assert records.shape == (20, 2)
    assert records.dtype == np.uint32
