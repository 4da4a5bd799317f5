"""The output of `everest-ds tune`: the model and machine, the ranked candidates with warnings, and files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from everest_ds.config import Experiment
from everest_ds.console import print_facts, print_table, print_text, write_csv, write_json
from everest_ds.errors import UsageError
from everest_ds.training.prediction import describe_supply
from everest_ds.tuning.candidate import Candidate
from everest_ds.tuning.candidate_tables import (
    Costs,
    as_json,
    candidate_rows,
    close_calls,
    dropped_rows,
    memory_rows,
)
from everest_ds.tuning.cluster import Cluster
from everest_ds.tuning.explain import EQUALLY_FAST, slower_families, why_slower
from everest_ds.tuning.search import SearchResult
from everest_ds.tuning.trials.ranking import CLOSE_PCT
from everest_ds.units import format_bytes

_WAITS_PCT = 5  # share of a step spent waiting for data above which a hint is printed


def print_question(config: Experiment, cluster: Cluster, notes: Sequence[str]) -> None:
    """Print which model is tuned for which machine, the source of its rates, and `notes` on the config."""
    machine, ranks = cluster.machine, cluster.num_ranks
    facts = {
        "model": f"{config.model.backbone}, {config.task}; {config.token_counts.num_kept} of"
        f" {config.token_counts.num_tokens} tokens kept",
        "global_batch": f"{config.batch.global_batch_size} clips",
        "ranks": f"{ranks} x {machine.device}, {cluster.ranks_per_node} per node,"
        f" {format_bytes(machine.memory_bytes)} usable per rank",
        "rates": machine.source,
    }
    print_facts("Tuning by prediction", facts)
    for note in notes:
        print(note)


def print_answer(result: SearchResult, cluster: Cluster, costs: Costs, top: int, seconds: float) -> None:
    """Print the ranked table, warnings about its candidates, and the families left out."""
    shown = result.ranked[:top]
    title = f"{len(shown)} of {len(result.ranked)} candidates, in ms per step (predicted)"
    print_table(title, candidate_rows(shown, cluster, costs), key="rank")
    calls, best = close_calls(shown, cluster), result.ranked[0]
    if calls:
        print(f"close to the memory limit (less than {CLOSE_PCT} % free): {'; '.join(calls)}")
    waits_pct = 100 * best.step.split()["data"] / best.step.step_s
    waits = f" waits for clips for {waits_pct:.0f} % of its step" if waits_pct > _WAITS_PCT else ""
    supplied = describe_supply(best.step, best.config, cluster.num_ranks, cluster.machine)
    print_text(f"candidate 1{waits}: {supplied}")
    if len(shown) > 1 and shown[1].step.step_s < best.step.step_s * EQUALLY_FAST:
        print_text("candidates that take equally long are ordered by their time without data wait")
    dropped = [*slower_families(result.ranked, top), *result.dropped]
    print_table("Families left out", dropped_rows(dropped))
    sized, timed = result.evaluations
    print_text(
        f"search took {seconds:.2f} s and predicted the memory of {sized} candidates"
        f" and the step time of {timed}"
    )


def print_explained(ranked: list[Candidate], rank: int, cluster: Cluster) -> None:
    """Print every term of the memory and step time of one candidate.

    Raises:
        UsageError: there are fewer than `rank` candidates.
    """
    if rank > len(ranked):
        raise UsageError(f"--explain {rank}: there is no such candidate", allowed=f"1 to {len(ranked)}")
    one = ranked[rank - 1]
    print_table(
        f"Candidate {rank}: memory; peak at the {one.memory.peak_at}", memory_rows(one, cluster.machine)
    )
    terms = [term.row() for term in one.step.terms]
    print_table(f"Candidate {rank}: step time, {1e3 * one.step.step_s:.1f} ms", terms)
    if rank > 1:
        print(f"compared with candidate 1: {why_slower(one, ranked[0])}")


def write_tables(
    result: SearchResult, cluster: Cluster, costs: Costs, json_file: Path | None, csv_file: Path | None
) -> None:
    """Write all candidates as CSV and, with the families left out, as JSON; no file is written for None."""
    rows = candidate_rows(result.ranked, cluster, costs)
    write_csv(csv_file, rows)
    found = {
        "cluster": {"ranks": cluster.num_ranks, "machine": cluster.machine.as_json()},
        "candidates": as_json(rows, result.ranked),
        "dropped": dropped_rows(result.dropped),
    }
    write_json(json_file, found)


def helpful_workers(best: Candidate, cluster: Cluster) -> int | None:
    """Return the number of loader workers with which a candidate waits less for data; None if none helps."""
    cores = int(cluster.machine.spare_cores)
    waits = best.step.split()["data"] / best.step.step_s > _WAITS_PCT / 100
    return cores if waits and cores > best.config.data.num_workers else None
