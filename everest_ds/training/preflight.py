"""Checks of the nodes of a run, made before training starts."""

from __future__ import annotations

import secrets
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everest_ds.config import Experiment
from everest_ds.costs.compute import count_parameters
from everest_ds.costs.state_memory import ADAMW_BYTES, MASTER_BYTES
from everest_ds.data.store.token_cache import CACHE
from everest_ds.errors import BadNodeError, RunFolderError
from everest_ds.launch.node_facts import NodeFacts, clock_spread_s, collect_facts, compare_nodes, node_name
from everest_ds.units import format_bytes

if TYPE_CHECKING:
    from everest_ds.parallel.world import World


def check_nodes(config: Experiment, world: World) -> dict[str, Any]:
    """Compare the nodes, measure an all-reduce and check the disk space. Call on every rank.

    Returns:
        The results as the rows of a table.

    Raises:
        BadNodeError: if a node differs from the others or has a faulty GPU; the error names the node.
        RunFolderError: if the disk has too little space for a checkpoint.
    """
    from everest_ds.parallel.self_test import all_reduce_bytes_per_s, device_digest

    free_bytes = world.share(lambda: _check_disk(config))
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
