"""The ranks of a run: joining the process group, and the small messages between hosts."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from everest_ds.errors import EverestError, OutOfMemoryError, RankLostError, RunFolderError, UsageError
from everest_ds.parallel.deepspeed_internals import silence, skip_shared_memory_collectives
from everest_ds.parallel.rendezvous import create_store, stay_on_loopback

T = TypeVar("T")

# Parts of the error messages of NCCL and gloo when a connection to another rank breaks.
_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "gloo/transport",
    "NCCL",
    "Broken pipe",
)
# Default time after which a silent rank counts as lost. Longer than the slowest regular step, which is the
# first one on a cold file system.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
# Time for the remaining ranks to answer after a failure. All of them notice the failure at about the same
# time, and a launcher waits longer than this before it ends the remaining ranks.
_ROLL_CALL_SECONDS = 5.0


@dataclass(frozen=True)
class World:
    """This process and the process group that it has joined.

    Attributes:
        rank: 0 .. size - 1.
        size: number of processes.
        local_rank: the rank's index on its node.
        local_size: number of ranks on this node.
        device: the device on which this rank computes.
        control: a gloo group for host-side messages, so that they never wait for the accelerator.
        store: the key-value store through which the ranks found each other, hosted by rank 0 or by torchrun.
            It still answers when process groups have failed.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    control: dist.ProcessGroup
    store: dist.Store

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes the files that a run writes once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all ranks have reached this call."""
        dist.barrier(group=self.control)

    def any(self, flag: bool) -> bool:
        """Return True on every rank if `flag` is true on at least one."""
        return bool(self.greatest(int(flag)))

    def greatest(self, value: int) -> int:
        """Return the greatest of all ranks' values, on every rank."""
        answer = torch.tensor(value)
        dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=self.control)
        return int(answer)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Return the element-wise mean over the ranks, on the host, summed in rank order."""
        gathered = [torch.zeros_like(value, device="cpu") for _ in range(self.size)]
        dist.all_gather(gathered, value.detach().cpu(), group=self.control)
        return torch.stack(gathered).mean(dim=0)

    def gather(self, value: T) -> list[T]:
        """Return every rank's `value` in rank order, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def lost_ranks(self) -> list[int]:
        """Return the ranks that no longer answer. Call after a failure, on every rank that notices it."""
        missing = [rank for rank in range(self.size) if rank != self.rank]
        deadline = time.monotonic() + _ROLL_CALL_SECONDS
        try:
            self.store.set(f"here/{self.rank}", "")
        except RuntimeError:
            return [0]
        with contextlib.suppress(RuntimeError):  # rank 0 hosts the store and may exit before this rank
            while missing and time.monotonic() < deadline:
                time.sleep(0.1)
                missing = [rank for rank in missing if not self.store.check([f"here/{rank}"])]
        return missing

    def share(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 and return its result on every rank; an error of rank 0 is raised on all.

        Arrays in the result are sent from and received into their own memory, without a copy.
        """
        outcome, arrays = _Outcome(), list[torch.Tensor]()
        box: list[Any] = [None, None]
        if self.is_main:
            outcome, parts = _attempt(make), list[pickle.PickleBuffer]()
            pickled = pickle.dumps(outcome, protocol=5, buffer_callback=parts.append)
            arrays = [_as_bytes(part) for part in parts]
            box = [pickled, [len(array) for array in arrays]]
        dist.broadcast_object_list(box, src=0, group=self.control)
        pickled, sizes = box
        if not self.is_main:
            arrays = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        for array in filter(len, arrays):
            dist.broadcast(array, src=0, group=self.control)
        if not self.is_main:
            outcome = pickle.loads(pickled, buffers=[array.numpy() for array in arrays])
        return outcome.result()

    def together(self, act: Callable[[], T]) -> T:
        """Run `act` on every rank; if it fails on one, all ranks raise that rank's error.

        The cost is one small message between hosts, low enough for a training step.
        """
        outcome = _attempt(act)
        if self.any(outcome.error is not None):
            next(o for o in self.gather(_Outcome(error=outcome.error)) if o.error is not None).result()
        return outcome.result()


@dataclass(frozen=True)
class _Outcome:
    value: Any = None
    error: Exception | None = None

    def result(self) -> Any:
        if self.error is None:
            return self.value
        if isinstance(self.error, EverestError):
            self.error.on_every_rank = True
        raise self.error


def _as_bytes(part: pickle.PickleBuffer) -> torch.Tensor:
    """Return the memory of a part of a pickled object as a tensor; it is only read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        raw = part.raw()
        return torch.frombuffer(raw, dtype=torch.uint8) if len(raw) else torch.empty(0, dtype=torch.uint8)


def _attempt(act: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(value=act())
    except (EverestError, OSError, RuntimeError) as error:
        return _Outcome(error=error)


def join_world(timeout: timedelta = COLLECTIVE_TIMEOUT) -> World:
    """Join the process group that the launcher's environment variables describe.

    The variables are RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. The back
    end is NCCL on GPUs and gloo otherwise. If all ranks are on this host, nothing listens beyond loopback.

    Args:
        timeout: how long a rank waits for another rank before it counts that rank as lost.

    Raises:
        UsageError: if a node has fewer GPUs than ranks, or two ranks were given the same GPU.
        RankLostError: if this rank could not reach the others in time.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = _device(local_rank, local_size)
    prepare_deepspeed(device)
    # The number of workers is the user's choice; torch repeats this warning on every rank and in every epoch.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    if local_size == size:
        stay_on_loopback()
    # DeepSpeed and fairscale create groups without a timeout, and torch's own default is up to half an hour.
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(dist.distributed_c10d, name, timeout)
    try:
        store = create_store(rank, size, local_size == size, timeout)
        if device.type == "cuda":
            claim_gpu(store, str(torch.cuda.get_device_properties(device).uuid), rank)
        dist.init_process_group(
            "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except (OSError, RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankLostError(
            f"rank {rank} of {size} could not join the others at {where}",
            given=" ".join(str(error).split())[:200],
            fix="check that every rank started, that LOCAL_WORLD_SIZE is the number of ranks on this host,"
            " that MASTER_ADDR is an address of rank 0's host which all hosts reach, and MASTER_PORT is free",
        ) from None
    control = dist.new_group(backend="gloo", timeout=timeout)
    return World(rank, size, local_rank, local_size, device, control, store)


@contextmanager
def explained_failures(world: World) -> Iterator[None]:
    """Turn errors of torch or the system (lost peer, full GPU, full disk) into errors that suggest a fix."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"rank {world.rank}: out of memory on {world.device}",
            given=" ".join(str(error).split())[:160],
            fix="lower batch.micro_batch_size, raise parallelism.zero_stage, or set recompute.mode=full",
        ) from None
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _LOST_PEER):
            raise
        raise _lost_peer(world, error) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunFolderError(
            f"{error.filename or 'the run folder'}: no space left",
            given=error.strerror,
            fix="free disk space; the same command resumes from the last checkpoint",
        ) from None


def _lost_peer(world: World, error: RuntimeError) -> RankLostError:
    named = ", ".join(f"rank {rank}" for rank in world.lost_ranks())
    return RankLostError(
        f"rank {world.rank} lost a peer" + (f": no answer from {named}" if named else ""),
        given=" ".join(str(error).split())[:160],
        fix="look for the cause in the lost rank's log, or in its .stacks file in the same folder if it hung;"
        " the same command resumes from the last checkpoint",
    )


def leave_world() -> None:
    """Destroy the process group, so that the interpreter exits without warnings."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(local_rank: int, local_size: int) -> torch.device:
    """Return this rank's device: the GPU with its local rank, the only visible GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    num_visible = torch.cuda.device_count()
    index = 0 if num_visible == 1 else local_rank
    if index >= num_visible:
        raise UsageError(
            f"{local_size} ranks were started on a node with {num_visible} GPUs",
            given=f"local rank {local_rank}",
            allowed=f"0..{num_visible - 1}",
            fix="lower --nproc or --ntasks-per-node, or set CUDA_VISIBLE_DEVICES='' to run on the CPU",
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def claim_gpu(store: dist.Store, uuid: str, rank: int) -> None:
    """Claim a GPU, identified by its UUID, for this rank.

    Ranks that each see only one GPU cannot otherwise notice that they share it.

    Raises:
        UsageError: if another rank has claimed it.
    """
    holder = store.compare_set(f"gpu/{uuid}", "", str(rank)).decode()
    if holder != str(rank):
        raise UsageError(
            f"ranks {holder} and {rank} were given the same GPU",
            given=uuid,
            allowed="one rank per GPU",
            fix="lower --nproc or --ntasks-per-node to the number of GPUs, or give each task its own GPU:"
            " --gpus-per-task=1",
        )


def _tell_deepspeed_index(index: int) -> None:
    """Set LOCAL_RANK to the index of this rank's GPU, because DeepSpeed uses it as the GPU index."""
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):  # DeepSpeed requires them to agree
        if name in os.environ:
            os.environ[name] = str(index)


def prepare_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed for `device`, and apply the settings that it reads on import or initialisation."""
    os.environ["DS_ACCELERATOR"] = device.type
    if device.index is not None:
        _tell_deepspeed_index(device.index)
    # DeepSpeed 0.19 uses names of collectives that torch 2.13 deprecates; users cannot act on the warning.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    silence()
    if device.type == "cpu":
        skip_shared_memory_collectives()
