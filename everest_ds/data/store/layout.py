"""The layout of a frame store on disk.

    STORE/store.json             settings, totals, and the name of the index
    STORE/index-DIGEST.npz       the place of every sample, as columns
    STORE/samples.csv            the same for people: name, label, shard, folder, frames, size
    STORE/packing-SETTINGS.jsonl the record of packing, from which it resumes
    STORE/shards/00000.tar       the frames, in tar files that any tool can unpack

A sample occupies one contiguous part of a shard. Its members are named as WebDataset groups them:

    00000042/frame.000000.jpg    the frames that are kept, by their number in the video
    00000042/frame.000002.jpg
    00000042/frame.npy           uint32 (frames, 2): size in bytes and CRC-32 of each of them
    00000042/frame.json          name of the sample, and what a person wants to know of it
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

FACTS_FILE = "store.json"
LIST_FILE = "samples.csv"
SHARDS = "shards"
BLOCK_BYTES = tarfile.BLOCKSIZE  # a member has a header of one block, and is padded to whole blocks
NPY_HEADER_BYTES = 128  # of a file that numpy.save writes for a small array
RECORD_BYTES = 8  # of the size and checksum of a frame
END_OF_TAR = bytes(2 * BLOCK_BYTES)


class StoreKind(NamedTuple):
    """A kind of folder that holds samples in shards.

    Attributes:
        title: its name in messages.
        facts_file: the file that makes the folder valid; it names the index.
        form: identifies the kind and the version of the format in that file.
        folder_option: the option or config key by which a user names the folder to write.
        fix: what writes a damaged description or index again.
        repair: what writes damaged samples again.
        other_files: names of further files of the folder.
    """

    title: str
    facts_file: str
    form: str
    folder_option: str
    fix: str
    repair: str
    other_files: tuple[str, ...] = ()


class ShardedStore(Protocol):
    """Samples that are kept in the shards of a folder: those of a frame store or of a token cache."""

    @property
    def kind(self) -> StoreKind:
        """The kind of store."""
        ...

    @property
    def shards(self) -> Path:
        """The folder of the shards: that of the store, or a copy on this node."""
        ...

    @property
    def shard(self) -> NDArray[np.int32]:
        """The number of the shard that holds each sample."""
        ...

    @property
    def parts(self) -> NDArray[np.int64]:
        """The shard, the start, the size in bytes and the CRC-32 of each part, (parts, 4)."""
        ...


FRAMES = StoreKind(
    "frame store",
    FACTS_FILE,
    "everest-ds frame store, version 1",
    "--out",
    "repeat `everest-ds data pack` with the same manifest and folder; it goes on where it stopped",
    "pack the store again: `everest-ds data pack` repairs it and keeps what is intact",
)


@dataclass(frozen=True)
class Packing:
    """The settings by which frames are put into a store.

    Attributes:
        short_side: short side of the pictures, in pixels; smaller pictures keep their size.
        quality: quality of the JPEG pictures, from 1 to 100.
        every: of each video, frames 0, `every`, 2 `every` and so on are kept.
    """

    short_side: int = 256
    quality: int = 85
    every: int = 1

    def num_kept(self, num_frames: int) -> int:
        """Return how many of a video's frames are kept."""
        return -(-num_frames // self.every)


class StoredFrames(NamedTuple):
    """The place of a sample's frames in a shard.

    Attributes:
        shard: the tar file.
        start, num_bytes: the part of it that holds the sample's members.
        checksum: CRC-32 of that part.
        records_at: offset of the content of `frame.npy` in the shard.
        records_checksum: CRC-32 of that content.
        num_frames: number of frames of the video, or of the span of it that is the sample.
        every: distance between the kept frames.
        height, width: size of the pictures, in pixels.
    """

    shard: Path
    start: int
    num_bytes: int
    checksum: int
    records_at: int
    records_checksum: int
    num_frames: int
    every: int
    height: int
    width: int


def shard_name(shard: int) -> str:
    """Return the file name of a shard."""
    return f"{shard:05d}.tar"


def member_header(name: str, num_bytes: int) -> bytes:
    """Return the header of a tar member."""
    member = tarfile.TarInfo(name)
    member.size = num_bytes
    return member.tobuf(tarfile.USTAR_FORMAT)


def tar_member(name: str, content: bytes) -> bytes:
    """Return a tar member: its header, and its content padded to whole blocks."""
    return member_header(name, len(content)) + content + bytes(padded(len(content)) - len(content))


def padded(num_bytes: int) -> int:
    """Return the size of a member's content in the tar file."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


def folder_of(number: int) -> str:
    """Return the name of the folder that holds the members of the `number`-th packed sample."""
    return f"{number:08d}"
