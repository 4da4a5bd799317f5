"""What `everest-ds tune` prints around its tables: the question, the answer, and what to mind."""

from __future__ import annotations

from collections.abc import Iterator

import typer

from everest_ds.cli.output import print_facts, print_table
from everest_ds.cli.tune_tables import (
    Costs,
    candidate_rows,
    close_calls,
    dropped_rows,
    memory_rows,
)
from everest_ds.config import Experiment
from everest_ds.errors import UsageError
from everest_ds.tuning.reasons import slower_families, why_slower
from everest_ds.tuning.search import Candidate, Cluster, SearchResult
from everest_ds.tuning.standing import CLOSE_PCT
from everest_ds.tuning.step_time import predict_step
from everest_ds.units import format_bytes

_WAITS_PCT = 5  # of a step for data, from which on it is said


def print_question(config: Experiment, cluster: Cluster) -> None:
    """What is tuned for which machine, and where its numbers are from."""
    machine, ranks = cluster.machine, cluster.num_ranks
    a_node = min(machine.ranks_per_node, ranks)
    facts = {
        "model": f"{config.model.backbone}, {config.task}; {config.token_counts.num_kept} of"
        f" {config.token_counts.num_tokens} tokens kept",
        "global_batch": f"{config.batch.global_batch_size} clips",
        "ranks": f"{ranks} x {machine.device}, {a_node} a node,"
        f" {format_bytes(machine.memory_bytes)} usable by each",
        "rates": machine.source,
    }
    print_facts("Tuning (nothing is run)", facts)


def print_answer(result: SearchResult, cluster: Cluster, costs: Costs, top: int, seconds: float) -> None:
    """The ranked table, what to mind, and what is not in it."""
    shown = result.ranked[:top]
    title = f"{len(shown)} of {len(result.ranked)} candidates, in ms a step (predicted)"
    print_table(title, candidate_rows(shown, cluster, costs), key="rank")
    for line in _to_mind(result.ranked, shown, cluster):
        typer.echo(line)
    dropped = [*slower_families(result.ranked, top), *result.dropped]
    print_table("Not among them", dropped_rows(dropped))
    sized, timed = result.evaluations
    typer.echo(f"searched in {seconds:.2f} s: memory of {sized} candidates, time of {timed}")


def print_explained(ranked: list[Candidate], rank: int, cluster: Cluster) -> None:
    """Every term of one candidate.

    Raises:
        UsageError: there are fewer.
    """
    if rank > len(ranked):
        raise UsageError("--explain", given=rank, allowed=f"a rank of 1..{len(ranked)}")
    one = ranked[rank - 1]
    print_table(f"Rank {rank}: memory; peak at the {one.memory.peak_at}", memory_rows(one, cluster.machine))
    terms = [term.row() for term in one.step.terms]
    print_table(f"Rank {rank}: time of a step, {1e3 * one.step.step_s:.1f} ms", terms)
    if rank > 1:
        typer.echo(f"against rank 1: {why_slower(one, ranked[0])}")


def _to_mind(ranked: list[Candidate], shown: list[Candidate], cluster: Cluster) -> Iterator[str]:
    calls = close_calls(shown, cluster.machine)
    if calls:
        yield f"close to the memory there is (less than {CLOSE_PCT} % left): {'; '.join(calls)}"
    best = ranked[0]
    waits = 100 * best.step.split()["data"] / best.step.step_s
    if waits > _WAITS_PCT:
        yield _about_data(best, cluster, waits)


def _about_data(best: Candidate, cluster: Cluster, waits_pct: float) -> str:
    """How long the best candidate would take with as many decoding workers as there are cores for."""
    said = f"rank 1 waits for decoded clips {waits_pct:.0f} % of its step"
    cores, data = int(cluster.machine.spare_cores), best.config.data
    if cores <= data.num_workers:
        return f"{said}: see docs/loader.md"
    helped = best.config.model_copy(update={"data": data.model_copy(update={"num_workers": cores})})
    step = predict_step(helped, cluster.num_ranks, cluster.machine, best.zero)
    return (
        f"{said}; with data.num_workers={cores}, if a rank has so many cores, a step takes"
        f" {1e3 * step.step_s:.1f} ms instead of {1e3 * best.step.step_s:.1f}"
    )
