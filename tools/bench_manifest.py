"""Measure what a manifest costs before the first step of a run: CPU time, memory, and time until the start.

Every row is a fresh process with its children; "first" means that the cache folder is empty. To compare two
versions, run this file with PYTHONPATH set to each of them.

Example:
    python tools/bench_manifest.py --lines 1000000
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from everest_ds.data.synthetic import SyntheticSpec, synthesize

_NUM_VIDEOS = 24
_READ = """
from pathlib import Path
from everest_ds.data import order, video_list
from everest_ds.host_memory import peak_bytes
before = peak_bytes()
samples = video_list.read_manifest(Path({manifest!r}), root=None, num_classes=None, labelled=True)
print((peak_bytes() - before) // 2**20)
"""
_FINGERPRINT = _READ + "print(order.fingerprint(samples, 0) % 1000)"


class Cost(NamedTuple):
    """The cost of a command.

    Attributes:
        cpu_s: CPU seconds of the command and its children.
        wall_s: seconds until the command ended, or until its first training step.
        peak_mib: peak of the resident memory of its largest process.
        output: what it printed.
    """

    cpu_s: float
    wall_s: float
    peak_mib: float
    output: str


def write_lines(folder: Path, lines: int) -> Path:
    """Write a manifest of `lines` different paths, which links lead to a few short videos."""
    synthesize(folder, {"train": _NUM_VIDEOS}, SyntheticSpec(num_frames=20, size=32), workers=1)
    classes = folder / "kinetics_train_256"
    classes.mkdir()
    for number in range(-(-lines // _NUM_VIDEOS)):
        (classes / f"class_{number:06}").symlink_to(folder / "train")
    manifest = folder / "lines.txt"
    with open(manifest, "w", encoding="utf-8") as file:
        for n in range(lines):
            number, video = divmod(n, _NUM_VIDEOS)
            file.write(f"kinetics_train_256/class_{number:06}/{video:05}.mp4 {n % 6}\n")
    return manifest


def measure(words: Sequence[str], environment: dict[str, str], run: Path | None = None) -> Cost:
    """Run a command to its end, or until the first step of the run in the folder `run`.

    Raises:
        SystemExit: if the command fails.
    """
    before, started, peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(words, env=environment, stdout=output, stderr=subprocess.STDOUT)
        stopped = False
        while process.poll() is None:
            peak_kib = max(peak_kib, *map(_peak_kib, _family(process.pid)))
            if run is not None and not stopped and (run / "metrics.jsonl").is_file():
                stopped, wall_s = True, time.perf_counter() - started
                process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        if not stopped:
            wall_s = time.perf_counter() - started
        output.seek(0)
        text = output.read().decode()
    if process.returncode and not stopped:
        raise SystemExit(f"{' '.join(words)}: {text}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(cpu_s, wall_s, peak_kib / 1024, text)


def _family(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    found = [pid]
    for parent in found:
        with suppress(OSError):
            found += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return found


def _peak_kib(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return 0


def main() -> None:
    """Measure each reader of a manifest, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lines", type=int, default=1_000_000, help="number of lines of the manifest")
    options = parser.parse_args()
    print("| what | CPU, s | wall, s | peak, MiB | printed |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = write_lines(folder, options.lines)
        read, fingerprint = (text.format(manifest=str(manifest)) for text in (_READ, _FINGERPRINT))
        everest = [sys.executable, "-m", "everest_ds", "pretrain", "demo_pretrain", f"data.train={manifest}"]
        run = folder / "run"
        rows: dict[str, list[str]] = {
            "import": [sys.executable, "-c", "from everest_ds.data import order"],
            "dry run, first": [*everest, "--dry-run"],
            "dry run, again": [*everest, "--dry-run"],
            "read, first": [sys.executable, "-c", read],
            "read, again": [sys.executable, "-c", read],
            "read, again, and fingerprint": [sys.executable, "-c", fingerprint],
            "start of 2 ranks": [*everest, "--nproc", "2", f"run.dir={run}", "run.log_every_steps=1"],
        }
        cache = folder / "cache"
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
        for what, words in rows.items():
            if what.endswith("first"):
                shutil.rmtree(cache, ignore_errors=True)
            cost = measure(words, environment, run if what.startswith("start") else None)
            printed = " ".join(cost.output.split()) if words[1] == "-c" else ""
            print(
                f"| {what} | {cost.cpu_s:.1f} | {cost.wall_s:.1f} | {cost.peak_mib:.0f} | {printed} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
