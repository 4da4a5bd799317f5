"""Tests of rank detection under every launcher, and of its errors for an incomplete environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everest_ds.errors import UsageError
from everest_ds.launch.environment import RankEnvironment, detect_environment

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu-a[07-08]",
    "SLURM_JOB_NODELIST": "gpu-a[01-08]",
}
MASTER = {"MASTER_ADDR": "node9", "MASTER_PORT": "12345"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
# Variables that the ranks inherit from an mpirun daemon started through srun.
DAEMON = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_LOCALID": "0",
}


def test_torchrun_variables_are_taken_as_they_are() -> None:
    assert detect_environment(TORCHRUN) == RankEnvironment("torchrun", 3, 4, 1, 2, "node1", 29500)


def test_the_deepspeed_launcher_says_local_size() -> None:
    variables = {**TORCHRUN, "LOCAL_SIZE": "2"}
    del variables["LOCAL_WORLD_SIZE"]
    assert detect_environment(variables).local_world_size == 2


def test_srun_counts_the_step_and_this_node() -> None:
    assert detect_environment(SRUN) == RankEnvironment("srun", 5, 7, 1, 3, "gpu-a07", 24711)


@given(st.integers(1, 2**26), st.integers(0, 1000))
def test_srun_port_is_the_same_on_all_ranks_and_outside_the_ephemeral_range(job: int, step: int) -> None:
    variables = {**SRUN, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
    port = detect_environment(variables).master_port
    assert 20_000 <= port <= 29_999
    assert detect_environment({**variables, "SLURM_PROCID": "0"}).master_port == port


def test_steps_that_run_side_by_side_in_one_job_get_their_own_ports() -> None:
    ports = {detect_environment({**SRUN, "SLURM_STEP_ID": str(step)}).master_port for step in range(50)}
    assert len(ports) == 50


def test_an_explicit_address_and_port_go_before_slurms() -> None:
    place = detect_environment({**SRUN, **MASTER})
    assert (place.master_addr, place.master_port) == ("node9", 12345)


def test_srun_with_pmi2_is_still_srun() -> None:
    assert detect_environment({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "7"}).launcher == "srun"


@pytest.mark.parametrize("mpirun", [OPENMPI, MPICH], ids=["openmpi", "mpich"])
def test_mpirun_inside_a_slurm_job_does_not_read_its_daemons_rank(mpirun: dict[str, str]) -> None:
    place = detect_environment({**DAEMON, **mpirun, **MASTER})
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (1, 2, 1, 2)


@pytest.mark.parametrize(
    "step", [None, 0xFFFFFFFB, 0xFFFFFFFA], ids=["batch script", "batch step", "salloc shell"]
)
def test_a_slurm_process_without_peers_is_a_plain_one(step: int | None) -> None:
    variables = {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_ID": str(step)}
    if step is None:
        del variables["SLURM_STEP_ID"]
    assert detect_environment(variables).launcher == "plain"


def test_plain_process_is_rank_0_of_1_on_a_free_local_port() -> None:
    place = detect_environment({})
    assert place == RankEnvironment("plain", 0, 1, 0, 1, "127.0.0.1", place.master_port)
    assert 0 < place.master_port < 2**16


@pytest.mark.parametrize("variables", [TORCHRUN, SRUN, {**OPENMPI, **MASTER}, {**MPICH, **MASTER}, {}])
def test_variables_lead_back_to_the_same_place(variables: dict[str, str]) -> None:
    place = detect_environment(variables)
    again = detect_environment(place.as_variables())
    assert again.as_variables() == place.as_variables()


NEEDED = [
    *((TORCHRUN, name) for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")),
    *(
        (SRUN, name)
        for name in SRUN
        if name not in ("SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
    ),
    *(({**OPENMPI, **MASTER}, name) for name in OPENMPI),
    *(({**MPICH, **MASTER}, name) for name in MPICH if name != "MPI_LOCALRANKID"),
]


@pytest.mark.parametrize(("variables", "name"), NEEDED, ids=[name for _, name in NEEDED])
def test_a_missing_variable_is_named(variables: dict[str, str], name: str) -> None:
    with pytest.raises(UsageError, match=name):
        detect_environment({key: value for key, value in variables.items() if key != name})


def test_the_jobs_nodes_stand_in_for_the_steps() -> None:
    variables = {key: value for key, value in SRUN.items() if key != "SLURM_STEP_NODELIST"}
    assert detect_environment(variables).master_addr == "gpu-a01"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "4"),
        ("RANK", "-1"),
        ("RANK", "one"),
        ("RANK", ""),
        ("WORLD_SIZE", "0x4"),
        ("LOCAL_RANK", "2"),
        ("MASTER_PORT", "70000"),
        ("MASTER_ADDR", ""),
    ],
)
def test_an_impossible_value_is_refused_with_its_name(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"{name}\\b"):
        detect_environment({**TORCHRUN, name: value})


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "4"}, {"PMI_RANK": "0", "PMI_SIZE": "4"}])
def test_a_world_without_a_rank_is_not_taken_for_a_single_process(variables: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"_SIZE=4"):
        detect_environment(variables)


WHO_AM_I = """
import json
from everest_ds.launch.environment import detect_environment
detect_environment()  # a second call must not need a second MPI
print(json.dumps(detect_environment().as_variables()) + "\\n", end="", flush=True)
"""


def _clean_environment(**more: str) -> dict[str, str]:
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
    return {**keep, "PYTHONPATH": os.pathsep.join(sys.path), **more}


def test_under_a_real_mpirun_all_ranks_agree_on_where_rank_0_listens() -> None:
    mpiexec = Path(sys.executable).parent / "mpiexec.hydra"
    if not mpiexec.exists():
        pytest.skip("mpiexec.hydra is missing beside the interpreter: pip install mpi4py mpich")
    command = [str(mpiexec), "-n", "3", sys.executable, "-c", WHO_AM_I]
    output = subprocess.run(
        command, env=_clean_environment(), check=True, capture_output=True, text=True, timeout=60
    ).stdout
    places = [json.loads(line) for line in output.splitlines()]
    assert {(place["RANK"], place["WORLD_SIZE"]) for place in places} == {("0", "3"), ("1", "3"), ("2", "3")}
    assert len({(place["MASTER_ADDR"], place["MASTER_PORT"]) for place in places}) == 1


def test_an_mpi_library_that_is_not_mpiruns_is_refused_instead_of_hanging() -> None:
    pytest.importorskip("mpi4py", reason="mpi4py is missing: pip install mpi4py mpich")
    command = [sys.executable, "-c", WHO_AM_I]
    # These are Open MPI's variables. Another MPI library ignores them, so mpi4py sees a world of one rank.
    done = subprocess.run(
        command, env=_clean_environment(**OPENMPI), capture_output=True, text=True, timeout=60
    )
    assert "different MPI libraries" in done.stderr or "cannot load an MPI library" in done.stderr


def test_a_missing_mpi_library_says_what_to_install() -> None:
    pytest.importorskip("mpi4py", reason="mpi4py is missing: pip install mpi4py mpich")
    command = [sys.executable, "-c", WHO_AM_I]
    environment = _clean_environment(**MPICH, MPI4PY_LIBMPI="/no/such/libmpi.so")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert "pip install mpi4py mpich" in done.stderr
