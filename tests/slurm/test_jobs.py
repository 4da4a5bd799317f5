"""Tests of whole jobs on a local cluster: chains, arrays, limits, a bad node, a full disk, and MPI."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from everest_ds.config import dump_experiment
from tests.slurm.cluster import SCRIPTS, Job, LocalCluster, Run, evaluation, run, wait_for
from tests.slurm.conftest import NUM_STEPS
from tests.slurm.report import FaultTimes
from tests.training.runs import experiment, losses

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

PRETRAIN = SCRIPTS / "pretrain.sbatch"
SHORT = ("schedule.epochs=8",)  # 24 steps


def test_submit_to_finish(undisturbed: dict[int, float]) -> None:
    assert len(undisturbed) == NUM_STEPS and undisturbed[NUM_STEPS] < undisturbed[1]


def test_a_chain_hands_weights_on_and_ends_in_a_report(
    cluster: LocalCluster, recipe: Path, motion_data: Path, work: Path
) -> None:
    size = {"backbone": "vit_tiny", "image_size": 16, "patch_size": 8, "num_frames": 4}
    short = {"epochs": 1, "warmup_epochs": 0}
    config = experiment(
        motion_data, work / "fine", "finetune", model=size, data={"num_workers": 0}, schedule=short
    )
    (work / "fine.yaml").write_text(dump_experiment(config))
    folder = f"run.dir={work / 'pre'}"
    jobs = [cluster.submit(PRETRAIN, str(recipe), folder, "schedule.epochs=2")]
    for script, *arguments in (
        ("finetune", "fine.yaml", f"model.init_from={work / 'pre'}"),
        ("evaluate", str(work / "fine")),
        ("report", str(work / "pre"), str(work / "fine"), "--out", str(work / "report")),
    ):
        after = f"--dependency=afterok:{jobs[-1].number}"
        jobs.append(cluster.submit(SCRIPTS / f"{script}.sbatch", *arguments, options=(after,)))
    for job in jobs:
        job.wait("COMPLETED")
    assert "encoder weights from" in jobs[1].output
    assert 0 <= evaluation(work / "fine")["top1"] <= 100
    assert any((work / "report").iterdir())


def test_tasks_of_an_array_are_requeued_one_by_one(cluster: LocalCluster, recipe: Path, work: Path) -> None:
    script = work / "seeds.sbatch"
    script.write_text(
        "#!/bin/bash\n#SBATCH --signal=USR1@300\n#SBATCH --output=seeds-%A_%a.out\n"
        f'source {shlex.quote(str(SCRIPTS))}/common.sh\neverest_ranks pretrain "$1" schedule.epochs=30'
        f' run.seed="$SLURM_ARRAY_TASK_ID" run.dir={shlex.quote(str(work))}/"seed-$SLURM_ARRAY_TASK_ID"\n'
    )
    array = cluster.submit(script, str(recipe), options=("--nodes=1", "--array=1-2"))
    tasks = [Job(cluster, f"{array.number}_{n}") for n in (1, 2)]
    wait_for(lambda: Run(work / "seed-2").step > 0, "task 2 trains")
    # The last task also has the job id of the whole array, but only this task is to be signalled.
    cluster.slurm("scancel", "--signal=USR1", tasks[1].number)
    for task in tasks:
        task.wait("COMPLETED")
    assert [task.restarts for task in tasks] == [0, 1]
    assert losses(work / "seed-1").keys() == losses(work / "seed-2").keys()


def test_a_job_at_its_restart_limit_stops_and_says_so(
    cluster: LocalCluster, recipe: Path, work: Path
) -> None:
    run = Run(work / "bounded")
    job = cluster.submit(PRETRAIN, str(recipe), f"run.dir={run.path}", EVEREST_MAX_RESTARTS="0")
    run.steps_beyond(job, 0)
    cluster.slurm("scancel", "--signal=USR1", job.number)
    job.wait("FAILED")
    job.ended_everywhere()
    assert "restarted 0 times, which is the limit" in job.output
    assert run.events(job)[-1].event == "stopped"


def test_a_node_with_other_data_is_named_excluded_and_replaced(
    cluster: LocalCluster, recipe: Path, motion_data: Path, work: Path
) -> None:
    other = work / "train.txt"
    other.write_text("".join((motion_data / "train.txt").read_text().splitlines(True)[:-1]))
    pid = (cluster.folder / "run" / "node2.pid").read_text()
    space = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
    mount = ["nsenter", f"--target={space}", "--mount", "mount", "--bind", str(other)]
    subprocess.run([*mount, str(motion_data / "train.txt")], check=True)
    run = Run(work / "moved")
    try:
        job = cluster.submit(
            PRETRAIN, str(recipe), f"run.dir={run.path}", *SHORT, EVEREST_EXCLUDE_BAD_NODES="1"
        )
        job.wait("COMPLETED")
    finally:
        cluster.tool("start", "node2")  # a restarted node no longer has the mount
        cluster.calm()
    failed = run.events(job, "failed")
    assert [(e.nodes, e.code) for e in failed] == [("node2", 9)]
    assert "node2 cannot take part" in job.output and "does not see the same data" in job.output
    assert job.restarts == 1 and job.show("ExcNodeList") == ["node2"]


def test_a_full_disk_ends_the_job_and_the_next_one_goes_on(
    cluster: LocalCluster, recipe: Path, undisturbed: dict[int, float]
) -> None:
    disk = cluster.folder.parent / "small-disk"
    run, ballast = Run(disk / "run"), disk / "ballast"
    arguments = (str(recipe), f"run.dir={run.path}", "run.keep_checkpoints=1")
    job = cluster.submit(PRETRAIN, *arguments)
    run.steps_beyond(job, 0, 15)
    fill(ballast)
    job.wait("FAILED")
    job.ended_everywhere()
    assert job.restarts == 0 and "free disk space" in job.output
    ballast.unlink()
    again = cluster.submit(PRETRAIN, *arguments)
    run.steps_beyond(again, 0, 3)
    (run.path / "kill").touch()
    again.wait("FAILED")  # exit code 75: stopped on request
    done = losses(run.path)
    assert min(done) == 1 and done == {step: undisturbed[step] for step in range(1, len(done) + 1)}


def fill(file: Path) -> None:
    with open(file, "wb", buffering=0) as stream, pytest.raises(OSError):
        while stream.write(bytes(2**16)):
            pass


def test_a_short_job_submitted_inside_a_job_trains_until_shortly_before_its_limit(
    cluster: LocalCluster,
    recipe: Path,
    work: Path,
    undisturbed: dict[int, float],
    fault_times: list[FaultTimes],
) -> None:
    """A plain sbatch with a limit of one minute, from a rank of another job, whose variables it inherits.

    SLURM warns such a job at its start, because the scripts ask for five minutes. Saving and drawing after
    every step make the run longer than the limit. The name of the job looks like SLURM's record of another
    script.
    """
    run = Run(work / "limited")
    forged = work / "forged"
    forged.mkdir()
    (forged / "common.sh").write_text("touch forged\nexit 3\n")
    slow = ("run.save_every_steps=1", "run.image_every_steps=1")
    job = submit_inside_a_job(
        cluster,
        ("--time=1", "--nodes=2", f"--job-name=x\n   Command={forged}/x.sbatch"),
        (str(PRETRAIN), str(recipe), f"run.dir={run.path}", *slow),
    )
    began, _ = run.steps_beyond(job, 0)
    assert json.loads((run.path / "environment.json").read_text())["world_size"] == 2
    (stop,) = wait_for(lambda: run.events(job, "stopped"), "stopped")
    stopped = time.time()
    wait_for(lambda: job.restarts > stop.restarts, "requeued")
    requeued = time.time()
    cluster.slurm("scontrol", "update", f"JobId={job.number}", "TimeLimit=UNLIMITED")
    trained, resumed_from = run.steps_beyond(job, stop.restarts + 1)
    job.cancel()
    (start, *_) = run.events(job, "started")
    assert stop.restarts == 0 and 20 < stop.seconds - start.seconds < 60 and began < stop.seconds
    assert "the ranks are stopped 15 s before it" in job.output and not (work / "forged" / "forged").exists()
    done = losses(run.path)
    assert resumed_from == stop.step
    assert done == {step: undisturbed[step] for step in range(1, len(done) + 1)}
    fault_times.append(FaultTimes("time limit, USR1 before it", requeued - stopped, trained - stopped, 0))


def submit_inside_a_job(cluster: LocalCluster, options: tuple[str, ...], words: tuple[str, ...]) -> Job:
    """Call sbatch in a task of an array job that was restarted, as one rank of torchrun would."""
    call = shlex.join(["sbatch", "--parsable", *options, *words])
    text = (
        f"#!/bin/bash\nexport RANK=1 WORLD_SIZE=4 MASTER_ADDR=elsewhere\nsrun --cpu-bind=none {call} >inner\n"
    )
    Path("outer.sbatch").write_text(text)
    outer = ("--array=3", "--nodes=1", "--ntasks=1", "--cpus-per-task=2")
    run(["sbatch", "--wait", *outer, "outer.sbatch"], {**cluster.variables, "SLURM_RESTART_COUNT": "2"})
    return Job(cluster, Path("inner").read_text().strip())


@pytest.mark.parametrize("launcher", ["srun --mpi=pmi2", "mpirun"])
def test_mpi_starts_the_same_world(
    launcher: str, cluster: LocalCluster, recipe: Path, work: Path, undisturbed: dict[int, float]
) -> None:
    binaries = Path(sys.executable).parent
    if not (binaries / "mpirun").is_file():
        pytest.skip("no mpirun beside this Python: pip install mpich")
    run = Run(work / launcher.replace(" ", ""))
    command = [*launcher.split(), "-n", "2", sys.executable]
    command[0] = str(binaries / "mpirun") if launcher == "mpirun" else "srun"
    # Each line is one write, so that the lines of two ranks do not mix.
    world = "import os; from mpi4py import MPI; os.write(1, b'of %d\\n' % MPI.COMM_WORLD.Get_size())"
    train = ["-m", "everest_ds", "pretrain", str(recipe), f"run.dir={run.path}", "run.save_every_steps=500"]
    text = f"#!/bin/bash\n{shlex.join([*command, '-c', world])} && {shlex.join([*command, *train])}\n"
    (work / "mpi.sbatch").write_text(text)
    job = cluster.submit(work / "mpi.sbatch", options=("--ntasks-per-node=1",))
    wait_for(lambda: run.step >= 5, "steps")
    (run.path / "kill").touch()
    job.wait("FAILED")
    assert job.output.count("of 2") == 2
    done = losses(run.path)
    assert done == {step: undisturbed[step] for step in range(1, len(done) + 1)}
