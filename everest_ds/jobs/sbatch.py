"""The sbatch command of a job, and the settings of a site that it needs; nothing here calls SLURM.

A command stays a list of arguments all the way to the trainer, so that no shell interprets a user's text.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path

from everest_ds.errors import UsageError, nearest

# Options of sbatch without a value, or with one only after `=`. All others take the next word as their value.
_FLAGS = frozenset(
    "--contiguous --exclusive --get-user-env --hold --ignore-pbs --kill-on-invalid-dep --nice --no-kill"
    " --no-requeue --overcommit --oversubscribe --parsable --propagate --quiet --reboot --requeue"
    " --spread-job --test-only --use-min-nodes --verbose -H -O -Q -k -s -v".split()
)
# Option of sbatch that `submit` rejects, because it would bypass our checks -> option to use instead.
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
# The file's name is an argument of bash and not part of the script, so that bash cannot execute the name.
_PRINT_VARIABLES = 'set -a; source "$1" >&2 && env -0'
_BASH_SECONDS = 30.0
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class JobShape:
    """The number of nodes of a job, and of GPUs and ranks on each node.

    Attributes:
        gpus_per_node: GPUs on each node; 0 if the ranks run on CPUs.
        ranks_per_node: ranks on each node; equals `gpus_per_node` on nodes with GPUs.
    """

    nodes: int = 1
    gpus_per_node: int = 0
    ranks_per_node: int = 1

    @property
    def num_ranks(self) -> int:
        """The number of ranks on all nodes together."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class BatchJob:
    """The arguments of one call of sbatch.

    Attributes:
        script: batch script in slurm/.
        arguments: arguments of the script, passed on unchanged.
        logs: folder of the job's output; None for the folder in which sbatch is called.
        options: further options of sbatch, such as `--qos=high`, passed on unchanged.
        environment: variables that the script sees in addition to the caller's environment.
    """

    script: Path
    arguments: tuple[str, ...]
    name: str
    shape: JobShape
    logs: Path | None = None
    time: str | None = None
    partition: str | None = None
    array: str | None = None
    dependency: str | None = None
    nodelist: str | None = None
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def sbatch_command(job: BatchJob) -> list[str]:
    """Return the sbatch command of a job as a list of words; equal jobs give equal commands."""
    return ["sbatch", "--parsable", *_named_options(job), *job.options, str(job.script), *job.arguments]


def as_shell(words: Sequence[str]) -> str:
    """Return the words as one line, quoted so that a shell splits it back into the same words."""
    return shlex.join(words)


def job_name(command: str, run: Path) -> str:
    """Return the job name for `squeue`: command and run folder, with unusual characters replaced by `_`."""
    return _NOT_IN_A_NAME.sub("_", f"everest-{command}-{run.name}")[:80]


def split_options(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate sbatch's options from positional words; `--qos high` and `--qos=high` are both options.

    Returns:
        The positional words, and the options with their values.

    Raises:
        UsageError: if `submit` rejects an option; the error names the option to use instead.
    """
    positional: list[str] = []
    options: list[str] = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("-") or word == "-":
            positional.append(word)
            continue
        is_long = word.startswith("--")
        name, has_value = (word.partition("=")[0], "=" in word) if is_long else (word[:2], len(word) > 2)
        if name in _OURS:
            raise UsageError(
                "submit does not accept this sbatch option", given=word, fix=f"use {_OURS[name]}"
            )
        options.append(word)
        if not has_value and word not in _FLAGS:
            options.extend(islice(rest, 1))
    return positional, options


def signal_seconds(options: Sequence[str]) -> int | None:
    """Return the lead time of the signal, in seconds before the end of the job, or None without `--signal`.

    The time is read from `--signal=[B:]USR1@SECONDS` among the options.
    """
    given = " ".join(options).partition("--signal")[2]
    match = _SIGNAL.match(given)
    return int(match[1]) if match else None


def signalling(options: Sequence[str], default: str | None) -> list[str]:
    """Return the options, with a `--signal` for the value that sbatch takes if the options have none.

    Args:
        options: options of sbatch.
        default: the value, from SBATCH_SIGNAL; None if it is not set.
    """
    if default is None or any(option.partition("=")[0] == "--signal" for option in options):
        return list(options)
    return [*options, f"--signal={default}"]


def check_signal(options: Sequence[str], time_limit: str | None) -> None:
    """Refuse a `--signal` among the options that would stop the job as soon as it starts.

    Raises:
        UsageError: if the lead time of the signal is not shorter than the time limit.
    """
    limit_s, lead_s = limit_seconds(time_limit), signal_seconds(options)
    if limit_s is not None and lead_s is not None and lead_s >= limit_s:
        raise UsageError(
            "--signal would stop the job as soon as it starts",
            given=f"{lead_s} s before the end of a job of {limit_s} s",
            fix="leave out --signal, or give a longer --time",
        )


def exporting(options: Sequence[str], default: str | None, names: Iterable[str]) -> list[str]:
    """Return the options, with an `--export` that passes the named variables to the job if none does so yet.

    Without `--export` sbatch passes all variables. `NONE` and `NIL` pass none, and `NONE` has the job read
    its user's login environment, which only `--get-user-env` does once variables are named.

    Args:
        options: options of sbatch.
        default: the value that sbatch takes if the options have no `--export`.
        names: variables that the scripts in slurm/ read.
    """
    given = default
    for option, following in pairwise((*options, "")):
        name, has_value, value = option.partition("=")
        if name == "--export":
            given = value if has_value else following
    if given is None or "ALL" in given.upper().split(","):
        return list(options)
    nothing = given.upper() in ("NONE", "NIL")
    passed = ",".join([*([] if nothing else [given]), *names])
    return [*options, f"--export={passed}", *(["--get-user-env"] if given.upper() == "NONE" else [])]


def limit_seconds(time_limit: str | None) -> int | None:
    """Convert a `--time` value to seconds as sbatch does, or return None if there is no limit.

    The formats are M, M:S, H:M:S, D-H, D-H:M and D-H:M:S.
    """
    match = _LIMIT.fullmatch(time_limit or "")
    if match is None:
        return None
    days, parts = match["d"], [int(part) for part in match["parts"].split(":")]
    units = (3600, 60, 1) if days or len(parts) == 3 else (60, 1)
    seconds = sum(part * unit for part, unit in zip(parts, units, strict=False))
    return 86400 * int(days or 0) + seconds or None


def find_cluster_file(name: str, folder: Path) -> Path:
    """Find a cluster file by its name in `folder`, or any file by its path.

    Raises:
        UsageError: if there is no such file.
    """
    file = Path(name) if "/" in name else folder / f"{name}.env"
    if not file.is_file():
        known = [path.stem for path in folder.glob("*.env")]
        raise UsageError(
            "--cluster: no such settings file",
            given=repr(name),
            allowed=f"{nearest(name, known)} or a file's path",
        )
    return file.resolve()


def read_cluster_file(file: Path) -> dict[str, str]:
    """Return the variables that matter before a job starts: SBATCH_... and EVEREST_PYTHON.

    Raises:
        UsageError: if bash cannot read the file.
    """
    words = ["bash", "-c", _PRINT_VARIABLES, "bash", str(file)]
    try:
        done = subprocess.run(words, capture_output=True, timeout=_BASH_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"{file}: bash cannot read it", given=str(error)) from None
    if done.returncode:
        reason = " ".join(done.stderr.decode(errors="replace").split())
        raise UsageError(f"{file}: bash cannot read it", given=reason)
    pairs = (os.fsdecode(item).partition("=") for item in done.stdout.split(b"\0") if item)
    return {name: value for name, _, value in pairs if name.startswith("SBATCH_") or name == "EVEREST_PYTHON"}


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
    """Return the `--output` pattern of a job, with the folder's special characters escaped for SLURM.

    SLURM expands % in the whole path. A backslash anywhere in the path turns the expansion off, and each
    backslash must be doubled.
    """
    path = str(folder.absolute())
    if "\\" in path:
        return path.replace("\\", "\\\\") + "/slurm.out"
    return path.replace("%", "%%") + ("/slurm-%A_%a.out" if is_array else "/slurm-%j.out")
