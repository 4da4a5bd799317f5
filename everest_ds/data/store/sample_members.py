"""The members of one sample in a shard, written as a file of their own before they are appended to it."""

from __future__ import annotations

import io
import json
import os
import time
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from everest_ds.config import DataConfig
from everest_ds.data.decoding.open_video import open_sample
from everest_ds.data.decoding.video import Size, Video
from everest_ds.data.maintenance.picture_error import check_psnr, psnr_db
from everest_ds.data.store import jpeg
from everest_ds.data.store.layout import BLOCK_BYTES, Packing, folder_of, tar_member
from everest_ds.data.video_list import Sample
from everest_ds.errors import DataError

_NUM_VERIFIED = 8  # pictures of each sample that are decoded again and compared


class PackTask(NamedTuple):
    """A sample to be packed.

    Attributes:
        sample: the sample.
        name: its name in the store.
        number: its number, after which its folder in the shard is named.
        part: the file to write its members to.
    """

    sample: Sample
    name: str
    number: int
    part: Path


class PackedPart(NamedTuple):
    """The content of the file of a packed sample.

    Attributes:
        num_bytes, checksum: its size and CRC-32.
        records_at, records_checksum: offset and CRC-32 of the content of `frame.npy` in it.
        num_frames: number of frames of the sample.
        height, width: size of the pictures, in pixels.
        psnr_db: lowest peak signal-to-noise ratio of the verified pictures' brightness.
        cpu_s: processor time that packing the sample took, in seconds.
    """

    num_bytes: int
    checksum: int
    records_at: int
    records_checksum: int
    num_frames: int
    height: int
    width: int
    psnr_db: float
    cpu_s: float


def write_part(task: PackTask, packing: Packing) -> PackedPart | str:
    """Write the file of one sample and verify it; return its content, or what is wrong with the sample.

    Raises:
        OSError: if the file cannot be written.
    """
    begin = time.process_time()
    # PyAV is exact for every file and can shrink pictures.
    reading = DataConfig(decoder="pyav", decode_short_side=packing.short_side)
    try:
        with open_sample(task.sample, reading) as video, open(task.part, "wb") as stream:
            written = _Members(stream, folder_of(task.number))
            worst_db = _write_frames(video, written, packing)
            num_frames, (width, height) = video.num_frames, written.size
            records_at, records = written.add_records()
            facts = {"num_frames": num_frames, "every": packing.every, "height": height, "width": width}
            written.add("frame.json", json.dumps({"name": task.name, **facts}).encode())
    except DataError as error:
        task.part.unlink(missing_ok=True)
        return str(error).removeprefix(f"{task.sample.path}: ")
    spent = time.process_time() - begin
    place = (written.num_bytes, written.checksum, records_at, zlib.crc32(records))
    return PackedPart(*place, num_frames, height, width, round(worst_db, 2), round(spent, 3))


class _Members:
    """The tar members of a sample, as they are written."""

    def __init__(self, stream: BinaryIO, folder: str) -> None:
        self.num_bytes = 0
        self.checksum = 0
        self.size = Size(0, 0)  # size of the pictures
        self._stream = stream
        self._folder = folder
        self._records: list[tuple[int, int]] = []

    def add_frame(self, number: int, data: bytes) -> None:
        """Add the encoded frame with this number."""
        self.add(f"frame.{number:06d}.jpg", data)
        self._records.append((len(data), zlib.crc32(data)))

    def add_records(self) -> tuple[int, bytes]:
        """Add the sizes and checksums of the frames; return the offset of that content, and the content."""
        stream = io.BytesIO()
        np.save(stream, np.array(self._records, "<u4"))
        content = stream.getvalue()
        return self.add("frame.npy", content), content

    def add(self, name: str, content: bytes) -> int:
        """Add a member, and return the offset of its content."""
        member = tar_member(f"{self._folder}/{name}", content)
        self._stream.write(member)
        self.checksum = zlib.crc32(member, self.checksum)
        self.num_bytes += len(member)
        return self.num_bytes - len(member) + BLOCK_BYTES


def _write_frames(video: Video, written: _Members, packing: Packing) -> float:
    """Encode the frames of a video that are kept; return the lowest PSNR of those verified, in dB."""
    num_kept = packing.num_kept(video.num_frames)
    verified = set(np.linspace(0, num_kept - 1, _NUM_VERIFIED).astype(int).tolist())
    worst_db, number = float("inf"), 0
    for pictures in video.read_all(packing.every):
        written.size = Size(pictures.shape[2], pictures.shape[1])
        for picture in pictures.numpy():
            data = jpeg.encode(picture, packing.quality)
            written.add_frame(number * packing.every, data)
            if number in verified:
                again = jpeg.decode(data, written.size)
                # Of the brightness, because the encoder halves the resolution of colours.
                worst_db = min(worst_db, psnr_db(picture.mean(axis=2), again.mean(axis=2)))
            number += 1
    check_psnr(worst_db)
    return worst_db


def append_part(part: Path, shard: BinaryIO, expected: PackedPart) -> None:
    """Append the file of a sample to an open shard.

    Raises:
        OSError: if the shard cannot be written, or the file is not as it was written.
    """
    checksum = 0
    with open(part, "rb") as stream:
        while block := stream.read(1 << 20):
            shard.write(block)
            checksum = zlib.crc32(block, checksum)
    if checksum != expected.checksum:
        raise OSError(0, "a file has changed between writing and reading it", str(part))
    shard.flush()
    os.unlink(part)
