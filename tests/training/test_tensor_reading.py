"""Tests of runs whose tensor groups read each clip once: every result and report is the same as before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from everest_ds.config import DataConfig, Experiment, plan_ranks
from everest_ds.config.mesh_shape import Turn
from everest_ds.data import clips, reading
from everest_ds.data.clip_source import LoadedItem
from everest_ds.data.clips import TrainingClips
from everest_ds.data.order import Visit, training_visits
from everest_ds.data.store.token_cache import TokenCache
from everest_ds.data.video_list import Sample
from everest_ds.errors import RankLostError
from everest_ds.parallel.mesh import Mesh
from everest_ds.parallel.world import World, explained_failures
from everest_ds.training import evaluate, loop
from everest_ds.training.loop import train
from tests.ranks import run_ranks
from tests.training.faults import kill_myself, long_run, outcome, replaced, stop_at
from tests.training.runs import experiment, losses, metrics
from tests.training.test_cached_run import fill_cache

NAMES_OF_THE_EXCHANGE = [(loop, "announce_batches"), (evaluate, "exchange_batches")]
BROKEN = 5  # sample that is no video


@pytest.fixture
def manifest(motion_data: Path, tmp_path: Path) -> Callable[[str], str]:
    """Return a function that writes a manifest with a broken video: one per run, each with its own ledger."""
    lines = [f"{motion_data / line}\n" for line in (motion_data / "train.txt").read_text().splitlines()]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    lines[BROKEN] = f"{broken} 5\n"

    def write(name: str) -> str:
        file = tmp_path / f"{name}.txt"
        file.write_text("".join(lines))
        return str(file)

    return write


def train_and_note(world: World, config: Experiment, shares: bool) -> None:
    """Train, and note each video that a reader opens, and each draw that it reads from a token cache.

    Without `shares`, each rank reads all of its clips.
    """
    opened = open(config.run.dir.parent / f"{config.run.dir.name}.opened", "a", buffering=1)

    def note(open_sample: Callable[..., Any]) -> Callable[..., Any]:
        def noted(sample: Sample, data: DataConfig, with_motion: bool) -> Any:
            opened.write(f"{world.rank} {sample.path}\n")
            return open_sample(sample, data, with_motion)

        return noted

    def note_draw(read_draw: Callable[..., Any]) -> Callable[..., Any]:
        def noted(cache: TokenCache, draw: Visit) -> Any:
            opened.write(f"{world.rank} {draw}\n")
            return read_draw(cache, draw)

        return noted

    with ExitStack() as patches:
        patches.enter_context(replaced(reading, "open_sample", note))
        patches.enter_context(replaced(clips, "read_draw", note_draw))
        if not shares:
            Mesh.turn = Turn()  # type: ignore[method-assign, assignment]
            for user, name in NAMES_OF_THE_EXCHANGE:
                alone = replaced(user, name, lambda _: lambda batches, **_: batches)
                patches.enter_context(alone)
            patches.enter_context(replaced(loop, "receive_batch", lambda _: lambda read, mesh: read.batch))
        train(config, world)


def reported(run: Path) -> list[dict[str, Any]]:
    """Return the figures of a run's reports that do not measure time or memory."""
    fixed = {
        "step",
        "loss",
        "grad_norm",
        "replaced_videos",
        "val_loss",
        "val_top1",
        "val_top5",
        "val_missing",
    }
    return [{name: value for name, value in row.items() if name in fixed} for row in metrics(run)]


def opened_files(tmp_path: Path, name: str) -> Counter[str]:
    lines = (tmp_path / f"{name}.opened").read_text().splitlines()
    return Counter(line.split(" ", 1)[1] for line in lines)


def in_groups(
    data: Path, folder: Path, task: str, manifest: str, workers: int, sections: dict[str, Any]
) -> Experiment:
    """Return a run in groups of two ranks, whose manifest names a broken video."""
    settings = {"train": manifest, "num_workers": workers, "max_broken_pct": 10}
    return experiment(
        data,
        folder,
        task,
        **{**sections, "data": {**sections.get("data", {}), **settings}},
        batch={"micro_batch_size": 2, "global_batch_size": 8},
        parallelism={"zero_stage": 2, "tensor": 2},
    )


FINE_TUNING: dict[str, Any] = {"augment": {"mixup_alpha": 0.8, "erase_probability": 0.5}}
PACKED: dict[str, Any] = {
    "tokens": {"score": "pixel", "keep_ratio": 0.5, "mask_ratio": 0.75},
    "data": {"pack_tokens": True},
}


@pytest.mark.parametrize(
    ("task", "ranks", "workers", "sections"),
    [
        ("finetune", 2, 1, FINE_TUNING),
        pytest.param("finetune", 4, 2, FINE_TUNING, marks=pytest.mark.slow),
        pytest.param("pretrain", 2, 0, PACKED, marks=pytest.mark.slow),
        pytest.param("pretrain", 4, 1, PACKED, marks=pytest.mark.slow),
    ],
)
def test_a_group_opens_each_file_once_and_trains_bit_for_bit_as_if_each_rank_read_all(
    manifest: Callable[[str], str],
    motion_data: Path,
    tmp_path: Path,
    task: str,
    ranks: int,
    workers: int,
    sections: dict[str, Any],
) -> None:
    for name, shares in (("shared", True), ("alone", False)):
        config = in_groups(motion_data, tmp_path / name, task, manifest(name), workers, sections)
        run_ranks(train_and_note, ranks, config, shares)
    shared, alone = (reported(tmp_path / name) for name in ("shared", "alone"))
    assert shared == alone and len([row for row in shared if "loss" in row]) == 9
    assert [row["replaced_videos"] for row in shared if "loss" in row][2::3] == [1, 1, 1]
    assert (tmp_path / "shared/broken.jsonl").read_text() == (tmp_path / "alone/broken.jsonl").read_text()
    once, twice = (opened_files(tmp_path, name) for name in ("shared", "alone"))
    assert twice == Counter({path: 2 * count for path, count in once.items()})
    validations = 3 if task == "finetune" else 0
    assert {once[str(motion_data / f"val/{number:05d}.mp4")] for number in range(12)} == {validations}


@pytest.mark.slow
def test_a_group_reads_each_draw_of_a_cache_once_and_trains_bit_for_bit_as_without_the_cache(
    manifest: Callable[[str], str], motion_data: Path, tmp_path: Path
) -> None:
    for name, cache in (("decoded", None), ("cached", tmp_path / "cache")):
        sections = {**PACKED, "data": {"pack_tokens": True, "draws": 2, "token_cache": cache}}
        config = in_groups(motion_data, tmp_path / name, "pretrain", manifest(name), 1, sections)
        if cache is not None:
            fill_cache(config)
        run_ranks(train_and_note, 4, config, True)
    decoded, cached = (reported(tmp_path / name) for name in ("decoded", "cached"))
    assert cached == decoded and len(cached) == 9 and cached[-1]["replaced_videos"] == 1
    broken = [(tmp_path / name / "broken.jsonl").read_text() for name in ("decoded", "cached")]
    assert broken[0] == broken[1]
    plan = plan_ranks(config, 4)
    visits = [
        visit for share in range(2) for batch in training_visits(24, plan, 0, share, 0, 9) for visit in batch
    ]
    assert opened_files(tmp_path, "cached") == Counter(str(visit.drawn(2)) for visit in visits)
    readers = (tmp_path / "cached.opened").read_text().splitlines()
    assert Counter(line.split(" ", 1)[0] for line in readers) == Counter(dict.fromkeys("0123", 18))


def die_while_others_wait(world: World, config: Experiment) -> None:
    """Train until rank 1 is killed as it reads in the second epoch; write why the other rank ends."""

    def kill_in_epoch_1(read: Any) -> Any:
        def getitem(clips: TrainingClips, visit: Visit) -> LoadedItem:
            if visit.epoch == 1 and world.rank == 1:
                kill_myself()
            return read(clips, visit)

        return getitem

    try:
        with replaced(TrainingClips, "__getitem__", kill_in_epoch_1), explained_failures(world):
            message = outcome(world, config)
    except RankLostError as error:
        message = str(error)
    (config.run.dir / f"message-{world.rank}").write_text(message)


@pytest.mark.slow
def test_a_reader_that_is_killed_is_named_by_the_rank_that_waits_for_its_batch_and_the_run_resumes(
    motion_data: Path, tmp_path: Path
) -> None:
    undisturbed = long_run(motion_data, tmp_path / "undisturbed", tensor=2)
    run_ranks(stop_at, 2, undisturbed, 8)
    config = long_run(motion_data, tmp_path / "killed", tensor=2)
    with pytest.raises(AssertionError, match="rank 1 died"):
        run_ranks(die_while_others_wait, 2, config, patience_s=20)
    message = (tmp_path / "killed" / "message-0").read_text()
    assert message.startswith("rank 0 lost a peer: no answer from rank 1")
    run_ranks(stop_at, 2, config, 5)
    run_ranks(stop_at, 2, config, 8)
    assert losses(tmp_path / "killed") == losses(tmp_path / "undisturbed")
    assert sorted(losses(tmp_path / "killed")) == list(range(1, 9))
