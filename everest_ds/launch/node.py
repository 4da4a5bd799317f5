"""What a node of a run looks like, and which of several nodes differ from the rest. Builds on the doctor."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from everest_ds.launch.doctor import PACKAGES, Finding, run_probe

# Further apart, times in logs of several nodes cannot be compared, and some file systems misbehave.
_MAX_CLOCK_SECONDS = 2.0
_NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=name,memory.total,driver_version,ecc.errors.uncorrected.volatile.total",
    "--format=csv,noheader,nounits",
)
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class NodeFacts:
    """One node.

    Attributes:
        code: digest of the package's sources.
        packages: versions, in the doctor's order.
        files: bytes of each file that all should see, -1 for one that is not there.
        run: what it reads in the run folder; an error's text if it cannot.
        clock_s: seconds since the epoch at a moment that is the same on all nodes.
        gpus: name, MiB and driver of each.
        gpu_errors: memory errors that were not corrected, of each GPU that has some.
    """

    node: str
    python: str
    code: str
    packages: str
    files: str
    run: str
    clock_s: float
    gpus: str
    gpu_errors: str


# fact -> (what its difference means, what to do about it)
_MUST_AGREE = {
    "python": ("another Python", "give all nodes the same environment: EVEREST_PYTHON on a shared disk"),
    "code": ("another copy of everest-ds", "install it once on a shared disk, or on all nodes"),
    "packages": ("other package versions", "give all nodes the same environment"),
    "files": ("does not see the same data", "mount the same disk, or copy the data again"),
    "run": ("does not see the run folder", "choose a run.dir on a disk that all nodes share"),
    "gpus": ("other GPUs", "ask for nodes of one kind: sbatch --constraint or --gpus-per-node=TYPE:N"),
}


def node_name() -> str:
    """SLURM's name of this node, else its own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def look(files: Sequence[Path], token: Path, clock_s: float) -> NodeFacts:
    """The facts of this node.

    Args:
        files: that every node needs.
        token: a file that another node has just written into the run folder.
        clock_s: time.time() right after all nodes met.
    """
    gpus, errors = _gpus()
    return NodeFacts(
        node=node_name(),
        python=platform.python_version(),
        code=code_digest(),
        packages=" ".join(f"{name}={_version(name)}" for name in PACKAGES),
        files=" ".join(f"{file}={_size(file)}" for file in files),
        run=_read(token),
        clock_s=clock_s,
        gpus=gpus,
        gpu_errors=errors,
    )


@cache
def code_digest() -> str:
    """Of all Python files of this package."""
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        digest.update(f"{file.relative_to(_PACKAGE)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def compare(nodes: Sequence[NodeFacts]) -> list[tuple[str, Finding]]:
    """What is wrong with which node; empty if all are alike. One to one, the first is right."""
    found = [(n.node, _differs(name, n, nodes)) for name in _MUST_AGREE for n in nodes]
    found += [(n.node, _gpu_errors(n)) for n in nodes]
    found += [(n.node, _clock(n, nodes)) for n in nodes]
    return [(node, finding) for node, finding in found if finding is not None]


def clock_spread_s(nodes: Sequence[NodeFacts]) -> float:
    """How far the nodes' clocks are apart; what it takes to meet is part of it."""
    return max(n.clock_s for n in nodes) - min(n.clock_s for n in nodes)


def _differs(name: str, node: NodeFacts, nodes: Sequence[NodeFacts]) -> Finding | None:
    usual, _ = Counter(getattr(n, name) for n in nodes).most_common(1)[0]
    here = getattr(node, name)
    if here == usual:
        return None
    what, fix = _MUST_AGREE[name]
    return Finding(name, "missing", f"{what}: {_difference(here, usual)}", fix, required=True)


def _difference(here: str, usual: str) -> str:
    """The words in which they differ, if they are lists of words as long as each other."""
    left, right = here.split(), usual.split()
    if len(left) == len(right) > 1:
        words = [(a, b) for a, b in zip(left, right, strict=True) if a != b][:3]
        return ", ".join(f"{a} (elsewhere {b.rpartition('=')[2]})" for a, b in words)
    return f"{here or 'none'} (elsewhere {usual or 'none'})"


def _gpu_errors(node: NodeFacts) -> Finding | None:
    if not node.gpu_errors:
        return None
    fix = "exclude the node and tell its administrators"
    return Finding(
        "gpu_errors", "missing", f"uncorrected memory errors: {node.gpu_errors}", fix, required=True
    )


def _clock(node: NodeFacts, nodes: Sequence[NodeFacts]) -> Finding | None:
    middle = sorted(n.clock_s for n in nodes)[len(nodes) // 2]
    if abs(node.clock_s - middle) < _MAX_CLOCK_SECONDS:
        return None
    detail = f"its clock is {node.clock_s - middle:+.1f} s off"
    return Finding("clock", "warning", detail, "have its time service looked at")


def _gpus() -> tuple[str, str]:
    """The GPUs that nvidia-smi sees, and the errors it counts; empty texts without it."""
    if shutil.which(_NVIDIA_SMI[0]) is None:
        return "", ""
    outcome = run_probe(_NVIDIA_SMI, all_lines=True)
    if not outcome.succeeded:
        return "", f"nvidia-smi fails: {outcome.line}"
    rows = [line.rsplit(", ", 1) for line in outcome.line.splitlines()]
    errors = [
        f"GPU {number}: {count}"
        for number, (_, count) in enumerate(rows)
        if count.isdigit() and int(count) > 0
    ]
    return "; ".join(name for name, _ in rows), ", ".join(errors)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1


def _read(token: Path) -> str:
    try:
        return token.read_text()
    except OSError as error:
        return str(error)
