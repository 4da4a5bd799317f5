"""Check that the probes rank pre-trainings as full fine-tuning does: six checkpoints, and Kendall's tau.

python tools/check_probe.py runs/check_probe    # the check of docs/probe.md; an interrupted one resumes
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import sqrt
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, Literal, NamedTuple

import typer
from study.arms import DENSE, EVEREST, PLAIN, Arm
from study.protocol import PRETRAIN, TUNE, Chain, Run, Scale, Study, pretrain_tokens
from study.running import Row, rows_of

from everest_ds.cli.options import JsonFile
from everest_ds.cli.program import run_program
from everest_ds.console import print_table, progress_of, write_json
from everest_ds.data.synthetic import SyntheticSpec
from everest_ds.inference import Views
from everest_ds.probing.probed_weights import (
    Scored,
    encode_sets,
    find_probed,
    open_frozen,
    score,
    train_and_test,
)
from everest_ds.training.run_folder import describe_environment
from everest_ds.training.samples import read_probe_samples

BAR = 0.8  # lowest tau that passes
RANKING = "linear"  # the probe that ranks; the others are reported
PROBES = (RANKING, "attentive", "kNN", "RankMe")
TUNINGS = 3  # fine-tunings of each checkpoint, which differ in the seed
_TINY = {"backbone": "vit_tiny", "num_frames": 8, "image_size": 32, "patch_size": 8}
SCALES = {
    "smoke": Scale(_TINY, {"train": 24, "test": 24}, (0,), 2, 3, 8, "fp32"),
    "small": Scale(_TINY, {"train": 1500, "test": 900}, (1,), 700, 180, 32, "bf16"),
}


class Pretraining(NamedTuple):
    """A pre-training: its token selection, and its share of the steps of a study's pre-training."""

    selection: str
    share: float = 1.0

    @property
    def name(self) -> str:
        """The name of the pre-training, and of the folder of its runs."""
        return self.selection if self.share == 1 else f"{self.selection}-{self.share:.0%}"


PRETRAININGS = (
    Pretraining(EVEREST),
    Pretraining(EVEREST, 0.5),
    Pretraining(EVEREST, 0.15),
    Pretraining("tube"),
    Pretraining("random"),
    Pretraining("none"),
)


@dataclass(frozen=True)
class RankingStudy(Study):
    """Six pre-trainings that differ in selection and length, and the dense fine-tunings that judge each."""

    def spec(self, kind: str, enlargement: int = 1) -> SyntheticSpec:
        """Return the spec of the videos: clips plus two frames, at the size of the clips."""
        frames, size = self.scale.model["num_frames"], enlargement * self.scale.model["image_size"]
        return SyntheticSpec(frames + 2, size, self.data_seed, kind, pace=4.0)

    def chains(self) -> Iterator[list[Run]]:
        """Yield a chain for each pre-training."""
        for each in PRETRAININGS:
            yield list(self.chain(each))

    def chain(self, each: Pretraining) -> Iterator[Run]:
        """Yield a pre-training and its fine-tunings, which see every video equally often."""
        (seed,), scale = self.scale.seeds, self.scale
        steps = max(2, round(each.share * scale.pretrain_steps))
        chain, arm = Chain(self, PLAIN, seed, each.name), Arm(each.name, {"selection": each.selection})
        yield chain.run("pretrain", PRETRAIN, steps, pretrain_tokens(arm))
        tuned = chain.run("dense", TUNE, scale.finetune_steps, DENSE)
        for number in range(TUNINGS):
            run = tuned.config.run
            own = run.model_copy(
                update={"seed": seed + 100 * number, "dir": chain.folder / f"dense-{number}"}
            )
            yield tuned._replace(name=f"dense-{number}", config=tuned.config.model_copy(update={"run": own}))


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the videos, the runs and the cached features.")],
    scale: Annotated[Literal["smoke", "small"], typer.Option(help="Size of the runs.")] = "small",
    jobs: Annotated[int, typer.Option(min=1, help="Number of pre-trainings to run at a time.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the runs.")] = 1,
    data_seed: Annotated[int, typer.Option(help="Seed of the synthetic videos.")] = 1,
    json_file: JsonFile = None,
) -> None:
    """Pre-train six encoders on synthetic motion, fine-tune and probe each, and compare the two rankings.

    The exit code is 1 if the tau of the linear probe is below 0.8.

    Example: python tools/check_probe.py runs/check_probe
    """
    chosen = SCALES[scale]
    study = RankingStudy(replace(chosen, seeds=(seed,)), out, data_seed, (PLAIN,))
    tuned = rows_of(study, jobs, table_only=False)
    with progress_of("probing", len(PRETRAININGS)) as on_progress:
        rows = []
        for number, each in enumerate(PRETRAININGS):
            rows.append(_row(study, each, tuned))
            on_progress(number + 1)
    print_table("top-1 in percent: fine-tuned, and probed", rows, key="pretraining")
    taus = {probe: _tau(rows, probe) for probe in PROBES}
    print_table("Kendall's tau with fine-tuning", [{"probe": p, **values} for p, values in taus.items()])
    write_json(json_file, {"environment": describe_environment(1), "rows": rows, "taus": taus})
    if taus[RANKING]["tau"] < BAR:
        raise typer.Exit(1)


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Kendall's tau-b of two rankings: 1 if all pairs agree, -1 if all disagree."""
    pairs = [(_sign(a[i] - a[j]), _sign(b[i] - b[j])) for i, j in combinations(range(len(a)), 2)]
    untied = [sum(1 for pair in pairs if pair[side]) for side in (0, 1)]
    return sum(x * y for x, y in pairs) / sqrt(untied[0] * untied[1]) if all(untied) else 0.0


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _tau(rows: Sequence[Row], probe: str) -> dict[str, Any]:
    """Return the tau of a probe with the mean of the fine-tunings, and its range over the single ones."""
    probed = [row[probe] for row in rows]
    single = [kendall_tau(probed, [row[f"tuned_{n}"] for row in rows]) for n in range(TUNINGS)]
    whole = kendall_tau(probed, [row["tuned"] for row in rows])
    return {"tau": round(whole, 3), "lowest": round(min(single), 3), "highest": round(max(single), 3)}


def _row(study: RankingStudy, each: Pretraining, tuned: Sequence[Row]) -> Row:
    """Probe a pre-training, and return its accuracies with those of its fine-tunings."""
    first, *others = study.chain(each)
    mine = {row["name"]: row["top1"] for row in tuned if row["arm"] == each.name and "top1" in row}
    top1 = [mine[run.name] for run in others]
    scored = _probed(study, first.config.run.dir)
    accuracies = scored.accuracies
    low, high = accuracies[RANKING].interval_pct
    return {
        "pretraining": each.name,
        "tuned": round(mean(top1), 2),
        **{f"tuned_{number}": round(value, 2) for number, value in enumerate(top1)},
        **{probe: round(value.pct, 2) for probe, value in accuracies.items()},
        "linear_low": round(low, 2),
        "linear_high": round(high, 2),
        "RankMe": round(scored.scores.rankme, 2),
    }


def _probed(study: RankingStudy, run: Path) -> Scored:
    """Probe the last checkpoint of a run as the command does."""
    (weights,), data = find_probed(run, latest=True), study.data(PLAIN)
    sets = (f"data.probe_train={data / 'train.txt'}", f"data.probe_test={data / 'test.txt'}")
    network = open_frozen(weights, sets, only=True)
    assert network is not None
    samples = [usable.samples for usable in read_probe_samples(network.config)]
    found = encode_sets(network, samples, study.out / "probe", Views(), lambda done: None)
    assert not found.problems
    return Scored(weights, score(*train_and_test(found.sets)))


if __name__ == "__main__":
    run_program(main)
