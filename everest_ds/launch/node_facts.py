"""The facts about each node of a run, and the comparison that finds the node that differs from the others."""

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
from pathlib import Path

from everest_ds.launch.doctor import PACKAGES, Finding, installed_version, run_probe

# With clocks further apart, log times of several nodes cannot be compared, and some file systems misbehave.
_MAX_CLOCK_SECONDS = 2.0
_NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=name,memory.total,driver_version,ecc.errors.uncorrected.volatile.total",
    "--format=csv,noheader,nounits",
)
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class NodeFacts:
    """The facts about one node that must agree with those of the other nodes.

    Attributes:
        node: name of the node.
        python: version of Python.
        code: digest of the package's sources.
        packages: package versions, in the doctor's order.
        files: size in bytes of each file that every node must see; -1 if the file is missing.
        run: text of the token file in the run folder, or the error that prevented reading it.
        clock_s: clock of the node in seconds since the Unix epoch, read at the same moment on all nodes.
        gpus: name, memory in MiB and driver version of each GPU.
        gpu_errors: number of uncorrected memory errors of each GPU that has any.
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


# Fact -> (meaning of a difference, fix).
_MUST_AGREE = {
    "python": ("another Python version", "give all nodes one environment: EVEREST_PYTHON on a shared disk"),
    "code": ("another version of everest-ds", "install the package once on a shared disk, or on all nodes"),
    "packages": ("other package versions", "give all nodes the same environment"),
    "files": ("does not see the same data", "mount the same disk on all nodes, or copy the data again"),
    "run": ("does not see the run folder", "choose a run.dir on a disk that all nodes share"),
    "gpus": ("other GPUs", "ask for nodes of one kind: sbatch --constraint or --gpus-per-node=TYPE:N"),
}


def node_name() -> str:
    """Return SLURM's name of this node, or its host name outside SLURM."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def collect_facts(files: Sequence[Path], token: Path, clock_s: float) -> NodeFacts:
    """Collect the facts about this node.

    Args:
        files: files that every node needs.
        token: file that another node has just written into the run folder.
        clock_s: time.time() right after a barrier of all nodes.
    """
    gpus, errors = _gpus()
    return NodeFacts(
        node=node_name(),
        python=platform.python_version(),
        code=code_digest(),
        packages=" ".join(f"{name}={installed_version(name) or 'none'}" for name in PACKAGES),
        files=" ".join(f"{file}={_size(file)}" for file in files),
        run=_read(token),
        clock_s=clock_s,
        gpus=gpus,
        gpu_errors=errors,
    )


@cache
def code_digest() -> str:
    """Return a digest of all Python files of this package."""
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        digest.update(f"{file.relative_to(_PACKAGE)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def compare_nodes(nodes: Sequence[NodeFacts]) -> list[tuple[str, Finding]]:
    """Return (node, finding) for each difference of a node from the majority, and each GPU or clock fault.

    With two nodes, the first counts as the reference.
    """
    found = [(n.node, _disagreement(name, n, nodes)) for name in _MUST_AGREE for n in nodes]
    found += [(n.node, _gpu_fault(n)) for n in nodes]
    found += [(n.node, _clock_fault(n, nodes)) for n in nodes]
    return [(node, finding) for node, finding in found if finding is not None]


def clock_spread_s(nodes: Sequence[NodeFacts]) -> float:
    """Return the largest difference between the nodes' clocks, in seconds, including the barrier's jitter."""
    return max(n.clock_s for n in nodes) - min(n.clock_s for n in nodes)


def _disagreement(name: str, node: NodeFacts, nodes: Sequence[NodeFacts]) -> Finding | None:
    usual, _ = Counter(getattr(n, name) for n in nodes).most_common(1)[0]
    here = getattr(node, name)
    if here == usual:
        return None
    what, fix = _MUST_AGREE[name]
    return Finding(name, "missing", f"{what}: {_difference(here, usual)}", fix, required=True)


def _difference(here: str, usual: str) -> str:
    """Describe the difference of two facts: word by word for lists of equal length, otherwise as a whole."""
    left, right = here.split(), usual.split()
    if len(left) == len(right) > 1:
        words = [(a, b) for a, b in zip(left, right, strict=True) if a != b][:3]
        return ", ".join(f"{a} (elsewhere {b.rpartition('=')[2]})" for a, b in words)
    return f"{here or 'none'} (elsewhere {usual or 'none'})"


def _gpu_fault(node: NodeFacts) -> Finding | None:
    if not node.gpu_errors:
        return None
    fix = "exclude the node and report it to its administrators"
    return Finding(
        "gpu_errors", "missing", f"uncorrected memory errors: {node.gpu_errors}", fix, required=True
    )


def _clock_fault(node: NodeFacts, nodes: Sequence[NodeFacts]) -> Finding | None:
    middle = sorted(n.clock_s for n in nodes)[len(nodes) // 2]
    if abs(node.clock_s - middle) < _MAX_CLOCK_SECONDS:
        return None
    detail = f"the node's clock is {node.clock_s - middle:+.1f} s off"
    return Finding("clock", "warning", detail, "ask the administrators to check the node's time service")


def _gpus() -> tuple[str, str]:
    """Return the GPUs and the memory errors that nvidia-smi reports, or two empty texts if it is missing."""
    if shutil.which(_NVIDIA_SMI[0]) is None:
        return "", ""
    outcome = run_probe(_NVIDIA_SMI, all_lines=True)
    if not outcome.succeeded:
        return "", f"nvidia-smi failed: {outcome.line}"
    rows = [line.rsplit(", ", 1) for line in outcome.line.splitlines()]
    errors = [
        f"GPU {number}: {count}"
        for number, (_, count) in enumerate(rows)
        if count.isdigit() and int(count) > 0
    ]
    return "; ".join(name for name, _ in rows), ", ".join(errors)


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
