"""Tests of the sbatch command, checked against golden files, and of its safety from shell interpretation."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everest_ds.errors import ExitCode, UsageError
from everest_ds.jobs.requeue import MAX_RESTARTS
from everest_ds.jobs.sbatch import (
    SIGNAL_SECONDS,
    BatchJob,
    JobShape,
    as_shell,
    job_name,
    limit_seconds,
    sbatch_command,
    signal_seconds,
    split_options,
    with_timely_signal,
)
from everest_ds.shipped import shipped

GOLDEN = Path(__file__).parent / "golden"

PRETRAIN = BatchJob(
    script=Path("/opt/everest/slurm/pretrain.sbatch"),
    arguments=("my.yaml", "schedule.epochs=800"),
    name=job_name("pretrain", Path("runs/first")),
    shape=JobShape(nodes=4, gpus_per_node=8, ranks_per_node=8),
    logs=Path("/data/runs/first/logs"),
    time="1-00:00:00",
    partition="gpu",
)
JOBS = {
    "pretrain": PRETRAIN,
    "cpu_ranks": replace(PRETRAIN, shape=JobShape(nodes=2, ranks_per_node=4), time=None, partition=None),
    "after_another": replace(PRETRAIN, dependency="afterok:123", options=("--qos=high", "--exclusive")),
    "sweep": replace(PRETRAIN, arguments=("/data/lr/sweep.jsonl",), array="0-9%2"),
    "no_run_folder": replace(PRETRAIN, logs=None),
    "hostile_names": replace(
        PRETRAIN,
        arguments=('it\'s a "recipe".yaml', "run.dir=$(touch /tmp/x)\n`reboot`", "a;b|c&d"),
        name=job_name("pretrain", Path("runs/$(touch x)\n100 %")),
        logs=Path("/data/$(touch x)\n100 %/logs"),
    ),
    "backslash": replace(PRETRAIN, logs=Path("/data/a\\b/logs")),
}


@pytest.mark.parametrize("name", JOBS)
def test_the_command_is_the_golden_one(name: str) -> None:
    command = "\n".join(as_shell([word]) for word in sbatch_command(JOBS[name])) + "\n"
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("ACCEPT_GOLDEN"):
        file.write_text(command)
    assert command == file.read_text(), f"if this is meant: ACCEPT_GOLDEN=1 pytest {Path(__file__).name}"


@pytest.mark.parametrize(
    ("words", "positional", "options"),
    [
        ("my.yaml a.b=1 --qos=high", "my.yaml a.b=1", "--qos=high"),
        ("--qos high my.yaml a.b=1", "my.yaml a.b=1", "--qos high"),
        ("--exclusive my.yaml", "my.yaml", "--exclusive"),
        ("-A team -p gpu my.yaml -H a.b=1", "my.yaml a.b=1", "-A team -p gpu -H"),
        ("-Ateam my.yaml", "my.yaml", "-Ateam"),
        ("my.yaml --export A=1 a.b=2", "my.yaml a.b=2", "--export A=1"),
        ("my.yaml --mail-type", "my.yaml", "--mail-type"),
    ],
)
def test_unknown_options_are_told_from_overrides(words: str, positional: str, options: str) -> None:
    assert split_options(words.split()) == (positional.split(), options.split())


@pytest.mark.parametrize("option", ["-N2", "--ntasks=4", "--gres=gpu:2", "--output=x", "--wrap=ls", "-a0-3"])
def test_an_option_that_would_change_what_was_checked_is_refused(option: str) -> None:
    with pytest.raises(UsageError, match="fix: use "):
        split_options(["my.yaml", option])


@pytest.mark.parametrize(
    ("options", "seconds"),
    [("--signal=USR1@600", 600), ("--qos x --signal B:TERM@90 -H", 90), ("--signal=USR1", None), ("", None)],
)
def test_the_time_between_signal_and_end_is_read(options: str, seconds: int | None) -> None:
    assert signal_seconds(options.split()) == seconds


@given(st.text(max_size=40))
def test_a_job_name_is_harmless_whatever_the_run_is_called(text: str) -> None:
    name = job_name("pretrain", Path("runs") / text.replace("/", "").replace("\0", ""))
    assert name.replace(".", "").replace("-", "").replace("_", "").isascii()
    assert name.isprintable() and not set(name) & set(" %$`'\"\\;&|") and len(name) <= 80


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("5", 300),
        ("1:30", 90),
        ("2:00:05", 7205),
        ("1-2", 93600),
        ("1-2:03", 93780),
        ("1-2:03:04", 93784),
        ("UNLIMITED", None),
        ("0", None),
        ("1:2:3:4", None),
        (None, None),
    ],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(time: str | None, seconds: int | None) -> None:
    assert limit_seconds(time) == seconds


@pytest.mark.parametrize(
    ("time", "given", "lead"),
    [
        ("5", [], ["--signal=USR1@75"]),
        ("19:59", [], ["--signal=USR1@299"]),
        ("20", [], []),
        (None, [], []),
        ("5", ["--signal", "USR1@10"], ["--signal", "USR1@10"]),
        ("5", ["--signal=TERM"], ["--signal=TERM"]),
    ],
)
def test_a_short_job_is_not_told_to_stop_as_it_starts(
    time: str | None, given: list[str], lead: list[str]
) -> None:
    assert with_timely_signal(given, time) == lead


def test_the_scripts_use_the_numbers_that_python_owns() -> None:
    asked = [line for file in shipped("slurm").glob("*.sbatch") for line in file.read_text().splitlines()]
    signals = {line for line in asked if "--signal" in line}
    assert signals == {f"#SBATCH --signal=USR1@{SIGNAL_SECONDS}"}
    common = (shipped("slurm") / "common.sh").read_text()
    assert (
        re.findall(r"(?:exit |everest_code=)([0-9]{2,})$", common, re.M) == [str(ExitCode.STOPPED.value)] * 2
    )
    assert re.findall(r"EVEREST_SIGNAL_SECONDS:-([0-9]+)", common) == [str(SIGNAL_SECONDS)]
    assert re.findall(r"requeued \(default: ([0-9]+)\)", common) == [str(MAX_RESTARTS)]
