"""Tests of loader faults: every failure is an error, and no batch is skipped, repeated or replaced."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from everest_ds.config import BATCHES_AHEAD, DataConfig
from everest_ds.data import loader
from everest_ds.data.clip_source import GuardedSource, LoadedItem, NewClip, new_clip
from everest_ds.data.clips import EvaluationClips
from everest_ds.data.loader import load
from everest_ds.data.reading import SampleReader
from everest_ds.data.video_list import Sample
from everest_ds.errors import DataError
from tests.training.runs import experiment

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

KINDS = (RuntimeError, ValueError, StopIteration, OSError, EOFError, MemoryError, ConnectionResetError)


class AwkwardError(Exception):
    """An exception that cannot be rebuilt from its text and cannot be pickled."""

    def __init__(self, lock: object, number: int) -> None:
        super().__init__(f"awkward {number}")
        self.lock = lock


class Numbers:
    """A source whose items are integers, one clip per item; `act` is called before an item is read."""

    def __init__(self, act: Callable[[int], object] = lambda item: None, size: int = 3) -> None:
        self.reader = SampleReader([Sample(Path(f"{i}.mp4"), None) for i in range(99)], DataConfig())
        self.act, self.size = act, size
        self.new_clip: NewClip = new_clip

    def __getitem__(self, item: int) -> LoadedItem:
        self.reader.watch(item)
        self.act(item)
        self.reader.watch(None)
        return LoadedItem([torch.full((self.size,), item)], [])

    def name_of(self, item: int) -> str:
        return self.reader.samples[item].name


def delivered(
    source: Numbers, batches: list[list[int]], workers: int, pin_memory: bool = False, timeout_s: int = 60
) -> tuple[list[list[int]], str]:
    """Return the batches that the loader delivered and the text of the error that ended them, or ""."""
    data = DataConfig(num_workers=workers, read_timeout_s=timeout_s)
    came: list[list[int]] = []
    try:
        for clips in load(source, iter(batches), data, pin_memory, lambda failure: None):
            came.append(clips[:, 0].tolist())
    except DataError as error:
        return came, str(error)
    return came, ""


@settings(max_examples=15)
@given(
    workers=st.sampled_from([0, 1, 2, 4]),
    num_batches=st.integers(1, 11),
    size=st.integers(1, 3),
    kind=st.sampled_from([*KINDS, AwkwardError]),
    place=st.randoms(use_true_random=False),
)
def test_any_exception_of_any_item_is_named_in_its_place(
    workers: int, num_batches: int, size: int, kind: type[Exception], place: Any
) -> None:
    items = place.sample(range(99), num_batches * size)
    batches = [items[i : i + size] for i in range(0, len(items), size)]
    bad = place.choice(items)

    def act(item: int) -> None:
        if item == bad:
            raise AwkwardError(threading.Lock(), 7) if kind is AwkwardError else kind("awkward 7")

    came, error = delivered(Numbers(act), batches, workers)
    assert came == batches[: items.index(bad) // size]
    assert error.startswith(f"{bad}.mp4: a loader worker failed; given: {kind.__name__}: awkward 7")
    assert "\n" not in error
    assert delivered(Numbers(), batches, workers) == (batches, "")


def test_clips_that_make_no_batch_are_named() -> None:
    class Growing(Numbers):
        def __getitem__(self, item: int) -> LoadedItem:
            return LoadedItem([torch.zeros(item)], [])

    came, error = delivered(Growing(), [[4, 4], [5, 6], [7, 7]], workers=2)
    assert len(came) == 1
    assert "could not join its clips into a batch; given: RuntimeError: stack expects" in error


@pytest.fixture
def pins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake an accelerator, so that torch's loader starts its pinning thread; pinning itself is real."""
    gc.collect()  # a worker that inherits an earlier test's loader would try to end that loader's workers
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)


def test_what_cannot_be_pinned_is_an_error(pins: None) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine on which pinning fails")
    for workers in (0, 2):
        came, error = delivered(Numbers(), [[1], [2], [3]], workers, pin_memory=True)
        assert came == []
        assert "a batch could not be handed over by the loader's workers; given: RuntimeError" in error
        assert "accelerator" in error


def test_one_batch_that_cannot_be_pinned_is_not_skipped(pins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def pin(tensor: Tensor) -> Tensor:
        if tensor.flatten()[0] == 3:
            raise RuntimeError("CUDA error: out of memory")
        return tensor.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    came, error = delivered(Numbers(), [[1], [2], [3], [4]], workers=2, pin_memory=True)
    assert came == [[1], [2]] and "given: RuntimeError: CUDA error: out of memory" in error


class Explosive(LoadedItem):
    """A result that cannot be unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _explode, ()


def _explode() -> None:
    raise RuntimeError("received 0 items of ancdata")


@pytest.mark.parametrize("pin_memory", [False, True])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_batch_that_cannot_be_received_is_an_error(
    pins: None, monkeypatch: pytest.MonkeyPatch, pin_memory: bool
) -> None:
    """An error is raised though torch's loader would wait for ever once its pinning thread has ended."""
    joined = GuardedSource.joined
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    monkeypatch.setattr(loader, "_POLL_S", 0.3)
    monkeypatch.setattr(loader, "_DEATH_S", 0.1)
    monkeypatch.setattr(
        GuardedSource,
        "joined",
        lambda *args: Explosive(*joined(*args)) if args[1][0].clips[0][0] == 2 else joined(*args),
    )
    came, error = delivered(Numbers(), [[1], [2], [3]], workers=1, pin_memory=pin_memory)
    assert came == [[1]]
    assert ("the thread that pins batches ended" if pin_memory else "received 0 items of ancdata") in error


def test_a_batch_that_cannot_be_sent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error is raised though the queue drops a batch it cannot pickle and the worker keeps running."""
    monkeypatch.setattr(loader, "_POLL_S", 0.4)

    class Unsendable(Numbers):
        def __getitem__(self, item: int) -> LoadedItem:
            failures: list[Any] = [threading.Lock()] if item == 2 else []
            return super().__getitem__(item)._replace(failures=failures)

    came, error = delivered(Unsendable(), [[1], [2], [3]], workers=1, timeout_s=1)
    assert came in ([], [[1]])  # a thread of the worker may still be sending the first
    assert "a batch was lost between a loader worker and its rank; given: no batch came for" in error


@pytest.mark.parametrize("code", [0, 3])
def test_a_worker_that_ends_is_no_end_of_the_data(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(loader, "_POLL_S", 0.3)
    idle = Numbers(lambda item: item == 5 and (idle.reader.watch(None), os._exit(code)))
    came, error = delivered(idle, [[i] for i in range(9)], workers=2)
    assert came == [[i] for i in range(len(came))] and len(came) <= 5
    assert f"workers are killed again and again; given: exit code {code}" in error
    assert not idle.reader.given_up


def test_a_worker_that_ends_while_the_others_start_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(DataLoader[Any]):
        def __iter__(self) -> Any:
            iterator = super().__iter__()
            time.sleep(0.3)
            multiprocessing.active_children()  # forgets the children that have ended
            return iterator

    monkeypatch.setattr(loader, "_POLL_S", 0.3)
    monkeypatch.setattr(loader, "DataLoader", Slow)
    idle = Numbers(lambda item: item == 1 and (idle.reader.watch(None), os._exit(3)))
    came, error = delivered(idle, [[i] for i in range(4)], workers=2)
    assert came == [[0]] and "workers are killed again and again; given: exit code 3" in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_worker_ignores_the_signals_that_stop_a_run(number: signal.Signals) -> None:
    source = Numbers(lambda item: os.kill(os.getpid(), number))
    batches = [[i, i + 1] for i in range(0, 12, 2)]
    assert delivered(source, batches, workers=2) == (batches, "")


@pytest.mark.parametrize("beside_another_loader", [False, True])
def test_a_killed_worker_is_replaced_and_no_video_is_blamed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, beside_another_loader: bool
) -> None:
    monkeypatch.setattr(loader, "_POLL_S", 0.3)
    handler = signal.getsignal(signal.SIGCHLD)
    if beside_another_loader:
        # Once per process, torch sets a handler that raises wherever the rank is when any worker dies.
        monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
        numbers: Any = [5]
        assert list(DataLoader(numbers, num_workers=1)) == [5]
        assert signal.getsignal(signal.SIGCHLD) != handler

    def die_once(item: int) -> None:
        mark = tmp_path / str(item)
        if item in (3, 7) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    source = Numbers(die_once)
    batches = [[i] for i in range(9)]
    try:
        assert delivered(source, batches, workers=2) == (batches, "") and not source.reader.given_up
        assert signal.getsignal(signal.SIGCHLD) == (signal.SIG_DFL if beside_another_loader else handler)
    finally:
        signal.signal(signal.SIGCHLD, handler)


# The rank leaves while a worker is blocked in a decoder and its loader is still referenced.
_LEAVE = """
import os, sys, time
from tests.data.test_loader_faults import Numbers
from everest_ds.config import DataConfig
from everest_ds.data.loader import load
stream = load(
    Numbers(lambda item: time.sleep(600 if item else 0)), iter([[0], [1], [2]]), DataConfig(num_workers=1),
    False, lambda failure: None,
)
next(stream)
{leave}
"""


def test_a_rank_takes_a_blocked_worker_with_it() -> None:
    """A worker that lived on would keep the rank's output open, and with it whoever reads the output."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _LEAVE.format(leave=leave)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        for leave in ("sys.exit(75)", "os._exit(75)")
    ]
    for rank in ranks:
        rank.communicate(timeout=120)
    assert [rank.returncode for rank in ranks] == [75, 75]


# The rank has closed its end of the queue, as the system does for a killed process before its workers end.
_HAND_OVER = """
import multiprocessing
from everest_ds.data.loader_errors import hush_lost_rank
class Unsendable:
    def __reduce__(self):
        raise OSError("too many open files")
def work(queue):
    hush_lost_rank()
    queue.put({batch})
    queue.close()
    queue.join_thread()
context = multiprocessing.get_context("fork")
queue = context.Queue()
queue._reader.close()
worker = context.Process(target=work, args=(queue,))
worker.start()
worker.join()
"""


@pytest.mark.parametrize(("batch", "says"), [("'batch'", ""), ("Unsendable()", "too many open files")])
def test_a_worker_is_silent_about_a_killed_rank_only(batch: str, says: str) -> None:
    code = [sys.executable, "-c", _HAND_OVER.format(batch=batch)]
    done = subprocess.run(code, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert ("Traceback" in done.stderr) == bool(says) and says in done.stderr and not done.returncode


def test_a_worker_that_closes_its_files_before_it_ends_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The kernel closes the files of a process, and with them a batch, before the exit code can be read."""
    monkeypatch.setattr(loader, "_POLL_S", 0.3)

    def close_then_end(item: int) -> None:
        if item == 2 and not (tmp_path / "closed").exists():
            (tmp_path / "closed").touch()
            slow.reader.watch(None)
            os.closerange(3, 256)
            time.sleep(1)
            os._exit(3)

    slow = Numbers(close_then_end)
    stream = load(slow, iter([[0], [1], [2]]), DataConfig(num_workers=1), False, lambda failure: None)
    next(stream)
    time.sleep(0.5)  # the worker has sent [1] and closes its files
    assert [clips[:, 0].tolist() for clips in stream] == [[1], [2]]


def test_sigbus_is_shared_memory_and_never_a_video(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_POLL_S", 0.3)

    def fill(item: int) -> None:
        if item == 5:
            os.kill(os.getpid(), signal.SIGBUS)

    source = Numbers(fill)
    came, error = delivered(source, [[i] for i in range(9)], workers=2)
    assert len(came) <= 5 and not source.reader.given_up
    assert error.startswith("/dev/shm is full") and "given: a worker ended with SIGBUS" in error
    assert "--shm-size" in error and "data.num_workers" in error


# A script for a mount namespace whose /dev/shm has 1 MiB. `touch` does the same as torch before 2.13: it maps
# a file that is larger than the file system, and the first page that does not fit ends the process.
_SMALL = """
import mmap, os, sys, tempfile
from tests.data.test_loader_faults import Numbers, delivered
from everest_ds.data import loader
loader._POLL_S = 0.3

def touch(item):
    if item == 5:
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            os.ftruncate(file.fileno(), 2**22)
            mmap.mmap(file.fileno(), 2**22).write(bytes(2**22))

touches = sys.argv[1] == "touch"
source = Numbers(touch) if touches else Numbers(size=2**17)
came, error = delivered(source, [[i] for i in range(9)], workers=2)
assert came == [[i] for i in range(len(came))] and len(came) < 9
assert not source.reader.given_up
print(error)
"""


@pytest.mark.parametrize("how", ["touch", "share"])
def test_a_full_dev_shm_is_named(how: str) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("needs the right to make mount namespaces (root)")
    mounted = 'mount -t tmpfs -o size=1m small /dev/shm && exec "$0" "$@"'
    command = ["unshare", "-m", "sh", "-c", mounted, sys.executable, "-c", _SMALL, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "/dev/shm is full, and the loader's workers deliver their batches through it"
    )
    assert "1.00 MiB in all; fix: enlarge it" in done.stdout


def test_a_stream_that_ends_early_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error is raised if torch's loader ends before it has delivered every batch."""
    deliver = loader._Crew.deliver

    def forgetful(crew: loader._Crew, *args: Any) -> Iterator[Any]:
        yield from list(deliver(crew, *args))[:-2]

    monkeypatch.setattr(loader._Crew, "deliver", forgetful)
    came, error = delivered(Numbers(), [[i] for i in range(5)], workers=2)
    assert came == [[0], [1], [2]]
    assert "ended before the last batch; given: 2 batches were not delivered" in error


def test_each_worker_reads_two_batches_ahead_at_most() -> None:
    taken: list[int] = []

    def batches() -> Iterator[list[int]]:
        for item in range(30):
            taken.append(item)
            yield [item]

    stream = load(Numbers(), batches(), DataConfig(num_workers=3), False, lambda failure: None)
    next(stream)
    assert len(taken) == 1 + 3 * BATCHES_AHEAD == 7
    stream.close()  # type: ignore[attr-defined]


def test_evaluation_that_lacks_a_view_names_its_video(motion_data: Path, tmp_path: Path) -> None:
    samples = [Sample(Path(f"{i}.mp4"), 0) for i in range(3)]
    clips = EvaluationClips(samples, experiment(motion_data, tmp_path), segments=2, crops=1)
    clips.check_complete(range(6), [])
    clips.check_complete([0, 1, 4, 5], [1])
    with pytest.raises(DataError, match=r"not evaluated.*given: 1 of 3 videos, the first 1\.mp4"):
        clips.check_complete([0, 1, 2, 4, 5], [])
