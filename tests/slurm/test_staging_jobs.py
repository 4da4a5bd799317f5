"""Tests of a job that stages a frame store to its nodes, and is requeued while it copies."""

from __future__ import annotations

import filecmp
import os
from pathlib import Path

import pytest

from everest_ds.data.data_set import read_data_set
from everest_ds.data.store.layout import Packing
from everest_ds.data.store.pack import StorePacker
from everest_ds.data.store.shards import packing_into
from tests.slurm.cluster import SCRIPTS, LocalCluster, Run, wait_for
from tests.training.runs import losses

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def test_a_job_requeued_while_it_copies_keeps_what_is_copied(
    cluster: LocalCluster, recipe: Path, motion_data: Path, work: Path
) -> None:
    """One shard does not arrive before the job is stopped; the first start copies the others."""
    store, words = work / "train.store", ("schedule.epochs=2", f"data.train={work / 'train.store'}")
    samples = read_data_set(motion_data / "train.txt", root=None, num_classes=None, labelled=False)
    with packing_into(store, []):
        packer = StorePacker(samples, motion_data, store, Packing(), 1, 1 << 16)
        packer.pack_all(lambda done: None)
        packer.finish()
    in_place = cluster.submit(
        SCRIPTS / "pretrain.sbatch", str(recipe), *words, f"run.dir={work / 'in-place'}"
    )
    in_place.wait("COMPLETED")
    first, *others = sorted((store / "shards").iterdir())
    content, times = first.read_bytes(), (first.stat().st_atime_ns, first.stat().st_mtime_ns)
    first.unlink()
    os.mkfifo(first)
    run, stage = Run(work / "staged"), work / "local"
    job = cluster.submit(
        SCRIPTS / "pretrain.sbatch",
        *(str(recipe), *words, f"run.dir={run.path}", f"data.stage={stage}/$SLURMD_NODENAME"),
        options=("--nodelist=node1,node2",),  # the same nodes after the requeue
    )
    wait_for(
        lambda: len(list(stage.glob("*/*/*.tar"))) == 2 * len(others), "both nodes have the other shards"
    )
    before = {copy: copy.stat().st_ino for copy in stage.glob("*/*/*.tar")}
    cluster.slurm("scancel", "--signal=USR1", job.number)
    (stop,) = wait_for(lambda: run.events(job, "stopped"), "stopped")
    assert stop.step == 0
    first.unlink()
    first.write_bytes(content)
    os.utime(first, ns=times)
    job.wait("COMPLETED")
    assert job.restarts == 1
    assert losses(run.path) == losses(work / "in-place")
    copies = sorted(stage.glob("*/*/*"))
    assert len(copies) == 2 * (len(others) + 1)
    assert {copy.parents[1].name for copy in copies} == {"node1", "node2"}
    assert all(filecmp.cmp(copy, store / "shards" / copy.name, shallow=False) for copy in copies)
    assert {copy: copy.stat().st_ino for copy in before} == before
