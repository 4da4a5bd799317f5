"""Pictures of a video file, by number and exactly: the only door to video files."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from everest_ds.config import DataConfig
from everest_ds.data.decode_decord import DecordVideo
from everest_ds.data.decode_pyav import PyAVVideo
from everest_ds.data.decode_torchcodec import TorchcodecVideo, import_torchcodec
from everest_ds.data.manifest import Sample
from everest_ds.data.video import Video, Window
from everest_ds.errors import ConfigError, DataError

DEFAULT_DECODER = "decord"
_MP4, _MATROSKA = "MP4", "Matroska"
# decoder -> the containers of which it gives every picture exactly; PyAV reads the rest.
_EXACT: dict[str, tuple[str, ...]] = {"decord": (_MP4,), "torchcodec": (_MP4, _MATROSKA), "pyav": ()}
_NOT_A_FILE = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def open_video(path: Path, decoder: str = DEFAULT_DECODER, short_side: int | None = None) -> Video:
    """Open a video file: through `decoder` where that is exact, through PyAV elsewhere.

    Args:
        decoder: `decord`, `pyav` or `torchcodec`.
        short_side: shrink larger pictures to this as they are decoded, pixels.

    Raises:
        DataError: the file is missing, empty, not a video, cut off, or holds no picture.
        ConfigError: the decoder is not installed.
    """
    container = _container(path)
    if container in _EXACT[decoder]:
        with suppress(DataError):  # PyAV knows more codecs, and says more plainly what is wrong
            return DecordVideo(path, short_side) if decoder == "decord" else TorchcodecVideo(path, short_side)
    return PyAVVideo(path, short_side)


def open_sample(sample: Sample, data: DataConfig) -> Video:
    """Open a sample of a manifest, as `data` says; see `open_video`."""
    video = open_video(sample.path, data.decoder, data.decode_short_side)
    return video if sample.span is None else Window(video, sample.span)


def require_decoder(decoder: str) -> None:
    """Refuse a decoder that is not installed, before any video is opened.

    Raises:
        ConfigError: naming what to install.
    """
    if decoder != "torchcodec":
        return  # the others come with this package
    given = "not installed" if find_spec("torchcodec") is None else None
    try:
        import_torchcodec()
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            "data.decoder=torchcodec cannot be used",
            given=given or f"installed, but: {str(error).strip().splitlines()[0]}",
            fix="pip install 'everest-ds[torchcodec]' and FFmpeg's libraries (apt-get install ffmpeg),"
            " or take data.decoder=decord",
        ) from None


def _container(path: Path) -> str:
    """The kind of file by its first bytes, whatever its name.

    Raises:
        DataError: no file that could be read, or nothing in it.
    """
    try:
        mode = stat.S_IFMT(os.stat(path).st_mode)
        if mode != stat.S_IFREG:
            raise DataError(f"{path}: not a file", given=_NOT_A_FILE.get(mode, "a device"))
        with open(path, "rb") as file:
            head = file.read(8)
    except FileNotFoundError:
        dangling = ", the link leads nowhere" if path.is_symlink() else ""
        raise DataError(f"{path}: no such video file{dangling}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read", given=error.strerror) from None
    if not head:
        fix = "replace the file, or take it out of the manifest"
        raise DataError(f"{path}: the video file is empty", given="0 bytes", fix=fix)
    if head[4:8] == b"ftyp":
        return _MP4
    return _MATROSKA if head[:4] == b"\x1aE\xdf\xa3" else "other"
