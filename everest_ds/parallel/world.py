"""The ranks of a run: joining them, and the few messages that are not gradients."""

from __future__ import annotations

import contextlib
import errno
import os
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

T = TypeVar("T")

# What the back ends write when a connection to another rank breaks.
_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "gloo/transport",
    "NCCL",
    "Broken pipe",
)
# A rank that is silent for this long is taken for lost, unless the run says otherwise. Longer than the
# slowest honest step: the first one on a cold file system.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
# To say "here" after a failure, which the ranks that are left see within moments of each other. Less than
# what a launcher grants to those that did not fail first.
_ROLL_CALL_SECONDS = 5.0


@dataclass(frozen=True)
class World:
    """This process among its peers.

    Attributes:
        rank: 0 .. size - 1.
        size: number of processes.
        local_rank: its number among the ranks of its node.
        local_size: ranks of its node.
        device: where this rank computes.
        control: a gloo group for host-side messages, so that they never wait for the accelerator.
        store: the keys and values by which the ranks found each other, kept by rank 0 or by torchrun. It
            answers when groups have failed.
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
        """True on rank 0, which writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.control)

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on one."""
        return bool(self.greatest(int(flag)))

    def greatest(self, value: int) -> int:
        """The greatest of all ranks' values, on every rank."""
        answer = torch.tensor(value)
        dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=self.control)
        return int(answer)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Element-wise mean over the ranks, on the host, summed in rank order."""
        gathered = [torch.zeros_like(value, device="cpu") for _ in range(self.size)]
        dist.all_gather(gathered, value.detach().cpu(), group=self.control)
        return torch.stack(gathered).mean(dim=0)

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, in rank order, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def lost_ranks(self) -> list[int]:
        """Which ranks do not answer any more. Call after a failure, on every rank that sees it."""
        missing = [rank for rank in range(self.size) if rank != self.rank]
        deadline = time.monotonic() + _ROLL_CALL_SECONDS
        try:
            self.store.set(f"here/{self.rank}", "")
        except RuntimeError:
            return [0]
        with contextlib.suppress(RuntimeError):  # rank 0 may be done, and end, before this one
            while missing and time.monotonic() < deadline:
                time.sleep(0.1)
                missing = [rank for rank in missing if not self.store.check([f"here/{rank}"])]
        return missing

    def share(self, make: Callable[[], T]) -> T:
        """Rank 0's `make()`, on every rank; its error too, so that nobody waits for a rank that failed."""
        outcome = _attempt(make) if self.is_main else _Outcome()
        box = [outcome]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0].result()

    def together(self, act: Callable[[], T]) -> T:
        """Run `act` on every rank; if it fails on one, all raise that rank's error.

        Costs one small message between hosts, so it may stand in the training step.
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


def _attempt(act: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(value=act())
    except (EverestError, OSError, RuntimeError) as error:
        return _Outcome(error=error)


def join_world(timeout: timedelta = COLLECTIVE_TIMEOUT) -> World:
    """Join the process group named by RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT.

    Uses NCCL on GPUs and gloo otherwise.

    Args:
        timeout: how long a rank waits for another before it takes it for lost.

    Raises:
        UsageError: if a node has fewer GPUs than ranks, or two ranks are given the same one.
        RankLostError: if the others do not come.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = _device(local_rank, local_size)
    prepare_deepspeed(device)
    _default_timeouts(timeout)
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=timeout))
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
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankLostError(
            f"rank {rank} of {size} could not join the others at {where}",
            given=" ".join(str(error).split())[:200],
            fix="check that every rank started, and that MASTER_ADDR and MASTER_PORT are reachable",
        ) from None
    control = dist.new_group(backend="gloo", timeout=timeout)
    return World(rank, size, local_rank, local_size, device, control, store)


@contextmanager
def explained_failures(world: World) -> Iterator[None]:
    """Turn what torch raises for a lost peer or a full device into errors that say what to do."""
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
            fix="free disk space; the same command goes on from the last checkpoint",
        ) from None


def _lost_peer(world: World, error: RuntimeError) -> RankLostError:
    named = ", ".join(f"rank {rank}" for rank in world.lost_ranks())
    return RankLostError(
        f"rank {world.rank} lost a peer" + (f": no answer from {named}" if named else ""),
        given=" ".join(str(error).split())[:160],
        fix="see why in its log, or in its .stacks file there if it hung;"
        " the same command goes on from the last checkpoint",
    )


def leave_world() -> None:
    """Free the process group, so that the interpreter ends quietly."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(local_rank: int, local_size: int) -> torch.device:
    """Return this rank's device: the GPU of its number, or the only one that its launcher lets it see."""
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
    """Take a GPU for this rank, by its UUID: with one visible to each, all of them may see the same one.

    Raises:
        UsageError: another rank has taken it.
    """
    holder = store.compare_set(f"gpu/{uuid}", "", str(rank)).decode()
    if holder != str(rank):
        raise UsageError(
            f"ranks {holder} and {rank} were given the same GPU",
            given=uuid,
            allowed="one rank per GPU",
            fix="lower --nproc or --ntasks-per-node to the number of GPUs, or give each task its own:"
            " --gpus-per-task=1",
        )


def _tell_deepspeed_index(index: int) -> None:
    """Give DeepSpeed the number of this rank's GPU: it takes LOCAL_RANK for that, which counts all ranks."""
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):  # DeepSpeed wants them to agree
        if name in os.environ:
            os.environ[name] = str(index)


def _default_timeouts(timeout: timedelta) -> None:
    """Of the groups that DeepSpeed and fairscale make, which take no timeout: half an hour otherwise."""
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(dist.distributed_c10d, name, timeout)


def prepare_deepspeed(device: torch.device) -> None:
    """Settings that DeepSpeed reads while it is imported or initialised."""
    os.environ["DS_ACCELERATOR"] = device.type
    if device.index is not None:
        _tell_deepspeed_index(device.index)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 renames: nothing a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed

    deepspeed.utils.logging.logger.setLevel("ERROR")
    if device.type == "cpu":
        # Its shared-memory collectives compile for 35 s at first use and change no result.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
