"""One trial: run the real trainer for a few steps and classify the result."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from everest_ds.config import Experiment, plan_ranks
from everest_ds.data.store.index import is_store
from everest_ds.errors import ExitCode, StoppedError
from everest_ds.jobs.status import explain_exit_code
from everest_ds.stop_signals import end_with_parent
from everest_ds.training.run_folder import read_metrics
from everest_ds.tuning.trials.record import TrialOutcome, summarise_steps

OUTPUT_FILE = "trial.out"
_VIDEOS = 8  # number of synthetic videos, which the samples of a trial use in turn
_STORED = 256 / 224  # videos are stored a little larger than the crops taken from them
_REASON_LENGTH = 300
# Signs in the output that a process ran out of memory before the trainer could report it.
_NO_MEMORY = ("DefaultCPUAllocator: ", "std::bad_alloc", "MemoryError", "SIGKILL")


@dataclass(frozen=True)
class Setup:
    """The settings that all trials of a tuning run share.

    Attributes:
        source, overrides: the recipe, and the user's changes to it.
        folder: the folder of the tuning run; trials are in `folder/trials`.
        steps: steps per trial, warm-up included.
        timeout_s: time limit of a trial on this machine.
    """

    task: str
    source: str
    overrides: tuple[str, ...]
    num_ranks: int
    folder: Path
    steps: int
    timeout_s: float

    @property
    def runs(self) -> Path:
        """The folder that contains the run folders of the trials."""
        return self.folder / "trials"


@dataclass(frozen=True)
class TrialEnd:
    """The outcome of a run, with its reason if it failed."""

    outcome: TrialOutcome
    reason: str = ""


def trial_overrides(setup: Setup, config: Experiment) -> tuple[str, ...]:
    """Return the overrides that shorten a recipe to a trial: few clips, no saving, drawing or learning."""
    manifest = write_manifest_for(setup, config)
    return (
        *setup.overrides,
        f"data.train={json.dumps(str(manifest))}",
        "data.root=null",
        "data.val=null",
        *_storage_overrides(config),
        "model.init_from=null",
        "schedule.epochs=1",
        "schedule.warmup_epochs=0",
        "schedule.base_lr=1.0e-9",  # the weights hardly change, so that the loss cannot diverge
        "schedule.warmup_lr=0",
        "schedule.min_lr=0",
        "run.log_every_steps=1",
        "run.save_every_steps=1000000",
        "run.image_every_steps=1000000",
    )


def _storage_overrides(config: Experiment) -> tuple[str, ...]:
    """Return the overrides for a recipe whose token cache or staged copies lack a trial's samples.

    Without the cache, workers decode the clips and send the same tokens. Only stores can be staged.
    """
    train, cached = config.data.train, config.data.token_cache is not None
    in_files = reads_synthetic_clips(config) or (cached and train is not None and not is_store(train))
    return (
        *(("data.token_cache=null", "data.pack_tokens=true") if cached else ()),
        *(("data.stage=null",) if in_files else ()),
    )


def reads_synthetic_clips(config: Experiment) -> bool:
    """Return whether trials must use synthetic clips, because the recipe's manifest is missing."""
    return config.data.train is None or not config.data.train.exists()


def write_manifest_for(setup: Setup, config: Experiment) -> Path:
    """Write the data set of a trial, with the recipe's videos or else synthetic ones; return its path."""
    from everest_ds.data.data_set import read_data_set
    from everest_ds.data.store.index import StoredSamples, write_part_of_store
    from everest_ds.data.video_list import Sample, write_manifest

    source, root, classes = config.data.train, config.data.root, config.model.num_classes
    made = source is None or reads_synthetic_clips(config)
    if source is None or made:
        source, root = _synthetic_videos(setup, config), None
    samples = read_data_set(source, root=root, num_classes=None, labelled=config.task == "finetune")
    count = setup.steps * plan_ranks(config, setup.num_ranks).samples_per_step
    digest = sha256(str(source.absolute()).encode()).hexdigest()[:6]
    if isinstance(samples, StoredSamples):
        store = setup.runs / f"{count}-of-{digest}"
        write_part_of_store(store, samples, list(islice(cycle(range(len(samples))), count)))
        return store.absolute()
    chosen: Iterable[Sample] = islice(cycle(samples), count)
    if made and classes is not None:
        chosen = (replace(sample, label=(sample.label or 0) % classes) for sample in chosen)
    setup.runs.mkdir(parents=True, exist_ok=True)
    manifest = setup.runs / f"{count}-of-{digest}.txt"
    write_manifest(manifest, chosen, setup.runs)
    return manifest.absolute()


def run_here(setup: Setup, overrides: Sequence[str], run: Path) -> TrialEnd:
    """Run a trial on this machine, in a fresh run folder.

    Raises:
        StoppedError: the run was asked to stop.
    """
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    place = f"run.dir={json.dumps(str(run))}"
    words = [setup.task, setup.source, *overrides, place, "--nproc", str(setup.num_ranks)]
    code = _call([sys.executable, "-m", "everest_ds", *words], run / OUTPUT_FILE, setup.timeout_s)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    if code is None:
        return TrialEnd("timeout", f"not finished after {setup.timeout_s:g} s")
    if code == ExitCode.STOPPED:
        raise StoppedError("a trial was stopped", fix="run the same command again to continue")
    return classify_exit(code, (run / OUTPUT_FILE).read_text(errors="replace"))


def classify_exit(code: int, output: str) -> TrialEnd:
    """Classify the end of a run from its exit code and its output."""
    if code == ExitCode.OK:
        return TrialEnd("measured")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")] or lines[-1:]
    reason = (errors[0] if errors else explain_exit_code(code))[:_REASON_LENGTH]
    no_memory = code == ExitCode.OUT_OF_MEMORY or any(sign in output for sign in _NO_MEMORY)
    return TrialEnd("oom" if no_memory else "crash", reason)


def read_steps(run: Path, clips: int) -> dict[str, Any]:
    """Return the measurements of a finished trial, given its clips per step.

    Raises:
        RunFolderError: the trial logged too few steps.
    """
    return summarise_steps(read_metrics(run), clips)


def _synthetic_videos(setup: Setup, config: Experiment) -> Path:
    """Return the manifest of synthetic videos, which are written once per frame count and size."""
    from everest_ds.console import progress_of
    from everest_ds.data.synthetic import SyntheticSpec, synthesize

    frames = config.candidate_geometry.num_frames * config.data.frame_stride
    size = 2 * round(config.model.image_size * _STORED / 2)
    folder = setup.runs / f"clips-{frames}x{size}"
    manifest = folder / "train.txt"
    if not manifest.is_file():
        with progress_of("writing clips", _VIDEOS) as on_progress:
            synthesize(folder, {"train": _VIDEOS}, SyntheticSpec(frames, size), 1, on_progress)
    return manifest


def _call(command: Sequence[str], output: Path, timeout_s: float) -> int | None:
    """Run a command and return its exit code, or None after a timeout; its processes end with the call."""
    with open(output, "wb") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            preexec_fn=end_with_parent(os.getpid()),
        )
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
