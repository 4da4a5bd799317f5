"""The commands `everest-ds doctor` and `preflight`, which check a machine and the nodes of a job."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from everest_ds.cli.options import JsonFile, Overrides, RecipeArg
from everest_ds.cli.ranks import check_nodes_as_rank
from everest_ds.config import Experiment, load_experiment, shared_memory_bytes
from everest_ds.console import print_table, print_text, write_json
from everest_ds.errors import ExitCode, UsageError
from everest_ds.launch.doctor import examine, main_job_can_run
from everest_ds.training.input_files import manifest_of
from everest_ds.training.prediction import parse_gpus

_USUAL_RECIPE = "k400_pretrain_vit_base"
RunWords = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [KEY.PATH=VALUE]...",
        help=f"Run whose data.train is measured, and settings to change; with --data, default:"
        f" {_USUAL_RECIPE}.",
    ),
]
DataSet = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="MANIFEST",
        help="Data set to measure: a manifest, a frame store, or a folder of videos.",
    ),
]
SuppliedGpus = Annotated[
    str | None,
    typer.Option(
        "--on",
        metavar="GPUS",
        help="With --data: GPUs of the run, such as 8xa100-80gb. Default: those of this machine.",
    ),
]
NodeCores = Annotated[
    int | None,
    typer.Option(min=1, help="With --data: CPU cores of a node. Default: those available here."),
]


def doctor(
    run: RunWords = None,
    data: DataSet = None,
    on: SuppliedGpus = None,
    cores: NodeCores = None,
    json_file: JsonFile = None,
) -> None:
    """Check whether this machine can train: packages, accelerator, communication backend and launchers.

    The table gives a fix for every problem. The exit code is 0 if training can run on this machine.

    With --data, or for a RECIPE that sets data.train, name the bottleneck of a data set instead: in about
    half a minute, measure how fast its clips are decoded, read and copied here, say whether this, or the
    model, limits a run, and by how much, and predict what each remedy would give.

    Example: everest-ds doctor --data my_videos/train.txt --on 8xa100-80gb
    """
    words = run or []
    recipe = words.pop(0) if words and "=" not in words[0] else None
    if recipe is not None or data is not None:
        _diagnose(load_experiment(recipe or _USUAL_RECIPE, words), data, on, cores, json_file)
        return
    if words or on is not None or cores is not None:
        raise UsageError(
            "--on, --cores and settings were given without a data set", fix="add --data MANIFEST"
        )
    findings = examine(shared_memory_bytes(Experiment(task="pretrain"), num_ranks=1))
    print_table(
        "everest-ds doctor",
        [{"what": f.name, "status": f.status, "detail": f.detail, "fix": f.fix} for f in findings],
    )
    can_run = main_job_can_run(findings)
    typer.echo(
        "Training can run on this machine."
        if can_run
        else "Training cannot run on this machine: fix the rows with status `missing`."
    )
    write_json(json_file, {"can_run": can_run, "findings": [asdict(f) for f in findings]})
    if not can_run:
        raise typer.Exit(ExitCode.FAILURE)


def _diagnose(
    config: Experiment, data: Path | None, on: str | None, cores: int | None, json_file: Path | None
) -> None:
    from everest_ds.tuning import diagnosis

    gpus = None if on is None else parse_gpus(on)
    place = data or manifest_of(config, "train")
    found = diagnosis.diagnose(place, config, gpus, cores, lambda part: typer.echo(f"{part} ...", err=True))
    stages = found.stages
    print_table(
        f"Loading a clip, measured on {stages.num_clips} clips of {len(stages.decode_ms)} videos",
        diagnosis.stage_rows(found),
    )
    print_table("Resources of a rank", diagnosis.resource_rows(found))
    for sentence in (f"{found.bottleneck.sentence()}.", *diagnosis.notes_on_diagnosis(found)):
        print_text(sentence)
    print_table("Remedies", diagnosis.remedy_rows(found))
    for line in diagnosis.remedy_lines(found):
        print_text(f"- {line}")
    typer.echo(f"Recorded for dry runs and the tuner: {found.record}")
    write_json(json_file, diagnosis.diagnosis_json(found))


def preflight(source: RecipeArg, overrides: Overrides = None, json_file: JsonFile = None) -> None:
    """Check whether the nodes of a job can train a recipe, without training.

    Start this command with srun, mpirun or torchrun, like the training itself. The nodes must have the same
    code, packages and data; the speed of their network and the disk space for checkpoints are shown.

    Example: srun --nodes=4 --ntasks-per-node=8 python -m everest_ds preflight my.yaml
    """
    check_nodes_as_rank(load_experiment(source, overrides or []), json_file)
