"""Exact decoding of a video's pictures by number; all reading of videos goes through this module."""

from __future__ import annotations

import ctypes
import os
import stat
from contextlib import suppress
from importlib.util import find_spec
from itertools import count
from pathlib import Path

from everest_ds.config import DataConfig
from everest_ds.data.decoding.decord import DecordVideo
from everest_ds.data.decoding.probe import Header, probe
from everest_ds.data.decoding.pyav import PyAVVideo
from everest_ds.data.decoding.torchcodec import TorchcodecVideo, import_torchcodec
from everest_ds.data.decoding.video import NoMotionError, Video, Window, shrunk
from everest_ds.data.store.stored_video import StoredVideo
from everest_ds.data.video_list import Sample
from everest_ds.errors import ConfigError, DataError

DEFAULT_DECODER = "pyav"
# Decoder -> the containers and codecs from which it returns every picture exactly, as found by the tests;
# PyAV reads all others. For MPEG-4 and HEVC in MP4, decord 0.6.0 returns neighbouring pictures; for VP8,
# torchcodec counts pictures that are never shown; for AVI with reordered pictures, neither is right.
_EXACT: dict[str, tuple[set[str], set[str]]] = {
    "decord": ({"mp4"}, {"h264", "vp9"}),
    "torchcodec": ({"mp4", "matroska"}, {"h264", "hevc", "vp9", "av1", "mpeg4"}),
}
_TRIM_EVERY = 50  # number of opened files after which free memory is returned to the system
_opened = count(1)
_NOT_A_FILE = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def open_video(
    path: Path, decoder: str = DEFAULT_DECODER, short_side: int | None = None, with_motion: bool = False
) -> Video:
    """Open a video file with `decoder` if it reads the file exactly, else with PyAV.

    Args:
        path: the file.
        decoder: `decord`, `pyav` or `torchcodec`.
        short_side: shrink larger pictures to this short side as they are decoded, in pixels.
        with_motion: also read the motion vectors, which only PyAV does.

    Raises:
        DataError: if the file is missing, empty, not a video, cut off, or holds no picture.
        NoMotionError: if motion vectors are wanted and the stream has none.
        ConfigError: if the decoder is not installed.
    """
    _check_file(path)
    if next(_opened) % _TRIM_EVERY == 0:
        _give_back_memory()
    if decoder in _EXACT and not with_motion and _is_exact(decoder, probe(path), short_side):
        with suppress(DataError):  # PyAV, used next, reports faults more clearly
            return DecordVideo(path) if decoder == "decord" else TorchcodecVideo(path)
    return PyAVVideo(path, short_side, with_motion)


def open_sample(sample: Sample, data: DataConfig, with_motion: bool = False) -> Video:
    """Open a sample of a manifest with the decoder and picture size of `data`; see `open_video`."""
    if sample.stored is not None:
        if with_motion:
            raise NoMotionError(sample.path, "a frame store, whose pictures are coded one by one")
        return StoredVideo(sample.path, sample.stored, data.decode_short_side)
    video = open_video(sample.path, data.decoder, data.decode_short_side, with_motion)
    return video if sample.span is None else Window(video, sample.span)


def require_decoder(decoder: str) -> None:
    """Check, before any video is opened, that a decoder is installed.

    Raises:
        ConfigError: if the decoder is not installed; the error names the packages to install.
    """
    if decoder != "torchcodec":
        return  # the other decoders are dependencies of this package
    given = "not installed" if find_spec("torchcodec") is None else None
    try:
        import_torchcodec()
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            "data.decoder=torchcodec cannot be used",
            given=given or f"installed, but: {str(error).strip().splitlines()[0]}",
            fix="pip install 'everest-ds[torchcodec]' and FFmpeg's libraries (apt-get install ffmpeg),"
            " or use data.decoder=pyav",
        ) from None


def require_motion(sample: Sample, data: DataConfig) -> None:
    """Check that a sample has motion vectors; a sample that cannot be read passes.

    Raises:
        NoMotionError: if it has none.
    """
    try:
        open_sample(sample, data, with_motion=True).close()
    except NoMotionError:
        raise
    except DataError:
        pass  # the loader reports it, and replaces the sample


def _is_exact(decoder: str, header: Header, short_side: int | None) -> bool:
    """Return whether the decoder returns the same frames of this file as PyAV."""
    if shrunk(header.size, short_side) is not None:
        return False  # each decoder scales pictures differently
    if decoder == "torchcodec" and any(side % 2 for side in header.size):
        return False  # the chroma of odd sizes depends on FFmpeg's version
    if decoder == "decord" and not header.has_closed_groups:
        return False  # decord returns neighbouring frames
    if header.oddities:
        return False
    containers, codecs = _EXACT[decoder]
    return bool(header.containers & containers) and header.codec in codecs


def _give_back_memory() -> None:
    """Return free memory to the system, as glibc keeps a growing amount of it between FFmpeg's buffers."""
    with suppress(AttributeError):  # only glibc has malloc_trim, and only glibc needs it
        ctypes.CDLL(None).malloc_trim(0)


def _check_file(path: Path) -> None:
    """Raise an error if `path` is not a readable, non-empty file; from a pipe, FFmpeg would wait for data."""
    try:
        mode = stat.S_IFMT(os.stat(path).st_mode)
        if mode != stat.S_IFREG:
            raise DataError(f"{path}: not a file", given=_NOT_A_FILE.get(mode, "a device"))
        with open(path, "rb") as file:
            empty = not file.read(1)
    except FileNotFoundError:
        dangling = ", the symbolic link is broken" if path.is_symlink() else ""
        raise DataError(f"{path}: no such video file{dangling}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read", given=error.strerror) from None
    if empty:
        fix = "replace the file, or remove it from the manifest"
        raise DataError(f"{path}: the video file is empty", given="0 bytes", fix=fix)
