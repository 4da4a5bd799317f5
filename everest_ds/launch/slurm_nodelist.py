"""SLURM's node lists and task counts, read without `scontrol`, and the hosts on which ranks run."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from everest_ds.errors import UsageError

_RANGE = r"[0-9]{1,18}(?:-[0-9]{1,18})?"
_ELEMENT = rf"(?:[^\[\],\s]|\[{_RANGE}(?:,{_RANGE})*\])+"
_NODELIST = re.compile(rf"{_ELEMENT}(?:,{_ELEMENT})*")
_PIECE = re.compile(r"\[[^\]]*\]|[^\[\]]+")
_TASK_COUNT = re.compile(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?")
# SLURM's own bound on one range (MAX_RANGE), so that a mistyped digit cannot exhaust the memory.
MAX_HOSTS = 64 * 1024


def expand_nodelist(nodelist: str) -> list[str]:
    """Expand a node list such as `gpu-a[01-03,07],login` to host names, as `scontrol show hostnames` does.

    Raises:
        UsageError: if the notation is malformed or names more than `MAX_HOSTS` hosts.
    """
    if not _NODELIST.fullmatch(nodelist):
        raise _malformed(nodelist)
    hosts: list[str] = []
    for element in re.finditer(_ELEMENT, nodelist):
        pieces = _PIECE.findall(element.group())
        choices = [_choices(piece, nodelist) for piece in pieces]
        if len(hosts) + math.prod(len(choice) for choice in choices) > MAX_HOSTS:
            raise _malformed(nodelist)
        hosts.extend("".join(parts) for parts in _in_slurms_order(pieces, choices))
    return hosts


def expand_task_counts(counts: str) -> list[int]:
    """Expand SLURM_TASKS_PER_NODE to the number of tasks on each node: `4(x2),3` -> `[4, 4, 3]`.

    Raises:
        UsageError: if the notation is malformed.
    """
    tasks: list[int] = []
    for item in counts.split(","):
        match = _TASK_COUNT.fullmatch(item)
        repeat = int(match[2] or 1) if match else 0
        if match is None or not 0 < repeat <= MAX_HOSTS:
            raise UsageError(
                "the SLURM task counts are malformed", given=repr(counts), allowed="a list such as 4(x2),3"
            )
        tasks.extend([int(match[1])] * repeat)
    return tasks


class RankPlace(NamedTuple):
    """The host of one rank, and the rank's number on that host."""

    rank: int
    host: str
    local_rank: int


def place_ranks(hosts: Sequence[str], ranks_per_node: int) -> list[RankPlace]:
    """Assign consecutive ranks to each host, beginning with rank 0 on the first host.

    The ranks of a host are consecutive, so that tensor-parallel groups stay within one host.
    """
    return [
        RankPlace(node * ranks_per_node + local_rank, host, local_rank)
        for node, host in enumerate(hosts)
        for local_rank in range(ranks_per_node)
    ]


def hosts_of(nodelist: str, num_nodes: int) -> list[str]:
    """Return the hosts that `--nodelist` names.

    Raises:
        UsageError: if the notation is malformed, or the list does not name `num_nodes` different hosts.
    """
    hosts = expand_nodelist(nodelist)
    if len(hosts) != len(set(hosts)) or len(hosts) != num_nodes:
        raise UsageError(
            "--nodelist and --nodes disagree",
            given=f"{len(hosts)} hosts named, {len(set(hosts))} of them different, with --nodes {num_nodes}",
            fix="name as many hosts as --nodes asks for, each once",
        )
    return hosts


def _in_slurms_order(pieces: Sequence[str], choices: Sequence[Sequence[str]]) -> Iterator[Sequence[str]]:
    """Yield all combinations in SLURM's order: the last bracket varies fastest, then the first, and so on."""
    last = max((i for i, piece in enumerate(pieces) if piece.startswith("[")), default=0)
    for before in itertools.product(*reversed(choices[:last])):
        for after in itertools.product(*choices[last:]):
            yield (*reversed(before), *after)


def _choices(piece: str, nodelist: str) -> Sequence[str]:
    """Return the texts that one piece expands to: the piece itself, or every number in its brackets."""
    if not piece.startswith("["):
        return [piece]
    numbers: list[str] = []
    for item in piece[1:-1].split(","):
        first, _, last = item.partition("-")
        span = range(int(first), int(last or first) + 1)
        if not 0 < len(span) <= MAX_HOSTS:
            raise _malformed(nodelist)
        numbers.extend(f"{number:0{len(first)}d}" for number in span)
    return numbers


def _malformed(nodelist: str) -> UsageError:
    return UsageError(
        "the SLURM node list is malformed or too long",
        given=repr(nodelist),
        allowed=f"a list such as node[1-3,7],gpu-a[01-10], with at most {MAX_HOSTS} hosts",
    )
