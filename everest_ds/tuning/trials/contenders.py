"""The trials of `everest-ds tune`: select candidates and baselines, run them, and recommend the fastest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from everest_ds.config import Experiment, load_experiment
from everest_ds.config.zero_settings import zero_settings
from everest_ds.console import print_table
from everest_ds.costs.hardware.gpus import DEVICES, find_device
from everest_ds.costs.memory import predict_memory
from everest_ds.costs.step_time import predict_step
from everest_ds.errors import UsageError
from everest_ds.training.run_folder import package_versions
from everest_ds.tuning.calibration.local_machine import facts_here
from everest_ds.tuning.candidate_tables import dropped_rows
from everest_ds.tuning.explain import slower_families
from everest_ds.tuning.search import Candidate, Cluster, SearchResult, describe_recompute, needed_bytes
from everest_ds.tuning.space import Sharding
from everest_ds.tuning.trials.baselines import Baseline, natural_baselines
from everest_ds.tuning.trials.correction import traits_of
from everest_ds.tuning.trials.one_trial import Setup
from everest_ds.tuning.trials.ranking import TrialResults, Tried, weigh
from everest_ds.tuning.trials.record import trial_key
from everest_ds.tuning.trials.run import Array, TrialEntry, try_by_slurm, try_here
from everest_ds.tuning.trials.trial_report import ranking_rows, trials_page, write_page
from everest_ds.tuning.winner import deepspeed_file

_BASELINE = "ZeRO-2"


@dataclass(frozen=True)
class Contender:
    """A candidate or baseline of the trials, with the name that it is tried under."""

    name: str
    candidate: Candidate
    entry: TrialEntry


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
    ranked = [_contender(setup, cluster, candidate) for candidate in result.ranked]
    for baseline in _baselines(setup, cluster, ranked):
        ranked = _with_baseline(setup, cluster, ranked, baseline)
    chosen = [one.entry for n, one in enumerate(ranked) if n < count or one.entry.tried.baseline]
    others = [one.entry for one in ranked if one.entry not in chosen]
    place = _place(cluster)
    if options.sbatch is None:
        tried = try_here(setup, chosen, place)
    else:
        tried = try_by_slurm(setup, chosen, place, _array(cluster, options.sbatch))
    weighed = weigh([entry.tried for entry in (*tried, *others)], cluster.machine.memory_bytes)
    _show(setup, cluster, result, weighed)
    by_name = {one.name: one.candidate for one in ranked}
    if any(entry.tried.trial is None for entry in tried):
        return None
    if weighed.recommended is None:
        raise UsageError(
            "no trial could be measured, so no candidate is recommended",
            given=f"{len(tried)} trials; {setup.folder / 'report.html'} gives the reasons",
            fix=f"try more candidates: --trials {2 * count}",
        )
    return by_name[weighed.recommended.tried.name]


def candidate_name(candidate: Candidate) -> str:
    """Return a human-readable name, such as `ZeRO-2, tensor 2, bf16, micro-batch 8, recompute full`."""
    recompute = candidate.config.recompute
    parts = [str(candidate.sharding), f"micro-batch {candidate.config.batch.micro_batch_size}"]
    if recompute.mode != "none":
        parts.append(describe_recompute(recompute))
    if candidate.own_buckets:
        parts.append("own buckets")
    return ", ".join(parts)


def _check_here(cluster: Cluster) -> None:
    """Refuse trials on this machine if its device differs from that of the cluster."""
    here, wanted = facts_here()["device"], cluster.machine.device
    product = find_device(here)
    if here != wanted and product is not DEVICES.get(wanted):
        raise UsageError(
            f"--trials would measure {here} on this machine, not the {wanted} that --gpu names",
            fix='run the trials on the cluster with --sbatch "--time=30:00 ...", or leave out --gpu',
        )


def _array(cluster: Cluster, options: str) -> Array:
    a_node = cluster.ranks_per_node
    return Array(cluster.nodes, a_node if cluster.machine.asynchronous else 0, a_node, options)


def _contender(setup: Setup, cluster: Cluster, candidate: Candidate) -> Contender:
    name, overrides, config = candidate_name(candidate), candidate.overrides, candidate.config
    if candidate.own_buckets:
        file = _write_deepspeed(setup, candidate)
        overrides = (*overrides, f"parallelism.ds_config={file}")
        parallelism = config.parallelism.model_copy(update={"ds_config": file})
        config = config.model_copy(update={"parallelism": parallelism})
    return Contender(name, candidate, TrialEntry(_tried(name, overrides, candidate, cluster), config))


def _write_deepspeed(setup: Setup, candidate: Candidate) -> Path:
    stage, bucket = candidate.sharding.stage, candidate.zero.reduce_bucket_values
    file = (setup.runs / f"zero{stage}-{bucket}.json").absolute()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(deepspeed_file(candidate))
    return file


def _baselines(setup: Setup, cluster: Cluster, ranked: Sequence[Contender]) -> list[Baseline]:
    if not ranked:
        return []
    batch = ranked[0].candidate.config.batch.global_batch_size or 0

    def load(overrides: Sequence[str]) -> Experiment:
        return load_experiment(setup.source, [*setup.overrides, *overrides])

    return natural_baselines(load, cluster.num_ranks, batch)


def _with_baseline(
    setup: Setup, cluster: Cluster, ranked: Sequence[Contender], baseline: Baseline
) -> list[Contender]:
    """Mark the candidate that equals the baseline, or append the baseline if no candidate does."""

    def key(config: Experiment) -> str:
        return trial_key(config, cluster.num_ranks, {})

    own = key(baseline.config)
    same = [one for one in ranked if key(one.entry.config) == own] or [_baseline(setup, cluster, baseline)]
    tried = replace(same[0].entry.tried, baseline=baseline.name, note=baseline.note)
    marked = replace(same[0], entry=replace(same[0].entry, tried=tried))
    return [marked if one is same[0] else one for one in ranked] + [marked] * (same[0] not in ranked)


def _baseline(setup: Setup, cluster: Cluster, one: Baseline) -> Contender:
    config, zero = one.config, zero_settings(one.config)
    spread = config.parallelism
    candidate = Candidate(
        Sharding(config.precision, spread.zero_stage, spread.tensor, spread.offload_to_cpu),
        config,
        zero,
        False,
        predict_memory(config, cluster.num_ranks),
        predict_step(config, cluster.num_ranks, cluster.machine, zero),
        load_experiment(setup.source, setup.overrides),
    )
    return Contender(
        one.name, candidate, TrialEntry(_tried(one.name, one.overrides, candidate, cluster), config)
    )


def _tried(name: str, overrides: tuple[str, ...], candidate: Candidate, cluster: Cluster) -> Tried:
    return Tried(
        name,
        overrides,
        traits_of(candidate.config),
        candidate.step.clips,
        candidate.step.step_s,
        needed_bytes(candidate.memory, cluster.machine),
    )


def _place(cluster: Cluster) -> dict[str, Any]:
    machine = cluster.machine
    return {
        "device": machine.device,
        "ranks_per_node": machine.ranks_per_node,
        "versions": package_versions(),
    }


def _show(setup: Setup, cluster: Cluster, result: SearchResult, weighed: TrialResults) -> None:
    machine = cluster.machine
    print_table("Candidates after trials", _rows_to_show(weighed, machine.memory_bytes))
    dropped = dropped_rows([*slower_families(result.ranked, len(result.ranked)), *result.dropped])
    subject = f"{setup.source} on {cluster.num_ranks} x {machine.device}"
    page = trials_page(subject, weighed, machine.memory_bytes, dropped, _BASELINE)
    print(f"report: {write_page(setup.folder, 'report', page)}")


def _rows_to_show(weighed: TrialResults, memory_bytes: int) -> list[dict[str, Any]]:
    """Select the candidates that were tried, and those that may be faster than the winner."""
    rows = ranking_rows(weighed.standings, memory_bytes)
    first = next((n for n, one in enumerate(weighed.standings) if one is weighed.recommended), len(rows))
    pairs = zip(rows, weighed.standings, strict=True)
    return [row for n, (row, one) in enumerate(pairs) if one.tried.trial or n < min(first, 10)]
