"""The trials of `everest-ds tune`: select candidates and baselines, run them, and recommend the fastest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from everest_ds.config import Experiment, load_experiment
from everest_ds.config.deepspeed_file import ds_config_path
from everest_ds.config.zero_settings import zero_settings
from everest_ds.console import print_table
from everest_ds.costs.hardware.gpus import DEVICES, find_device
from everest_ds.costs.memory import predict_memory
from everest_ds.costs.step_time import predict_step
from everest_ds.errors import UsageError
from everest_ds.training.run_folder import package_versions
from everest_ds.tuning.calibration.local_machine import facts_here
from everest_ds.tuning.candidate import Candidate
from everest_ds.tuning.candidate_tables import dropped_rows
from everest_ds.tuning.cluster import Cluster
from everest_ds.tuning.explain import slower_families
from everest_ds.tuning.own_file import deepspeed_file, needs_own_file
from everest_ds.tuning.search import SearchResult
from everest_ds.tuning.trials.baselines import Baseline, natural_baselines
from everest_ds.tuning.trials.one_trial import Setup
from everest_ds.tuning.trials.ranking import TrialResults, rank_candidates
from everest_ds.tuning.trials.record import trial_key
from everest_ds.tuning.trials.run import TrialArray, try_by_slurm, try_here
from everest_ds.tuning.trials.trial_report import ranking_rows, trials_page, write_page

_COMPARED_WITH = "ZeRO-2"  # the baseline that the report compares the winner with
_SHOWN_UNTRIED = 10  # candidates without a trial are shown up to this rank


@dataclass(frozen=True)
class TrialOptions:
    """The options of the trials; `sbatch` holds sbatch's options, or None to run on this machine."""

    count: int
    steps: int
    timeout_s: float
    sbatch: str | None


def run_trials(
    source: str,
    overrides: Sequence[str],
    cluster: Cluster,
    result: SearchResult,
    folder: Path,
    options: TrialOptions,
) -> Candidate | None:
    """Try the best candidates and the baselines, show the results, and pick the winner.

    Returns:
        The winner; None while trials are still in SLURM's queue.

    Raises:
        UsageError: no trial could be measured, or this machine differs from the cluster that is tuned for.
    """
    task, count = result.ranked[0].config.task, options.count
    setup = Setup(task, source, tuple(overrides), cluster.num_ranks, folder, options.steps, options.timeout_s)
    if options.sbatch is None:
        _check_here(cluster)
    candidates = [_with_own_file(setup, candidate) for candidate in result.ranked]
    for baseline in _baselines(setup, cluster, candidates[0]):
        candidates = _with_baseline(setup, cluster, candidates, baseline)
    chosen = [one for n, one in enumerate(candidates) if n < count or one.baseline]
    others = [one for one in candidates if one not in chosen]
    tried = _try(setup, cluster, chosen, options.sbatch)
    results = rank_candidates([*tried, *others], cluster.machine.memory_bytes)
    _show(setup, cluster, result, results)
    if any(one.trial is None for one in tried):
        return None
    if results.recommended is None:
        raise UsageError(
            "no trial could be measured, so no candidate is recommended",
            given=f"{len(tried)} trials; {setup.folder / 'report.html'} gives the reasons",
            fix=f"try more candidates: --trials {2 * count}",
        )
    return results.recommended.candidate


def _check_here(cluster: Cluster) -> None:
    """Refuse trials on this machine if its device differs from that of the cluster."""
    here, wanted = facts_here()["device"], cluster.machine.device
    product = find_device(here)
    if here != wanted and product is not DEVICES.get(wanted):
        raise UsageError(
            f"--trials would measure {here} on this machine, not the {wanted} that --gpu names",
            fix='run the trials on the cluster with --sbatch "--time=30:00 ...", or leave out --gpu',
        )


def _with_own_file(setup: Setup, candidate: Candidate) -> Candidate:
    """Return the candidate as trials run it, after writing the DeepSpeed file that it needs."""
    if not needs_own_file(candidate):
        return candidate
    text = deepspeed_file(candidate)
    digest = sha256(text.encode()).hexdigest()[:8]  # candidates may need different versions of one file
    file = (setup.runs / f"{ds_config_path(candidate.config).stem}-{digest}.json").absolute()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    parallelism = candidate.config.parallelism.model_copy(update={"ds_config": file})
    return replace(candidate, config=candidate.config.model_copy(update={"parallelism": parallelism}))


def _baselines(setup: Setup, cluster: Cluster, best: Candidate) -> list[Baseline]:
    def load(overrides: Sequence[str]) -> Experiment:
        return load_experiment(setup.source, [*setup.overrides, *overrides])

    return natural_baselines(load, cluster.num_ranks, best.config.batch.global_batch_size or 0)


def _with_baseline(
    setup: Setup, cluster: Cluster, candidates: Sequence[Candidate], baseline: Baseline
) -> list[Candidate]:
    """Mark the candidate that equals the baseline, or append the baseline if no candidate does."""

    def key(config: Experiment) -> str:
        return trial_key(config, cluster.num_ranks, {})

    own = key(baseline.config)
    same = next((one for one in candidates if key(one.config) == own), None)
    found = same or _predicted(baseline.config, load_experiment(setup.source, setup.overrides), cluster)
    marked = replace(found, baseline=baseline.name, note=baseline.note)
    return [marked if one is same else one for one in candidates] + [marked] * (same is None)


def _predicted(config: Experiment, base: Experiment, cluster: Cluster) -> Candidate:
    """Return a candidate that the search did not find, with its predictions."""
    zero, memory = zero_settings(config), predict_memory(config, cluster.num_ranks)
    step = predict_step(config, cluster.num_ranks, cluster.machine, zero)
    return Candidate(config, base, zero, memory, cluster.needed_bytes(memory), step)


def _try(setup: Setup, cluster: Cluster, chosen: Sequence[Candidate], sbatch: str | None) -> list[Candidate]:
    """Return the chosen candidates with their trials, as far as they have ended."""
    machine = cluster.machine
    place: dict[str, Any] = {
        "device": machine.device,
        "ranks_per_node": machine.ranks_per_node,
        "versions": package_versions(),
    }
    if sbatch is None:
        return try_here(setup, chosen, place)
    a_node = cluster.ranks_per_node
    gpus = a_node if machine.asynchronous else 0
    return try_by_slurm(setup, chosen, place, TrialArray(cluster.nodes, gpus, a_node, sbatch))


def _show(setup: Setup, cluster: Cluster, result: SearchResult, results: TrialResults) -> None:
    """Print the candidates that were tried or may be faster than the winner, and write the report."""
    memory_bytes, ranked = cluster.machine.memory_bytes, results.ranked
    rows = ranking_rows(ranked, memory_bytes)
    first = next((n for n, one in enumerate(ranked) if one is results.recommended), len(rows))
    shown = [n for n, one in enumerate(ranked) if one.candidate.trial or n < min(first, _SHOWN_UNTRIED)]
    print_table("Candidates after trials", [rows[n] for n in shown])
    dropped = dropped_rows([*slower_families(result.ranked, len(result.ranked)), *result.dropped])
    subject = f"{setup.source} on {cluster.num_ranks} x {cluster.machine.device}"
    page = trials_page(subject, results, memory_bytes, dropped, _COMPARED_WITH)
    print(f"report: {write_page(setup.folder, 'report', page)}")
