"""Tests of the sbatch command, checked against golden files, and of its safety from shell interpretation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everest_ds.errors import ExitCode, UsageError
from everest_ds.jobs.requeue import MAX_RESTARTS
from everest_ds.jobs.sbatch import (
    BatchJob,
    JobShape,
    as_shell,
    check_signal,
    exporting,
    job_name,
    limit_seconds,
    sbatch_command,
    signal_seconds,
    split_options,
)
from everest_ds.jobs.sweep_file import SWEEP_FILE, SweepCandidate, write_candidates
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
    ("time", "given"),
    [("5", "--signal=USR1@300"), ("0:45", "-H --signal B:TERM@60"), ("1-0", "--signal=USR1@90000")],
)
def test_a_signal_at_the_start_is_refused(time: str, given: str) -> None:
    with pytest.raises(UsageError, match="as soon as it starts"):
        check_signal(given.split(), time)
    check_signal(given.split(), "2-0")
    check_signal(given.split(), None)


@pytest.mark.parametrize(
    ("options", "default", "added"),
    [
        ("", None, ""),
        ("", "ALL", ""),
        ("--export=ALL,A=1", "NONE", ""),
        ("--export A=1,all", None, ""),
        ("", "NONE", "--export=P,Q --get-user-env"),
        ("--export=NONE --hold", "ALL", "--export=P,Q --get-user-env"),
        ("--export NIL", None, "--export=P,Q"),
        ("--export A=1,B", None, "--export=A=1,B,P,Q"),
        ("--export=ALL --export=HOME", None, "--export=HOME,P,Q"),  # sbatch takes the last
    ],
)
def test_a_job_gets_the_variables_of_its_script(options: str, default: str | None, added: str) -> None:
    given = options.split()
    assert exporting(given, default, ["P", "Q"]) == given + added.split()


def test_the_scripts_use_the_numbers_that_python_owns() -> None:
    common = (shipped("slurm") / "common.sh").read_text()
    lead = re.findall(r"EVEREST_SIGNAL_SECONDS:=([0-9]+)", common)
    scripts = [file.read_text() for file in shipped("slurm").glob("*.sbatch")]
    assert {line for text in scripts for line in text.splitlines() if "--signal" in line} == {
        f"#SBATCH --signal=B:USR1@{lead[0]}"
    }
    assert (
        re.findall(r"(?:exit |everest_code=)([0-9]{2,})$", common, re.M) == [str(ExitCode.STOPPED.value)] * 2
    )
    assert len(lead) == 1 and re.findall(r"requeued \(default: ([0-9]+)\)", common) == [str(MAX_RESTARTS)]


_READ_ANSWER = """
everest_say() { echo "$*" >&2; }
everest_undisturbed() { printf "Welcome\\neverest-ds answers"; "$PYTHON" -m everest_ds "$@"; echo bye; }
eval "$(sed -n '/^everest_ask()/,/^}/p' "$1")"
everest_ask candidate "$2" 1
printf '%s\\0' "${everest_answer[@]}"
"""


def test_the_shell_reads_an_answer_among_greetings(tmp_path: Path) -> None:
    words = ("seed=1\n2", "a b", "\udcff", "", "$(reboot)")  # \udcff: a byte of a name that is not UTF-8
    one = SweepCandidate("000", "pretrain", "r", (), ())
    write_candidates(tmp_path / SWEEP_FILE, [one, replace(one, task="finetune", overrides=words)])
    common = shipped("slurm") / "common.sh"
    done = subprocess.run(
        ["bash", "-c", _READ_ANSWER, "bash", str(common), str(tmp_path / SWEEP_FILE)],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        check=True,
    )
    assert [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]] == ["finetune", "r", *words]


def test_every_script_finds_common_sh_in_the_same_way() -> None:
    """The job's name is not asked for, because its text could hold another path of common.sh."""
    texts = [file.read_text() for file in shipped("slurm").glob("*.sbatch")]
    found = {re.search(r"^# SLURM runs.*\nscript=.*\nsource .*$", text, re.M) for text in texts}
    assert len({match and match[0] for match in found}) == 1 and not any("scontrol" in text for text in texts)
