"""Checks of the nodes of a run before training starts, and the copying of shards to them."""

from __future__ import annotations

import secrets
import shutil
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from everest_ds.checkpoints.names import newest_step
from everest_ds.config import Experiment
from everest_ds.costs.compute import count_parameters
from everest_ds.costs.state_memory import ADAMW_BYTES, MASTER_BYTES
from everest_ds.data.store.index import StoredSamples, shards_of
from everest_ds.data.store.shard_copier import CopyProgress, ShardCopier
from everest_ds.data.store.staging import (
    STAGE_FIX,
    ShardCopy,
    Staged,
    StageRoom,
    plan_copies,
    read_from_stage,
    stage_folder,
)
from everest_ds.data.store.token_cache import CACHE, TokenCache
from everest_ds.data.video_list import Sample
from everest_ds.errors import BadNodeError, DataError, RunFolderError, StoppedError
from everest_ds.launch.node_facts import NodeFacts, clock_spread_s, collect_facts, compare_nodes, node_name
from everest_ds.log import logger
from everest_ds.training.input_files import stores_to_stage
from everest_ds.training.stop import StopReason, StopRequest
from everest_ds.units import format_bytes, format_duration

if TYPE_CHECKING:
    from everest_ds.parallel.world import World

_POLL_S = 0.5  # between two exchanges of the ranks while shards are copied
_REPORT_S = 10.0  # between two reports of the progress


def check_nodes(config: Experiment, world: World) -> dict[str, Any]:
    """Compare the nodes, measure an all-reduce and check the disk space. Call on every rank.

    Returns:
        The results as the rows of a table.

    Raises:
        BadNodeError: if a node differs from the others or has a faulty GPU; the error names the node.
        RunFolderError: if the disk has too little space for a checkpoint.
        DataError: if shards are to be staged, and all nodes have too little space for them.
    """
    from everest_ds.parallel.self_test import all_reduce_bytes_per_s, device_digest

    free_bytes = world.share(lambda: _check_disk(config))
    stage = None if config.data.stage is None else _plan_staging(config, config.task, world).description
    nodes = _facts_of_nodes(config, world)
    found = world.share(lambda: _check_nodes_agree(nodes))
    _check_digests(world, device_digest(world))
    rate = all_reduce_bytes_per_s(world)
    return {
        "nodes": f"{len(nodes)}, with the same code, packages, data and run folder",
        "gpus": nodes[0].gpus or "none",
        **({"warnings": "; ".join(found)} if found else {}),
        "clocks": f"within {clock_spread_s(nodes):.3f} s",
        "all_reduce": "not measured with one rank"
        if rate is None
        else f"{format_bytes(int(rate))}/s over {world.size} ranks",
        "disk": f"{format_bytes(free_bytes)} free, {format_bytes(_checkpoint_bytes(config))} per checkpoint",
        **({} if stage is None else {"stage": stage}),
    }


def _facts_of_nodes(config: Experiment, world: World) -> list[NodeFacts]:
    """Gather the facts about every node, collected by the first rank of each node."""
    token = world.share(lambda: _write_token(config.run.dir))
    files = world.share(lambda: _needed_files(config))
    world.barrier()
    here = collect_facts(files, token, time.time()) if world.local_rank == 0 else None
    nodes = [facts for facts in world.gather(here) if facts is not None]
    if world.is_main:
        token.unlink(missing_ok=True)
    return nodes


def _write_token(run: Path) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    token = run / f".preflight-{secrets.token_hex(8)}"
    token.write_text(secrets.token_hex(16))
    return token


def _needed_files(config: Experiment) -> list[Path]:
    """Return the files that every node must see: manifests or stores, and three videos or the token cache."""
    from everest_ds.training.samples import read_samples

    data = config.data
    files = [file for file in (data.train, data.val, data.test, data.class_names) if file is not None]
    if data.token_cache is not None:
        files.append(data.token_cache / CACHE.facts_file)
    elif data.train is not None:
        samples = read_samples(config, "train").samples
        files += [samples[row].file for row in (0, len(samples) // 2, -1)]
    return files


def _check_disk(config: Experiment) -> int:
    """Return the free disk space at the run folder in bytes, or raise an error if it is too small."""
    config.run.dir.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(config.run.dir).free, _checkpoint_bytes(config)
    if free < needed:
        raise RunFolderError(
            f"{config.run.dir}: too little disk space for a checkpoint",
            given=f"{format_bytes(free)} free",
            allowed=f"{format_bytes(needed)} or more",
            fix="free disk space, or choose another run.dir",
        )
    return free


def _checkpoint_bytes(config: Experiment) -> int:
    """Return the size of a checkpoint: the float32 weights and the two moments of AdamW."""
    return (MASTER_BYTES + ADAMW_BYTES) * count_parameters(config)


def _check_nodes_agree(nodes: Sequence[NodeFacts]) -> list[str]:
    """Return the warnings about nodes, or raise an error that names the unfit nodes."""
    found = compare_nodes(nodes)
    bad = [(node, finding) for node, finding in found if finding.status == "missing"]
    if bad:
        names = sorted({node for node, _ in bad})
        raise BadNodeError(
            f"{', '.join(names)} cannot take part",
            given="; ".join(f"{node}: {finding.detail}" for node, finding in bad[:4]),
            fix=bad[0][1].fix,
            nodes=",".join(names),
        )
    return [f"{node}: {finding.detail}" for node, finding in found]


def _check_digests(world: World, digest: str) -> None:
    found = world.gather((node_name(), digest))
    right, _ = Counter(other for _, other in found).most_common(1)[0]
    names = sorted({node for node, other in found if other != right})
    if names:
        raise BadNodeError(
            f"{', '.join(names)}: a GPU computes wrong matrix products",
            fix="exclude the node and report it to its administrators",
            nodes=",".join(names),
        )


def stage_shards(
    config: Experiment, command: str, first: Staged, world: World, run: Path | None = None
) -> Staged:
    """Copy the shards that a command reads to every node, if `data.stage` asks for it. Call on every rank.

    The first rank of each node copies; several runs that share a node share the work.

    Args:
        config: the run config.
        command: pretrain, finetune or evaluate.
        first: the samples that the command reads first, or the token cache in place of them.
        world: the ranks of the run.
        run: the run folder, in which a file `kill` ends the copying, as a stop signal does.

    Returns:
        `first`, as it is read from this node's copies.

    Raises:
        StoppedError: on every rank, after a stop request; the next start keeps the shards that are copied.
        EverestError: on every rank, if one of the nodes cannot copy the shards.
    """
    if config.data.stage is None:
        return first
    plan = _plan_staging(config, command, world)
    stopping = StopRequest(run if world.is_main else None)
    with ShardCopier(plan.copies, config.run.hang_timeout_s) as copier, stopping as stop:
        _wait_for_copies(config, copier, world, stop)
    if stop.received is not None:  # after the ranks' last exchange
        signal.raise_signal(stop.received)
    staged = read_from_stage(first, config.data.stage)
    world.together(lambda: _check_visible(staged, world.rank))
    return staged


class _StagePlan(NamedTuple):
    """The shards that this rank copies to its node, and the free space of all nodes in words."""

    copies: list[ShardCopy]
    description: str


def _plan_staging(config: Experiment, command: str, world: World) -> _StagePlan:
    """Plan the copies that the first rank of each node makes, and check that its disk has room for them."""

    def plan_node() -> tuple[list[ShardCopy], StageRoom | None]:
        return _plan_node(config, command) if world.local_rank == 0 else ([], None)

    copies, room = world.together(plan_node)
    rooms = [(node, room) for node, room in world.gather((node_name(), room)) if room is not None]
    return _StagePlan(copies, world.share(lambda: _check_rooms(rooms)))


def _plan_node(config: Experiment, command: str) -> tuple[list[ShardCopy], StageRoom]:
    assert config.data.stage is not None
    folder = stage_folder(config.data.stage)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        given = f"{folder}: {error.strerror}"
        raise DataError(
            f"data.stage: the folder cannot be created on node {node_name()}", given=given, fix=STAGE_FIX
        ) from None
    copies = plan_copies(folder, stores_to_stage(config, command))
    return copies, StageRoom.of(folder, copies)


def _check_rooms(rooms: Sequence[tuple[str, StageRoom]]) -> str:
    """Describe the node with the least space beyond its copies, or raise an error if it is too small."""
    short = [(node, room) for node, room in rooms if room.is_short]
    if not short:
        node, room = min(rooms, key=lambda entry: entry[1].free_bytes - entry[1].missing_bytes)
        return f"{room} on the fullest node, {node}"
    names = sorted({node for node, _ in short})
    subject = f"{', '.join(names)}: too little disk space to stage the shards"
    given = "; ".join(f"{node}: {room}" for node, room in short[:4])
    if len(short) < len(rooms):
        raise BadNodeError(subject, given=given, fix=STAGE_FIX, nodes=",".join(names))
    raise DataError(subject, given=given, fix=STAGE_FIX)


def _wait_for_copies(config: Experiment, copier: ShardCopier, world: World, stop: StopRequest) -> None:
    """Wait until all nodes have their copies, and report the progress; an error or stop ends all ranks."""
    began = reported = time.monotonic()
    while True:
        found = world.gather((node_name(), world.together(lambda: copier.progress(_POLL_S))))
        reason = StopReason(world.greatest(stop.reason()))
        if reason.stops:
            stop.acknowledge(reason)
            raise StoppedError(
                "stopped while shards were copied to the nodes",
                step=newest_step(config.run.dir),
                by=reason.origin,
                fix="run the same command again; it keeps the shards that are copied",
            )
        now = time.monotonic()
        finished = all(progress.finished for _, progress in found)
        if world.is_main and (finished or now - reported > _REPORT_S):
            reported = now
            logger.info("%s", _describe_progress(found, now - began))
        if finished:
            return


def _describe_progress(found: Sequence[tuple[str, CopyProgress]], seconds: float) -> str:
    """Describe the progress of the slowest node after `seconds` of copying."""
    copying = [(node, progress) for node, progress in found if progress.total_bytes]
    if not copying:
        return "no shards to stage"
    node, slowest = min(copying, key=lambda entry: entry[1].done_bytes / entry[1].total_bytes)
    others = f", the slowest of {len(copying)} nodes" if len(copying) > 1 else ""
    text = f"{format_bytes(slowest.done_bytes)} of {format_bytes(slowest.total_bytes)} are on {node}{others}"
    rate = slowest.copied_bytes / seconds
    if rate > 0:
        text += f"; {format_bytes(slowest.copied_bytes)} copied at {rate / 1e6:.0f} MB/s"
        left_s = (slowest.total_bytes - slowest.done_bytes) / rate
        text += "" if slowest.finished else f", about {format_duration(left_s)} left"
    return f"staging: {text}"


def _check_visible(staged: Sequence[Sample] | TokenCache, rank: int) -> None:
    """Check that a rank sees the copies that the first rank of its node has made."""
    if not isinstance(staged, (StoredSamples, TokenCache)):
        return
    unseen = next((file for file in shards_of(staged) if not file.is_file()), None)
    if unseen is not None:
        raise DataError(
            f"rank {rank} does not see the staged shards on {node_name()}",
            given=str(unseen),
            fix="name a folder in data.stage that all ranks of a node share",
        )
