"""The execution of a study: chains in parallel processes, every run by the real trainer on one rank.

A run that has ended leaves its row in its folder and is not run again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache, partial
from itertools import chain as chained
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everest_ds.console import progress_of
from everest_ds.data.store.layout import Packing
from everest_ds.data.store.pack import StorePacker
from everest_ds.data.synthetic import synthesize
from everest_ds.data.video_list import read_manifest, write_manifest
from everest_ds.errors import RunFolderError
from everest_ds.launch.environment import detect_environment
from everest_ds.parallel.world import World, join_world
from everest_ds.training.evaluate import run_test
from everest_ds.training.loop import train
from everest_ds.training.run_folder import RunFolder
from study.probe import probe
from study.protocol import STORE, Run, Study
from study.videos import keep_videos_in_memory, ranked_by

Row = dict[str, Any]
Progress = Callable[[int], None]
ROW_FILE = "study.json"


def claim(study: Study) -> None:
    """Create the study's folder, or check that it belongs to this study; seeds may be added.

    Raises:
        RunFolderError: the folder belongs to another scale or other videos, or cannot be written.
    """
    file = study.out / "settings.json"
    settings = asdict(study.scale) | {"data_seed": study.data_seed}
    del settings["seeds"]
    text = json.dumps(settings, indent=1) + "\n"
    try:
        study.out.mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            file.write_text(text)
        there = file.read_text()
    except OSError as error:
        raise RunFolderError(f"{study.out}: cannot write the study's folder", given=str(error)) from None
    if there != text:
        raise RunFolderError(
            f"{study.out}: holds a study of another scale or data seed", fix="choose another folder"
        )


def make_data(study: Study, workers: int, on_progress: Progress) -> None:
    """Synthesise the videos of every kind that is missing, and write every run's manifest."""
    for number, kind in enumerate(study.kinds):
        folder, counts = study.data(kind), study.scale.videos
        if not study.has_data(kind):
            progress = partial(_shift, on_progress, number * sum(counts.values()))
            synthesize(folder, counts, study.spec(kind), workers, progress)
    for run in chained.from_iterable(study.chains()):
        _list_visits(run, study.data(run.kind), study.data_seed)


def _shift(on_progress: Progress, before: int, done: int) -> None:
    on_progress(before + done)


def _list_visits(run: Run, folder: Path, seed: int) -> None:
    """Write a run's manifest: passes over the videos, each in its own order, cut at an epoch's length.

    If the run reads a store, the manifest is packed with the default settings.
    """
    train = run.config.data.train
    if train is None or train.exists():
        return
    file = train.with_suffix(".txt")
    samples = read_manifest(folder / "train.txt", root=None, num_classes=None, labelled=True)
    passes = (np.random.default_rng([seed, number]).permutation(len(samples)) for number in count())
    order = islice(chained.from_iterable(passes), run.num_clips // run.config.schedule.epochs)
    write_manifest(file, (samples[index] for index in order), folder)
    if train.suffix == STORE:
        listed = read_manifest(file, root=None, num_classes=None, labelled=True)
        packer = StorePacker(listed, folder, train, Packing(), os.cpu_count() or 1)
        packer.pack_all(lambda done: None)
        packer.finish()


def rows_of(study: Study, jobs: int, table_only: bool) -> list[Row]:
    """Run what is missing of a study, unless only its table is wanted, and return the rows of its runs.

    Raises:
        EverestError: as `claim` and `run_study`.
    """
    claim(study)
    if not table_only:
        with progress_of("videos", study.num_videos) as on_progress:
            make_data(study, jobs, on_progress)
        with progress_of("runs", study.num_runs) as on_progress:
            run_study(study, jobs, on_progress)
    return read_rows(study)


def run_study(study: Study, jobs: int, on_progress: Progress) -> None:
    """Run everything that has no row yet, `jobs` chains at a time.

    Raises:
        EverestError: the first error of a run; the rows of runs that have ended are kept.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, _become_rank, (study.out / "study.log",)) as pool:
        pending = {pool.submit(run_chain, study, chain): len(chain) for chain in study.chains()}
        done = 0
        try:
            for future in as_completed(pending):
                future.result()
                done += pending[future]
                on_progress(done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def run_chain(study: Study, chain: Sequence[Run]) -> None:
    """Run the missing runs of a chain, one after the other, and write their rows."""
    for run in chain:
        file = run.config.run.dir / ROW_FILE
        if file.is_file():
            RunFolder(run.config.run.dir).check_same_config(run.config)
        else:
            file.write_text(json.dumps(_perform(study, run), indent=1) + "\n")


def read_rows(study: Study) -> list[Row]:
    """Return the rows of all runs that have ended, in the order of the chains."""
    files = [run.config.run.dir / ROW_FILE for run in chained.from_iterable(study.chains())]
    return [json.loads(file.read_text()) for file in files if file.is_file()]


def _perform(study: Study, run: Run) -> Row:
    started = time.process_time()
    with ranked_by(run.ranking, study.spec(run.kind, 1)):
        train(run.config, _world())
        scores = _score(study, run)
    return {
        **{name: value for name, value in run._asdict().items() if name not in ("config", "probed")},
        "task": run.config.task,
        "tokens": run.config.tokens.model_dump(),
        "training_macs": run.training_macs,
        **scores,
        "cpu_s": time.process_time() - started,
    }


def _score(study: Study, run: Run) -> Row:
    scores: Row = {}
    if run.config.task == "finetune":
        scores["top1"] = run_test(run.config, _world())["top1"]
        shutil.rmtree(RunFolder(run.config.run.dir).checkpoints)  # no other run starts from these checkpoints
    if run.probed is not None and run.probed.model.init_from is not None:
        whole = run.probed.data.model_copy(update={"train": study.data(run.kind) / "train.txt"})
        config = run.probed.model_copy(update={"data": whole})
        scores["probe_top1"] = probe(config, run.probed.model.init_from, _world().device)
    return scores


@cache
def _world() -> World:
    """Join the world of one rank of this process."""
    os.environ.update(detect_environment().as_variables())
    return join_world()


def _become_rank(log: Path) -> None:
    """Set up a process of the pool: one thread, output to `log`; it ends with its parent."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.stdout.flush()
    with open(log, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    keep_videos_in_memory()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
