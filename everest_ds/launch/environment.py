"""Detection of this process's rank under torchrun, deepspeed, mpirun, srun or no launcher at all."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from everest_ds.errors import UsageError
from everest_ds.launch.slurm_nodelist import expand_nodelist, expand_task_counts

Environ = Mapping[str, str]

LOCALHOST = "127.0.0.1"
# Below Linux's ephemeral range (32768 and up), so that no outgoing connection occupies the port by chance.
_SLURM_PORTS = range(20_000, 30_000)
# A prime stride, so that job steps of one job and of concurrent jobs rarely choose the same port.
_STEP_STRIDE = 101
# SLURM reserves step ids from here on for steps that srun does not start: salloc's interactive shell, the
# batch script and the extern step.
_FIRST_PSEUDO_STEP = 0xFFFF_FFF0


@dataclass(frozen=True)
class RankEnvironment:
    """The position of one rank among all ranks, and the address on which rank 0 listens.

    `local_rank` and `local_world_size` count only the ranks on this host.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int

    def as_variables(self) -> dict[str, str]:
        """Return the environment variables that torch and DeepSpeed read.

        All of them must be set, because DeepSpeed tries MPI discovery if one is missing.
        """
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def detect_environment(environ: Environ = os.environ) -> RankEnvironment:
    """Read this rank's position from the variables that its launcher set.

    Under mpirun without MASTER_ADDR and MASTER_PORT this is a collective call: every rank must make it.

    Raises:
        UsageError: if a variable is missing, not an integer or out of range, or mpi4py finds no MPI library.
    """
    launcher = next((each for each in _LAUNCHERS if each.started(environ)), None)
    if launcher is None:
        _refuse_strays(environ)
        return RankEnvironment("plain", 0, 1, 0, 1, LOCALHOST, free_port())
    world_size = _integer(environ, launcher.world_size)
    local_world_size = _local_world_size(launcher, environ)
    rank = _below(environ, launcher.rank, world_size)
    local_rank = _below(environ, launcher.local_rank, local_world_size)
    address, port = launcher.rendezvous(environ, world_size, local_world_size)
    return RankEnvironment(launcher.name, rank, world_size, local_rank, local_world_size, address, port)


def free_port() -> int:
    """Return a TCP port that is unused at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class _Launcher:
    """The names of the variables in which a launcher passes a rank its position.

    In a tuple of names, the first variable that is set counts.
    """

    name: str
    started: Callable[[Environ], bool]
    rank: str
    world_size: str
    local_rank: str
    local_world_size: tuple[str, ...]
    rendezvous: Callable[[Environ, int, int], tuple[str, int]]


def _is_srun_task(environ: Environ) -> bool:
    """Return whether srun started this process.

    SLURM_PROCID proves nothing, because a batch script has it too. A batch script has no step id, and a
    salloc shell has a reserved one.
    """
    return "SLURM_STEP_ID" in environ and _integer(environ, "SLURM_STEP_ID") < _FIRST_PSEUDO_STEP


def _given_rendezvous(environ: Environ, world_size: int, local_world_size: int) -> tuple[str, int]:
    return _text(environ, "MASTER_ADDR"), _port(environ)


def _slurm_rendezvous(environ: Environ, world_size: int, local_world_size: int) -> tuple[str, int]:
    """Return the step's first host, and a port that every rank derives from the job and step ids.

    MASTER_ADDR and MASTER_PORT take precedence if they are set.
    """
    address = environ.get("MASTER_ADDR")
    if not address:
        address = expand_nodelist(_text(environ, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"))[0]
    if "MASTER_PORT" in environ:
        return address, _port(environ)
    job, step = _integer(environ, "SLURM_JOB_ID"), _integer(environ, "SLURM_STEP_ID")
    return address, _SLURM_PORTS[(job + _STEP_STRIDE * step) % len(_SLURM_PORTS)]


def _mpi_rendezvous(environ: Environ, world_size: int, local_world_size: int) -> tuple[str, int]:
    """Return rank 0's address and port, broadcasting over MPI what the environment does not set.

    This is a collective call unless both MASTER_ADDR and MASTER_PORT are set.
    """
    if "MASTER_ADDR" in environ and "MASTER_PORT" in environ:
        return _given_rendezvous(environ, world_size, local_world_size)
    address, port = _broadcast_address(world_size, world_size == local_world_size)
    return environ.get("MASTER_ADDR", address), _port(environ) if "MASTER_PORT" in environ else port


@cache  # MPI cannot be initialized again after MPI.Finalize, so a second call reuses the first answer
def _broadcast_address(world_size: int, one_host: bool) -> tuple[str, int]:
    """Broadcast rank 0's address and a free port of its host over MPI, then shut MPI down."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no MPI library
        raise UsageError(
            "mpirun started this rank, but mpi4py cannot load an MPI library",
            given=str(error).splitlines()[0],
            fix="pip install mpi4py mpich, or set MASTER_ADDR and MASTER_PORT",
        ) from error
    world = MPI.COMM_WORLD
    if world.Get_size() != world_size:
        raise UsageError(
            "mpirun and mpi4py belong to different MPI libraries",
            given=f"{world_size} ranks by mpirun, {world.Get_size()} by mpi4py",
            fix="start with the mpirun of the MPI library that mpi4py loads",
        )
    host = LOCALHOST if one_host else socket.gethostname()
    address, port = world.bcast((host, free_port()), root=0)
    # Without this call, MPI keeps a failing rank waiting at exit until all ranks exit, and hides the failure.
    MPI.Finalize()
    return address, port


_LAUNCHERS = (
    # This entry serves torchrun, deepspeed (which sets LOCAL_SIZE) and the local launcher. WORLD_SIZE comes
    # last for a user who exports RANK by hand on one host, where all ranks are local.
    _Launcher(
        "torchrun",
        lambda environ: "RANK" in environ,
        rank="RANK",
        world_size="WORLD_SIZE",
        local_rank="LOCAL_RANK",
        local_world_size=("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"),
        rendezvous=_given_rendezvous,
    ),
    # Both MPI launchers precede srun: inside a SLURM job they start one daemon per node through srun, and the
    # ranks inherit the daemon's SLURM_PROCID. `srun --mpi=pmi2` sets PMI_RANK too, but never MPI_LOCALRANKID.
    _Launcher(
        "openmpi",
        lambda environ: "OMPI_COMM_WORLD_RANK" in environ,
        rank="OMPI_COMM_WORLD_RANK",
        world_size="OMPI_COMM_WORLD_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        local_world_size=("OMPI_COMM_WORLD_LOCAL_SIZE",),
        rendezvous=_mpi_rendezvous,
    ),
    _Launcher(
        "mpich",
        lambda environ: "MPI_LOCALRANKID" in environ,
        rank="PMI_RANK",
        world_size="PMI_SIZE",
        local_rank="MPI_LOCALRANKID",
        local_world_size=("MPI_LOCALNRANKS",),
        rendezvous=_mpi_rendezvous,
    ),
    _Launcher(
        "srun",
        _is_srun_task,
        rank="SLURM_PROCID",
        world_size="SLURM_NTASKS",
        local_rank="SLURM_LOCALID",
        local_world_size=("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"),
        rendezvous=_slurm_rendezvous,
    ),
)

# Variable with a number of ranks -> the rank variable that is set with it by the launcher.
_STRAYS = {
    "WORLD_SIZE": "RANK",
    "PMI_SIZE": "MPI_LOCALRANKID",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
}


def _refuse_strays(environ: Environ) -> None:
    """Raise an error if a variable announces several ranks but this process has no rank.

    Otherwise N processes would each train alone, as rank 0 of 1, in the same run folder.
    """
    for size, rank in _STRAYS.items():
        if size in environ and _integer(environ, size) != 1:
            raise UsageError(
                f"{rank} is not set, but {size} is",
                given=f"{size}={environ[size]}",
                fix=f"start with torchrun, mpirun or srun, or unset {size}",
            )


def _local_world_size(launcher: _Launcher, environ: Environ) -> int:
    """Return the number of ranks on this host; SLURM lists one number per node, indexed by SLURM_NODEID."""
    name = next((name for name in launcher.local_world_size if name in environ), launcher.local_world_size[0])
    if not name.endswith("TASKS_PER_NODE"):
        return _integer(environ, name)
    counts = expand_task_counts(_text(environ, name))
    return counts[_below(environ, "SLURM_NODEID", len(counts))] if len(counts) > 1 else counts[0]


def _text(environ: Environ, *names: str) -> str:
    """Return the value of the first variable in `names` that is set and not empty."""
    for name in names:
        if environ.get(name):
            return environ[name]
    raise UsageError(
        f"environment variable {' or '.join(names)} is not set",
        fix="start with torchrun, mpirun or srun, which set all variables that a rank needs",
    )


def _integer(environ: Environ, name: str) -> int:
    text = _text(environ, name)
    if not (text.isascii() and text.isdigit()):
        raise UsageError(
            f"environment variable {name} is not a whole number",
            given=repr(text),
            allowed="an integer, 0 or more",
        )
    return int(text)


def _below(environ: Environ, name: str, limit: int) -> int:
    value = _integer(environ, name)
    if value >= limit:
        raise UsageError(
            f"environment variable {name} is too large", given=value, allowed=f"less than {limit}"
        )
    return value


def _port(environ: Environ) -> int:
    port = _integer(environ, "MASTER_PORT")
    if not 0 < port < 2**16:
        raise UsageError("environment variable MASTER_PORT is not a port", given=port, allowed="1 to 65535")
    return port
