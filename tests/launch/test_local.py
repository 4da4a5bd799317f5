"""Tests of the local launcher: ranks start and end together, and the first failure gives the exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from everest_ds.errors import ExitCode, UsageError
from everest_ds.launch import local
from everest_ds.launch.local import available_cores, launch_local

PYTHON = (sys.executable, "-c")
PRELUDE = "import json, os, signal, sys, time; rank = int(os.environ['RANK'])\n"


def _launch(num_ranks: int, script: str, log_dir: Path | None = None) -> int:
    return launch_local(num_ranks, [PRELUDE + script], log_dir=log_dir, command=PYTHON)


def _wait_for(path: Path, seconds: float = 20) -> str:
    """Wait until the file has text, and return that text."""
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)
    return path.read_text()


def _alive(pid: int) -> bool:
    """Return whether the process is running; a zombie counts as dead, because its parent may be gone."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_every_rank_gets_all_variables_of_its_place(tmp_path: Path) -> None:
    script = f"open(f'{tmp_path}/{{rank}}.json', 'w').write(json.dumps(dict(os.environ)))"
    assert _launch(3, script) == ExitCode.OK
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [(env["RANK"], env["LOCAL_RANK"]) for env in seen] == [("0", "0"), ("1", "1"), ("2", "2")]
    assert {(env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"], env["MASTER_ADDR"]) for env in seen} == {
        ("3", "3", "127.0.0.1")
    }
    assert len({env["MASTER_PORT"] for env in seen}) == 1


def test_the_cores_are_shared_among_the_ranks_unless_the_user_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"open('{tmp_path}/threads', 'w').write(os.environ['OMP_NUM_THREADS'])"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    _launch(1, script)
    assert (tmp_path / "threads").read_text() == str(available_cores())
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    _launch(1, script)
    assert (tmp_path / "threads").read_text() == "7"


def test_only_rank_0_speaks_on_the_console_while_all_goes_well(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _launch(2, "print(f'I am {rank}'); print('err', rank, file=sys.stderr)", tmp_path) == ExitCode.OK
    assert capfd.readouterr() == ("I am 0\n", "err 0\n")
    assert sorted((tmp_path / "rank-1.out").read_text().splitlines()) == ["I am 1", "err 1"]


def test_the_first_failure_gives_the_code_and_shows_its_last_lines(capfd: pytest.CaptureFixture[str]) -> None:
    script = "rank == 1 and [print('line', n) for n in range(30)]; sys.exit(3 if rank == 1 else 0)"
    assert _launch(2, script) == 3
    shown = [line for line in capfd.readouterr().err.splitlines() if line.startswith("[rank 1]")]
    assert shown == [f"[rank 1] line {number}" for number in range(10, 30)]


def test_output_of_an_earlier_run_is_kept_but_not_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rank-1.out").write_text("earlier\n")
    assert _launch(2, "rank == 1 and sys.exit('reason')", tmp_path) == 1
    assert (tmp_path / "rank-1.out").read_text() == "earlier\nreason\n"
    assert "earlier" not in capfd.readouterr().err


def test_a_rank_that_only_lost_its_peer_does_not_hide_the_cause() -> None:
    script = "time.sleep(0.5 * (1 - rank) + 0.3); sys.exit(6 if rank == 1 else 7)"
    assert _launch(2, script) == ExitCode.OUT_OF_MEMORY


def test_rank_0_has_time_to_say_its_own_reason(capfd: pytest.CaptureFixture[str]) -> None:
    assert _launch(2, "rank == 1 and sys.exit(8); time.sleep(0.5); print('rank 0 closes its logs')") == 8
    assert "rank 0 closes its logs" in capfd.readouterr().out


def test_a_hanging_rank_is_ended_even_if_it_ignores_sigterm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(local, "TERMINATE_SECONDS", 0.2)
    script = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"if rank == 0: open('{tmp_path}/pid', 'w').write(str(os.getpid())); time.sleep(60)\n"
        f"while not os.path.exists('{tmp_path}/pid'): time.sleep(0.01)\n"
        "sys.exit(4)"
    )
    assert _launch(2, script) == ExitCode.CHECKPOINT
    assert not _alive(int((tmp_path / "pid").read_text()))


def test_a_rank_ended_by_a_signal_is_named_with_the_signal(capfd: pytest.CaptureFixture[str]) -> None:
    assert _launch(2, "rank == 1 and os.kill(os.getpid(), signal.SIGKILL)") == ExitCode.RANK_LOST
    assert "rank 1 was ended by SIGKILL; fix: look for the out-of-memory killer" in capfd.readouterr().err


def test_ranks_that_stopped_as_asked_give_the_code_of_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.0)
    # Rank 0 may still be writing its report when rank 1 has stopped, and a stop must not cut that short.
    assert _launch(2, "time.sleep(1 - rank); sys.exit(75)") == ExitCode.STOPPED


def test_no_ranks_at_all_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="number of ranks"):
        _launch(0, "")


def _start_launcher(folder: Path, script: str) -> subprocess.Popen[bytes]:
    """Start a launcher in its own process group, and return once both of its ranks wrote their pids."""
    script = PRELUDE + script.replace("READY", f"open(f'{folder}/{{rank}}.pid', 'w').write(str(os.getpid()))")
    program = (
        "import sys; from everest_ds.launch.local import launch_local\n"
        f"sys.exit(launch_local(2, [{script!r}], log_dir=None, command=[sys.executable, '-c']))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    launcher = subprocess.Popen([sys.executable, "-c", program], env=environment, start_new_session=True)
    for rank in range(2):
        _wait_for(folder / f"{rank}.pid")
    return launcher


STOP_ON = "signal.signal(signal.{0}, lambda *_: (time.sleep(0.5), sys.exit(75)))\nREADY; time.sleep(60)"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_stop_signal_to_the_launcher_reaches_the_ranks(tmp_path: Path, name: str) -> None:
    launcher = _start_launcher(tmp_path, STOP_ON.format(name))
    launcher.send_signal(getattr(signal, name))
    assert launcher.wait(20) == ExitCode.STOPPED


def test_ctrl_c_lets_the_ranks_save_before_the_launcher_ends(tmp_path: Path) -> None:
    save = f"(time.sleep(0.5), open(f'{tmp_path}/{{rank}}.saved', 'w'), os._exit(75))"
    listen = f"[signal.signal(number, lambda *_: {save}) for number in (signal.SIGINT, signal.SIGTERM)]"
    launcher = _start_launcher(tmp_path, f"{listen}\nREADY; time.sleep(60)")
    os.killpg(launcher.pid, signal.SIGINT)  # a terminal sends SIGINT to the whole group as well
    assert launcher.wait(20) == ExitCode.STOPPED
    assert {file.name for file in tmp_path.glob("*.saved")} == {"0.saved", "1.saved"}


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_stop_before_the_ranks_listen_is_a_stop_too(tmp_path: Path, number: signal.Signals) -> None:
    launcher = _start_launcher(tmp_path, "READY; time.sleep(60)")
    launcher.send_signal(number)
    assert launcher.wait(20) == ExitCode.STOPPED


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the parent-death signal")
def test_no_rank_survives_a_killed_launcher(tmp_path: Path) -> None:
    launcher = _start_launcher(tmp_path, "READY; time.sleep(60)")
    pids = [int((tmp_path / f"{rank}.pid").read_text()) for rank in range(2)]
    launcher.kill()
    launcher.wait(20)
    deadline = time.monotonic() + 5
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(_alive, pids))
