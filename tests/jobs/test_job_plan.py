"""Tests of jobs as a library: a request becomes checked sbatch jobs without the command line and torch."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from everest_ds.errors import UsageError
from everest_ds.jobs.job_plan import Hardware, JobRequest, QueueSettings, plan_submission
from everest_ds.jobs.sbatch import BatchJob, JobShape

_PLAN_WITHOUT_TORCH = """
import pkgutil, sys
from importlib import import_module
import everest_ds.jobs
for module in pkgutil.iter_modules(everest_ds.jobs.__path__):
    import_module(f"everest_ds.jobs.{module.name}")
from everest_ds.jobs.job_plan import JobRequest, plan_submission
plan_submission(JobRequest("profile", ["k400_pretrain_vit_base"]))
print(*sorted({"torch", "deepspeed", "typer"} & set(sys.modules)))
"""


def test_jobs_are_planned_without_torch_and_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-c", _PLAN_WITHOUT_TORCH], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_a_request_becomes_the_jobs_of_sbatch(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("".join(f"{number}.mp4\n" for number in range(64)))
    words = [
        "k400_pretrain_vit_base",
        f"run.dir={tmp_path}/run",
        f"data.train={tmp_path}/train.txt",
        "batch.micro_batch_size=2",
        "batch.global_batch_size=8",
    ]
    options = ["--qos=high", "--signal=USR1@120"]
    queue = QueueSettings(time="8", nodelist="n[3-4]", options=options, max_restarts=7)
    submission = plan_submission(JobRequest("pretrain", words, Hardware(2, gpus_per_node=2), queue))
    (job,) = submission.jobs
    assert (job.script.name, job.arguments, job.logs) == (
        "pretrain.sbatch",
        tuple(words),
        tmp_path / "run/logs",
    )
    assert job.shape == JobShape(nodes=2, gpus_per_node=2, ranks_per_node=2)
    assert job.options == ("--qos=high", "--signal=USR1@120")
    assert (job.environment["EVEREST_SIGNAL_SECONDS"], job.environment["EVEREST_MAX_RESTARTS"]) == (
        "120",
        "7",
    )
    assert [(place.host, place.local_rank) for place in submission.ranks] == [
        *(("n3", 0), ("n3", 1)),
        *(("n4", 0), ("n4", 1)),
    ]
    assert not (tmp_path / "run").exists()


def test_the_python_that_the_caller_exports_is_that_of_the_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site.env"
    site.write_text('SBATCH_EXPORT=NONE\n: "${EVEREST_PYTHON:=/site/python}"\n')
    requests = [
        JobRequest("profile", ["k400_pretrain_vit_base"], queue=QueueSettings(cluster=cluster))
        for cluster in (None, str(site))
    ]
    monkeypatch.delenv("EVEREST_PYTHON", raising=False)
    plain, of_site = (plan_submission(request).jobs[0] for request in requests)
    pythons = [job.environment["EVEREST_PYTHON"] for job in (plain, of_site)]
    assert pythons == [sys.executable, "/site/python"]
    assert plain.options == () and of_site.options[0].startswith("--export=EVEREST_PYTHON,")
    monkeypatch.setenv("EVEREST_PYTHON", "/my/python")
    for request in requests:
        assert plan_submission(request).jobs[0].environment["EVEREST_PYTHON"] == "/my/python"


def test_a_signal_of_the_environment_counts_like_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the ranks would expect the signal of the scripts, and a short job would never train."""
    site = tmp_path / "site.env"
    site.write_text("SBATCH_SIGNAL=B:USR1@900\n")

    def job(options: Sequence[str] = (), time: str | None = None, cluster: str | None = None) -> BatchJob:
        queue = QueueSettings(time=time, options=options, cluster=cluster)
        return plan_submission(JobRequest("profile", ["k400_pretrain_vit_base"], queue=queue)).jobs[0]

    assert "EVEREST_SIGNAL_SECONDS" not in job().environment
    assert job(cluster=str(site)).environment["EVEREST_SIGNAL_SECONDS"] == "900"
    monkeypatch.setenv("SBATCH_SIGNAL", "USR1@600")
    assert job().options == ("--signal=USR1@600",)
    assert job().environment["EVEREST_SIGNAL_SECONDS"] == "600"
    assert job(["--signal", "USR1@60"]).environment["EVEREST_SIGNAL_SECONDS"] == "60"
    with pytest.raises(UsageError, match="--signal would stop the job as soon as it starts"):
        job(time="10")


def test_the_code_of_the_guide_plans_its_job_and_asks_for_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "submit.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    (tmp_path / "train.txt").write_text("".join(f"{number}.mp4\n" for number in range(2048)))
    (tmp_path / "my.yaml").write_text(
        "base: k400_pretrain_vit_base\ndata: {train: train.txt}\nbatch: {micro_batch_size: 8}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    names: dict[str, object] = {}
    with pytest.raises(UsageError, match="SLURM is not installed here"):
        exec(compile(code, "docs/submit.md", "exec"), names)
    (job,) = names["submission"].jobs  # type: ignore[attr-defined]
    assert job.shape == JobShape(nodes=4, gpus_per_node=8, ranks_per_node=8) and job.time == "1-00:00:00"
