"""The `everest-ds` program: its commands and the modules that implement them."""

from __future__ import annotations

import typer

from everest_ds import __version__
from everest_ds.cli import (
    checkpoint,
    data,
    doctor,
    job,
    jobs,
    logs,
    preflight,
    profile,
    recipes,
    report,
    submit,
    sweep,
    train,
    tune,
    visualize,
)
from everest_ds.cli import predict as inference
from everest_ds.cli.program import run_app

app = typer.Typer(
    name="everest-ds",
    help="Train EVEREST, a masked video autoencoder that keeps only the tokens that change, at scale.",
    epilog="First:  everest-ds data synth runs/demo/data,  then  everest-ds pretrain demo_pretrain --nproc 2",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("pretrain")(train.pretrain)
app.command("finetune")(train.finetune)
app.command("evaluate")(train.evaluate)
app.command("features")(inference.features)
app.command("predict")(inference.predict)
app.command("profile")(profile.profile)
app.command("tune")(tune.tune)
app.command("report")(report.report)
# `submit` passes the options that it does not define on to sbatch.
app.command("submit", context_settings={"ignore_unknown_options": True})(submit.submit)
app.command("jobs")(jobs.jobs)
app.command("logs")(logs.logs)
app.command("cancel")(jobs.cancel)
app.command("requeue")(jobs.requeue)
app.command("sweep")(sweep.sweep)
job.app.command("candidate")(sweep.candidate)
app.command("visualize")(visualize.visualize)
app.command("recipes")(recipes.recipes)
app.add_typer(data.app, name="data")
app.add_typer(checkpoint.app, name="checkpoint")
app.command("doctor")(doctor.doctor)
app.command("preflight")(preflight.preflight)
app.add_typer(job.app, name="job")


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; report a user's mistake in one line on stderr, with its exit code."""
    run_app(app)
