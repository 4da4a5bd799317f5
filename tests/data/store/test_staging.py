"""Tests of the copies of a store on a node: they are whole, up to date and shared."""

from __future__ import annotations

import filecmp
import multiprocessing
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from everest_ds.config import DataConfig
from everest_ds.data.decoding.open_video import open_sample
from everest_ds.data.ledger import stamp
from everest_ds.data.order import fingerprint
from everest_ds.data.store import shard_copier
from everest_ds.data.store.index import StoredSamples, open_store, shards_of
from everest_ds.data.store.layout import ShardedStore
from everest_ds.data.store.shard_copier import CopyProgress, ShardCopier
from everest_ds.data.store.staging import ShardCopy, StageRoom, plan_copies, read_from_stage, stage_folder
from everest_ds.errors import ConfigError, DataError
from everest_ds.log import logger

_forked = multiprocessing.get_context("fork")


@pytest.fixture
def store(packed_motion: StoredSamples, tmp_path: Path) -> StoredSamples:
    """A store of several shards, which the test may change."""
    folder = packed_motion.shards.parent
    return open_store(Path(shutil.copytree(folder, tmp_path / folder.name)))


def stage(store: ShardedStore, folder: Path, stall_s: float = 60.0) -> CopyProgress:
    with ShardCopier(plan_copies(folder, [store]), stall_s) as copier:
        while True:
            progress = copier.progress(0.05)
            if progress.finished:
                return progress


def copies_of(store: StoredSamples, folder: Path) -> list[Path]:
    staged = read_from_stage(store, folder)
    assert isinstance(staged, StoredSamples)
    return list(shards_of(staged))


def assert_staged(store: StoredSamples, folder: Path) -> None:
    """Compare all copies with the shards, byte by byte; nothing else is in the folder."""
    copies = copies_of(store, folder)
    assert len(copies) > 3
    for shard, copy in zip(shards_of(store), copies, strict=True):
        assert filecmp.cmp(shard, copy, shallow=False)
        assert stamp(shard) == stamp(copy)
    assert sorted(copies[0].parent.iterdir()) == copies


def test_samples_are_the_same_and_are_read_from_the_copies(store: StoredSamples, tmp_path: Path) -> None:
    progress = stage(store, tmp_path / "local")
    total = sum(shard.stat().st_size for shard in shards_of(store))
    assert progress == CopyProgress(total, total, total, True)
    assert_staged(store, tmp_path / "local")
    shutil.rmtree(store.shards)
    staged = read_from_stage(store, tmp_path / "local")
    assert [(s.name, s.label) for s in staged] == [(s.name, s.label) for s in store]
    assert fingerprint(staged, 0) == fingerprint(store, 0)
    with open_sample(staged[5], DataConfig()) as video:
        assert len(video.read(range(0, 20, 4))) == 5


def test_what_is_there_is_not_copied_again(store: StoredSamples, tmp_path: Path) -> None:
    stage(store, tmp_path / "local")
    before = [copy.stat() for copy in copies_of(store, tmp_path / "local")]
    progress = stage(store, tmp_path / "local")
    assert progress.copied_bytes == 0
    assert progress.done_bytes == progress.total_bytes
    assert [copy.stat() for copy in copies_of(store, tmp_path / "local")] == before


def flip(file: Path, place: int = 5000) -> None:
    with open(file, "r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 0x40]))


def as_if_packed_again(file: Path) -> None:
    os.utime(file, ns=(0, file.stat().st_mtime_ns - 3 * 10**9))


@pytest.mark.parametrize(
    "change", [flip, lambda file: os.truncate(file, 700), Path.unlink, as_if_packed_again, Path.touch]
)
def test_only_a_copy_that_has_changed_is_copied_anew(
    store: StoredSamples, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    stage(store, tmp_path / "local")
    changed = copies_of(store, tmp_path / "local")[1]
    change(changed)
    progress = stage(store, tmp_path / "local")
    assert_staged(store, tmp_path / "local")
    assert progress.copied_bytes == changed.stat().st_size


def test_two_stores_do_not_meet_and_a_part_of_a_store_shares_its_copies(
    store: StoredSamples, packed_motion: StoredSamples, tmp_path: Path
) -> None:
    part = store.without(range(8, len(store)))
    assert isinstance(part, StoredSamples)
    stage(part, tmp_path / "local")
    assert set(copies_of(part, tmp_path / "local")) < set(copies_of(store, tmp_path / "local"))
    others = set(shards_of(store)) - set(shards_of(part))
    assert stage(store, tmp_path / "local").copied_bytes == sum(shard.stat().st_size for shard in others)
    both = plan_copies(tmp_path / "local", [store, packed_motion, store])
    assert len({shard.target for shard in both}) == len(both) == 2 * len(shards_of(store))


def in_process(act: Callable[..., object], *args: object) -> int | None:
    """Run `act` in a forked process and return its exit code."""
    process = _forked.Process(target=act, args=args)
    process.start()
    process.join(60)
    return process.exitcode


def killed_after(blocks: int, store: StoredSamples, folder: Path) -> None:
    """Stage, and kill this process when it has read so many blocks, or when it names its second copy."""
    countdown, names = iter(range(blocks, 0, -1)), iter((False, True))

    def counted(original: Callable[..., Iterator[bytes]]) -> Callable[..., Iterator[bytes]]:
        def read(*args: Any) -> Iterator[bytes]:
            for block in original(*args):
                if next(countdown, 0) == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield block

        return read

    def replace(source: Path, target: Path) -> None:
        if next(names, False):
            os.kill(os.getpid(), signal.SIGKILL)
        os.rename(source, target)

    shard_copier._BLOCK_BYTES = 4096
    shard_copier._blocks = counted(shard_copier._blocks)
    if blocks == 0:
        shard_copier.os.replace = replace  # type: ignore[assignment]
    stage(store, folder)


def test_a_kill_at_any_moment_leaves_no_half_copy(store: StoredSamples, tmp_path: Path) -> None:
    folder, done = tmp_path / "local", []
    for blocks in (1, 5, 0, 40, 200):
        assert in_process(killed_after, blocks, store, folder) == -signal.SIGKILL
        whole = list(folder.glob("*/*.tar"))
        for copy in whole:
            assert filecmp.cmp(store.shards / copy.name, copy, shallow=False)
        done.append(len(whole))
    assert done == sorted(done)
    assert 0 < done[-1]
    assert list(folder.glob("*/.*.partial"))
    there = sum(copy.stat().st_size for copy in folder.glob("*/*.tar"))
    progress = stage(store, folder)
    assert progress.copied_bytes == progress.total_bytes - there
    assert_staged(store, folder)


def stage_and_tell(store: StoredSamples, folder: Path, told: Any) -> None:
    shard_copier._BLOCK_BYTES = 1024
    told.put(stage(store, folder).copied_bytes)


def test_processes_that_stage_at_once_share_the_work(store: StoredSamples, tmp_path: Path) -> None:
    told = _forked.SimpleQueue()
    processes = [
        _forked.Process(target=stage_and_tell, args=(store, tmp_path / "local", told)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    copied = [told.get() for _ in processes]
    for process in processes:
        process.join()
    assert_staged(store, tmp_path / "local")
    assert sum(copied) == sum(shard.stat().st_size for shard in shards_of(store))


def fail_on_a_full_disk(store: StoredSamples, folder: Path, told: Any) -> None:
    limit = max(shard.stat().st_size for shard in shards_of(store)) - 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # the largest shard does not fit
    try:
        stage(store, folder)
    except DataError as error:
        told.put(str(error))


def test_a_disk_that_becomes_full_is_named(store: StoredSamples, tmp_path: Path) -> None:
    folder, told = tmp_path / "local", _forked.SimpleQueue()
    assert in_process(fail_on_a_full_disk, store, folder, told) == 0
    message = told.get()
    assert re.match(rf"{folder}/everest-ds-\w+: shards cannot be copied to this folder", message)
    assert "given: File too large; fix: free disk space" in message
    assert not list(folder.glob("*/.*"))
    stage(store, folder)
    assert_staged(store, folder)


def test_room_is_compared_with_what_is_missing(store: StoredSamples, tmp_path: Path) -> None:
    folder = tmp_path / "local"
    folder.mkdir()
    total = sum(shard.stat().st_size for shard in shards_of(store))
    assert StageRoom.of(folder, plan_copies(folder, [store])).missing_bytes == total
    stage(store, folder)
    assert StageRoom.of(folder, plan_copies(folder, [store])).missing_bytes == 0
    changed = copies_of(store, folder)[0]
    size = changed.stat().st_size
    os.truncate(changed, size - 100)  # it is removed before it is copied, so only its difference is missing
    changed.rename(changed.with_name(f".{changed.name}.partial"))
    assert StageRoom.of(folder, plan_copies(folder, [store])).missing_bytes == 100
    os.truncate(next(iter(shards_of(store))), shutil.disk_usage(folder).free + (1 << 30))
    room = StageRoom.of(folder, plan_copies(folder, [store]))
    assert room.is_short
    assert re.fullmatch(r"[\d.]+ GiB to copy, [\d.]+ GiB free", str(room))


def test_damage_in_the_store_is_copied_and_left_to_the_readers(
    store: StoredSamples, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    shards = list(shards_of(store))
    flip(shards[0])
    os.truncate(shards[1], shards[1].stat().st_size - 3000)
    stage(store, tmp_path / "local")
    assert_staged(store, tmp_path / "local")
    warned = sorted(record.getMessage() for record in caplog.records)
    assert warned == [f"{shard}: damaged samples or draws in this shard: 1" for shard in shards[:2]]


@pytest.mark.parametrize("times", [1, 9])
def test_a_copy_that_differs_from_its_shard_is_written_again_and_then_refused(
    store: StoredSamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """The disk forgets what was written, as a broken one does."""
    sync, left, copies = os.fsync, iter(range(times)), copies_of(store, tmp_path / "local")

    def forget(descriptor: int) -> None:
        if next(left, None) is not None:
            os.pwrite(descriptor, bytes(600), 1500)
        sync(descriptor)

    monkeypatch.setattr(shard_copier.os, "fsync", forget)
    if times == 1:
        assert stage(store, tmp_path / "local").finished
        assert_staged(store, tmp_path / "local")
        return
    with pytest.raises(
        DataError, match=r"/\d+\.tar: the copy differs from .*; fix: name a folder on another"
    ):
        stage(store, tmp_path / "local")
    assert all(filecmp.cmp(store.shards / copy.name, copy) for copy in copies if copy.exists())


def test_a_shard_that_is_missing_or_unreadable_is_named(store: StoredSamples, tmp_path: Path) -> None:
    shard = list(shards_of(store))[2]
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard}: this shard of the frame store is missing; fix: restore"):
        plan_copies(tmp_path / "local", [store])
    shard.mkdir()
    with pytest.raises(DataError, match=f"{shard}: cannot be read; given: Is a directory"):
        stage(store, tmp_path / "local")


def test_a_store_that_changes_in_the_meantime_is_refused(store: StoredSamples, tmp_path: Path) -> None:
    copies = plan_copies(tmp_path / "local", [store])
    with open(copies[3].source, "ab") as stream:
        stream.write(bytes(512))
    with (
        ShardCopier(copies, 60.0) as copier,
        pytest.raises(
            DataError, match=f"{copies[3].source}: the shard changed while it was copied; fix: wait"
        ),
    ):
        while not copier.progress(0.05).finished:
            pass
    assert not copies[3].target.exists()


def test_storage_that_no_longer_answers_ends_the_copying(store: StoredSamples, tmp_path: Path) -> None:
    shard = list(shards_of(store))[2]
    shard.unlink()
    os.mkfifo(shard)  # opening it blocks, as on a dead network file system
    with pytest.raises(DataError, match="makes no progress; given: no byte for 1 s; fix: check the storage"):
        stage(store, tmp_path / "local", stall_s=0.5)
    os.close(os.open(shard, os.O_RDWR))


def test_variables_are_those_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_TMPDIR", "/local/job-7")
    assert stage_folder(Path("$SLURM_TMPDIR/frames")) == Path("/local/job-7/frames")
    monkeypatch.delenv("SLURM_TMPDIR")
    with pytest.raises(ConfigError, match=r"not set on this node; given: \$SLURM_TMPDIR/frames; fix: name"):
        stage_folder(Path("$SLURM_TMPDIR/frames"))


def test_without_a_folder_or_a_store_nothing_is_staged(packed_motion: StoredSamples) -> None:
    assert read_from_stage(packed_motion, None) is packed_motion
    videos = [packed_motion[0]]
    assert read_from_stage(videos, Path("/local")) is videos


def test_copies_name_the_parts_that_hold_samples(packed_motion: StoredSamples) -> None:
    copies = plan_copies(Path("/local"), [packed_motion])
    found = {
        (shard.source, *part)
        for shard in copies
        if isinstance(shard, ShardCopy)
        for part in shard.parts.tolist()
    }
    assert found == {
        (s.stored.shard, s.stored.start, s.stored.num_bytes, s.stored.checksum)
        for s in packed_motion
        if s.stored
    }
