"""Damage videos in many ways, check them as `everest-ds data check` does, and report the faults it misses.

Example:
    python tools/mutate_videos.py FOLDER_OF_VIDEOS --count 1000 --json mutations.json

Every mutant must end up in the ledger, either broken with a reason or intact, and no check may crash or hang.
The mutants that count as intact are then read as in training.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from everest_ds.config import DataConfig
from everest_ds.data.decoding.open_video import open_sample
from everest_ds.data.ledger import Ledger, Usable, exclude
from everest_ds.data.maintenance.check import check_manifest
from everest_ds.data.maintenance.isolation import Lost, map_isolated
from everest_ds.data.video_files import VIDEO_SUFFIXES
from everest_ds.data.video_list import Sample, write_manifest
from everest_ds.errors import DataError

Random = np.random.Generator
CLIP_FRAMES = 16


class Mutant(NamedTuple):
    """A damaged copy of a video.

    Attributes:
        path: the damaged file.
        kind: the kind of damage, a key of KINDS.
        source: the original file.
    """

    path: Path
    kind: str
    source: Path


def _truncate(source: Path, target: Path, rng: Random) -> None:
    data = source.read_bytes()
    target.write_bytes(data[: int(rng.integers(1, len(data)))])


def _flip(source: Path, target: Path, rng: Random, share: float) -> None:
    data = np.frombuffer(source.read_bytes(), np.uint8).copy()
    count = max(1, int(share * len(data)))
    data[rng.integers(len(data), size=count)] ^= rng.integers(1, 256, size=count, dtype=np.uint8)
    target.write_bytes(data.tobytes())


def _flip_header(source: Path, target: Path, rng: Random) -> None:
    data = np.frombuffer(source.read_bytes(), np.uint8).copy()
    data[rng.integers(4096, size=16)] ^= rng.integers(1, 256, size=16, dtype=np.uint8)
    target.write_bytes(data.tobytes())


def _hole(source: Path, target: Path, rng: Random) -> None:
    data = bytearray(source.read_bytes())
    length = len(data) // 20
    start = int(rng.integers(len(data) - length))
    data[start : start + length] = bytes(length)
    target.write_bytes(data)


def _wrong_extension(source: Path, target: Path, rng: Random) -> None:
    others = [suffix for suffix in VIDEO_SUFFIXES if suffix != source.suffix]
    shutil.copy(source, target.with_suffix(str(rng.choice(others))))


def _not_a_video(source: Path, target: Path, rng: Random) -> None:
    target.write_bytes(rng.bytes(int(rng.integers(1, 50_000))))


def _symlink_loop(source: Path, target: Path, rng: Random) -> None:
    back = target.with_name(f"{target.name}.back")
    back.symlink_to(target)
    target.symlink_to(back)


def _unreadable(source: Path, target: Path, rng: Random) -> None:
    shutil.copy(source, target)
    target.chmod(0)


KINDS: dict[str, Callable[[Path, Path, Random], object]] = {
    "truncated": _truncate,
    "a flipped byte": partial(_flip, share=0.0),
    "0.1 % of bytes flipped": partial(_flip, share=1e-3),
    "5 % of bytes flipped": partial(_flip, share=0.05),
    "header flipped": _flip_header,
    "a hole of zeros": _hole,
    "wrong extension": _wrong_extension,
    "not a video": _not_a_video,
    "empty": lambda source, target, rng: target.touch(),
    "directory": lambda source, target, rng: target.mkdir(),
    "symlink loop": _symlink_loop,
    "dangling symlink": lambda source, target, rng: target.symlink_to(target.with_name("gone")),
    "pipe": lambda source, target, rng: os.mkfifo(target),
    "unreadable": _unreadable,
}


def mutate(sources: Sequence[Path], folder: Path, count: int, seed: int) -> list[Mutant]:
    """Write `count` mutants, cycling through the kinds of damage and the source files."""
    rng = np.random.default_rng(seed)
    mutants = []
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        source = sources[(number // len(KINDS)) % len(sources)]
        target = folder / f"{number:05d}{source.suffix}"
        KINDS[kind](source, target, rng)
        (path,) = folder.glob(f"{number:05d}.*[!k]")  # the suffix may have changed
        mutants.append(Mutant(path, kind, source))
    return mutants


def digest(sample: Sample) -> str:
    """Return a hash of all frames, or the error if some frame cannot be read."""
    total = hashlib.sha256()
    try:
        with open_sample(sample, DataConfig()) as video:
            for frames in video.read_all():
                total.update(frames.numpy().tobytes())
    except DataError as error:
        return f"error: {error}"
    return total.hexdigest()


def read_clip(sample: Sample) -> str:
    """Read a clip as in training; return the error, or an empty string."""
    try:
        with open_sample(sample, DataConfig()) as video:
            last = video.num_frames - 1
            video.read([min(index, last) for index in range(0, 4 * CLIP_FRAMES, 4)])
    except DataError as error:
        return str(error)
    return ""


class Outcome(NamedTuple):
    """The result of checking the mutants.

    Attributes:
        usable: the mutants that count as intact, and those excluded with their faults.
        ledger: the ledger after the check.
        seconds: duration of the check.
        resumed_known: number of mutants that a second check found in the ledger.
    """

    usable: Usable
    ledger: Ledger
    seconds: float
    resumed_known: int


def check(
    mutants: Sequence[Mutant], folder: Path, every_frame: bool, workers: int, timeout_s: float
) -> Outcome:
    """Check the mutants twice; the second check must find all of them in the ledger."""
    samples = [Sample(mutant.path, 0) for mutant in mutants]
    manifest = folder / "mutants.txt"
    write_manifest(manifest, samples, folder)
    options: dict[str, Any] = {"min_frames": 1, "workers": workers, "timeout_s": timeout_s}
    start = time.monotonic()
    first = Ledger.of_manifest(manifest)
    check_manifest(samples, first, DataConfig(), on_progress=_say, every_frame=every_frame, **options)
    seconds = time.monotonic() - start
    ledger = Ledger.of_manifest(manifest)
    again = check_manifest(samples, ledger, DataConfig(), on_progress=lambda done: None, **options)
    return Outcome(exclude(samples, ledger), ledger, seconds, again.num_known)


def report(
    mutants: Sequence[Mutant], outcome: Outcome, workers: int, timeout_s: float
) -> list[dict[str, Any]]:
    """Build one row per kind of damage, comparing files that count as intact with their sources by frame."""
    reasons = {problem.sample.path: problem.reason for problem in outcome.usable.excluded}
    whole = [mutant for mutant in mutants if mutant.path not in reasons]
    sources = sorted({mutant.source for mutant in mutants})
    isolated = partial(map_isolated, workers=workers, timeout_s=timeout_s)
    originals = {sources[i]: d for i, d in isolated(digest, [Sample(path, 0) for path in sources])}
    digests = {whole[i]: d for i, d in isolated(digest, [Sample(mutant.path, 0) for mutant in whole])}
    clips = {whole[i]: e for i, e in isolated(read_clip, [Sample(mutant.path, 0) for mutant in whole])}
    rows = []
    for kind in KINDS:
        group = [mutant for mutant in mutants if mutant.kind == kind]
        left = [mutant for mutant in group if mutant.path not in reasons]
        found = [_short(reasons[mutant.path]) for mutant in group if mutant.path in reasons]
        rows.append(
            {
                "kind": kind,
                "files": len(group),
                "broken": len(found),
                "whole": len(left),
                "of these unharmed": sum(digests[m] == originals[m.source] for m in left),
                "clip fails": sum(clips[m] != "" for m in left),
                "crash or hang": sum("decoder crashed" in r or "decoder hung" in r for r in found)
                + sum(isinstance(clips[m], Lost) for m in left),
                "commonest reason": next(iter(collections.Counter(found).most_common(1)), ("-", 0))[0],
            }
        )
    return rows


def _short(reason: str) -> str:
    return reason.split(";")[0].rstrip("0123456789[], ")


def _say(done: int) -> None:
    if done % 100 == 0:
        print(f"{done} checked", flush=True)


def obey_permissions() -> None:
    """Make file permissions apply to processes started from now on, even to those of root."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; fails harmlessly if not root


def main() -> None:
    """Damage and check the videos named on the command line, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("videos", type=Path, help="folder of intact videos")
    parser.add_argument("--count", type=int, default=1000, help="number of damaged copies")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="number of processes")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds until a read counts as hung")
    parser.add_argument("--every-frame", action="store_true", help="check all frames, not only two")
    parser.add_argument("--json", type=Path, help="write the results to this file as JSON")
    options = parser.parse_args()
    sources = sorted(path for path in options.videos.iterdir() if path.suffix in VIDEO_SUFFIXES)
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    mutants = mutate(sources, folder, options.count, options.seed)
    obey_permissions()
    outcome = check(mutants, folder, options.every_frame, options.workers, options.timeout)
    rows = report(mutants, outcome, options.workers, options.timeout)
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    accounted = len(outcome.usable.samples) + len(outcome.usable.excluded)
    facts = {
        "mutants": len(mutants),
        "usable": len(outcome.usable.samples),
        "excluded": len(outcome.usable.excluded),
        "accounted": accounted,
        "known to a second check": outcome.resumed_known,
        "seconds": round(outcome.seconds, 1),
    }
    print(facts)
    if options.json:
        options.json.write_text(json.dumps({"facts": facts, "kinds": rows}, indent=1))
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
