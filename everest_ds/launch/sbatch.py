"""The sbatch command of a job, as a pure function of what is asked: nothing here calls SLURM.

Commands are lists of arguments from here to the trainer; no shell reads a user's name in between.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from everest_ds.errors import UsageError

# sbatch's options that take no value, or one only after `=`. Every other takes the next word as its value.
_FLAGS = frozenset(
    "--contiguous --exclusive --get-user-env --hold --ignore-pbs --kill-on-invalid-dep --nice --no-kill"
    " --no-requeue --overcommit --oversubscribe --parsable --propagate --quiet --reboot --requeue"
    " --spread-job --test-only --use-min-nodes --verbose --wait -H -O -Q -W -k -s -v".split()
)
# Options that would change the number of ranks behind the back of what was checked.
_OURS = {
    **dict.fromkeys(("-N", "--ntasks", "-n"), "--nodes with --gpus-per-node or --ntasks-per-node"),
    **dict.fromkeys(("-G", "--gpus", "--gpus-per-task", "--ntasks-per-gpu", "--gres"), "--gpus-per-node"),
    **dict.fromkeys(("-a",), "--array"),
    **dict.fromkeys(("-d",), "--dependency"),
    **dict.fromkeys(("-w",), "--nodelist"),
    **dict.fromkeys(("-o", "--output", "-e", "--error"), "run.dir; a job's output is in RUN/logs"),
    **dict.fromkeys(("--wrap", "--test-only"), "--dry-run"),
}
_SIGNAL = re.compile(r"[= ](?:[RB]+:)?[A-Z0-9]+@([0-9]{1,9})(?: |$)")
_LIMIT = re.compile(r"(?:(?P<d>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
_SIGNAL_SECONDS = 300  # before the end: what the scripts of slurm/ ask for
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Shape:
    """The ranks of a job.

    Attributes:
        gpus_per_node: 0: ranks on CPUs.
        ranks_per_node: equals `gpus_per_node` where there are GPUs.
    """

    nodes: int = 1
    gpus_per_node: int = 0
    ranks_per_node: int = 1

    @property
    def num_ranks(self) -> int:
        """All ranks."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class BatchJob:
    """One call of sbatch.

    Attributes:
        script: of slurm/.
        arguments: the script's, each passed on as it is.
        logs: folder of the job's output; None: where sbatch is called.
        options: sbatch's own, such as `--qos=high`, unchanged.
        environment: what the script shall see besides the caller's environment.
    """

    script: Path
    arguments: tuple[str, ...]
    name: str
    shape: Shape
    logs: Path | None = None
    time: str | None = None
    partition: str | None = None
    array: str | None = None
    dependency: str | None = None
    nodelist: str | None = None
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def sbatch_command(job: BatchJob) -> list[str]:
    """The words of the command; equal jobs give equal commands."""
    return ["sbatch", "--parsable", *_named_options(job), *job.options, str(job.script), *job.arguments]


def as_shell(words: Sequence[str]) -> str:
    """The words as one line that a shell reads back to exactly them."""
    return shlex.join(words)


def job_name(command: str, run: Path) -> str:
    """What `squeue` shows: the command and the run folder's name, without what terminals trip over."""
    return _NOT_IN_A_NAME.sub("_", f"everest-{command}-{run.name}")[:80]


def split_options(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate sbatch's options from positional words; `--qos high` and `--qos=high` are both options.

    Raises:
        UsageError: an option that has a name of its own here.
    """
    positional: list[str] = []
    options: list[str] = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("-") or word == "-":
            positional.append(word)
            continue
        _refuse_ours(word)
        options.append(word)
        if _takes_next(word):
            options.extend(value for value in [next(rest, None)] if value is not None)
    return positional, options


def signal_seconds(options: Sequence[str]) -> int | None:
    """How long before the end SLURM shall send a signal: of `--signal=[B:]USR1@SECONDS` among the options."""
    given = " ".join(options).partition("--signal")[2]
    match = _SIGNAL.match(given)
    return int(match[1]) if match else None


def with_timely_signal(options: Sequence[str], time_limit: str | None) -> list[str]:
    """The options, with a `--signal` that leaves three quarters of a short time limit to the run.

    SLURM sends the scripts' own five minutes before the end: at once, if the limit is no longer.
    """
    limit_s, given = limit_seconds(time_limit), any(word.partition("=")[0] == "--signal" for word in options)
    if given or limit_s is None or limit_s >= 4 * _SIGNAL_SECONDS:
        return list(options)
    return [*options, f"--signal=USR1@{max(1, limit_s // 4)}"]


def limit_seconds(time_limit: str | None) -> int | None:
    """`--time` in seconds, as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; None: no limit."""
    match = _LIMIT.fullmatch(time_limit or "")
    if match is None:
        return None
    days, parts = match["d"], [int(part) for part in match["parts"].split(":")]
    units = (3600, 60, 1) if days or len(parts) == 3 else (60, 1)
    seconds = sum(part * unit for part, unit in zip(parts, units, strict=False))
    return 86400 * int(days or 0) + seconds or None


def _takes_next(word: str) -> bool:
    attached = "=" in word if word.startswith("--") else len(word) > 2
    return not attached and word not in _FLAGS


def _refuse_ours(word: str) -> None:
    name = word.partition("=")[0] if word.startswith("--") else word[:2]
    if name in _OURS:
        raise UsageError("submit does not pass this sbatch option on", given=word, fix=f"use {_OURS[name]}")


def _named_options(job: BatchJob) -> list[str]:
    values = {
        "--job-name": job.name,
        "--nodes": str(job.shape.nodes),
        "--ntasks-per-node": str(job.shape.ranks_per_node),
        "--gpus-per-node": str(job.shape.gpus_per_node) if job.shape.gpus_per_node else None,
        "--time": job.time,
        "--partition": job.partition,
        "--array": job.array,
        "--nodelist": job.nodelist,
        "--dependency": job.dependency,
        "--kill-on-invalid-dep": "yes" if job.dependency else None,
        "--output": None if job.logs is None else _output_pattern(job.logs, job.array is not None),
    }
    return [f"{name}={value}" for name, value in values.items() if value is not None]


def _output_pattern(folder: Path, is_array: bool) -> str:
    """SLURM expands % in the whole path; a backslash anywhere turns that off, and each must be doubled."""
    path = str(folder.absolute())
    if "\\" in path:
        return path.replace("\\", "\\\\") + "/slurm.out"
    return path.replace("%", "%%") + ("/slurm-%A_%a.out" if is_array else "/slurm-%j.out")
