"""Tests of the command line as a user types it: in this process for speed, or as a program if needed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from everest_ds.cli.app import COMMANDS, CommandGroup, LazyGroup, main
from everest_ds.config import dump_experiment
from tests.checkpoints.made import make_checkpoint
from tests.training.runs import experiment, losses

EVEREST = [sys.executable, "-m", "everest_ds"]


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run `everest-ds *arguments` in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["everest-ds", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def wait_for_rows(run: subprocess.Popen[str], metrics: Path, count: int) -> None:
    """Wait until a live run has reported `count` steps."""
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") >= count):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def write_config(data: Path, folder: Path, task: str = "pretrain", **sections: dict[str, object]) -> Path:
    """Write the config of a tiny run that trains on `data`; return its path."""
    file = folder / f"{task}.yaml"
    file.write_text(dump_experiment(experiment(data, folder / task, task, **sections)))
    return file


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["pretrain", "demo_pretain"], "did you mean demo_pretrain"),
        (["pretrain", "demo_finetune"], "is for task finetune"),
        (
            ["pretrain", "demo_pretrain", "--dry-run", "model.bakbone=vit_base"],
            "did you mean model.backbone?",
        ),
        (["pretrain", "demo_pretrain", "--dry-run", "model.backbone"], "allowed: key.path=value"),
        (
            ["pretrain", "demo_pretrain", "--dry-run", "model.image_size=60"],
            "not a multiple of patch_size=8",
        ),
        (
            ["pretrain", "demo_pretrain", "--dry-run", "--nproc", "3", "batch.global_batch_size=64"],
            "3 data-parallel ranks",
        ),
        (
            ["pretrain", "demo_pretrain", "--dry-run", "--on", "4xH100", "--nproc", "2"],
            "error: the GPU's name matches several products; given: 'H100'; allowed: H100 SXM, H100 PCIe",
        ),
        (
            ["pretrain", "demo_pretrain", "--dry-run", "--on", "4xH100-SXM", "--nproc", "2"],
            "--on and --nproc name different numbers of GPUs: 4 and 2",
        ),
        (["pretrain", "demo_pretrain", "--on", "4xH100"], "--on was given without --dry-run"),
        (["pretrain", "ucf101", "--dry-run"], "did you mean ucf101_finetune_vit_base or"),
        (["pretrain", "xyzzy", "--dry-run"], "such as demo_finetune, demo_pretrain, demo_scratch; fix:"),
        (["data", "check", "no-such-list.txt"], "no-such-list.txt"),
    ],
)
def test_a_mistake_gets_one_line_and_a_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    code = run_main(monkeypatch, *arguments)
    error = capsys.readouterr().err
    assert code == (3 if arguments[0] == "data" else 2)
    assert says in error and error.startswith("error: ") and error.count("\n") == 1


def test_results_replace_results_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], motion_data: Path, tmp_path: Path
) -> None:
    """Neither an input nor any other file that is no result is overwritten; nothing is done before."""
    monkeypatch.chdir(tmp_path)
    for name in ("val.txt", "classes.txt"):
        (tmp_path / name).write_text((motion_data / name).read_text())
    (tmp_path / "link.json").symlink_to("val.txt")
    root = ["--root", str(motion_data)]
    for words, says in (
        (
            ["data", "check", "val.txt", *root, "--json", "link.json"],
            "link.json: an input would be overwritten",
        ),
        (
            ["data", "check", "val.txt", *root, "--json", "./val.txt"],
            "val.txt: an input would be overwritten",
        ),
        (["recipes", "--json", "classes.txt"], "classes.txt: this file exists and is not JSON"),
    ):
        assert run_main(monkeypatch, *words) == 2
        output = capsys.readouterr()
        assert says in output.err and not output.out
    assert (tmp_path / "val.txt").read_text() == (motion_data / "val.txt").read_text()
    for _ in range(2):  # the second time, earlier results are replaced
        assert run_main(monkeypatch, "recipes", "--json", "recipes.json") == 0


def test_a_run_folder_that_is_no_run_or_of_another_task_gets_its_own_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], motion_data: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    for name, task in (("pre-a", "pretrain"), ("fine-b", "finetune")):
        (runs / name).mkdir(parents=True)
        config = experiment(motion_data, runs / name, task)
        (runs / name / "config.yaml").write_text(dump_experiment(config))
    (runs / "empty").mkdir()

    def refusal(*arguments: str) -> str:
        assert run_main(monkeypatch, *arguments) == 2
        return capsys.readouterr().err

    message = refusal("evaluate", f"{runs}/pre-a")
    assert "is for task pretrain" in message
    assert f"fix: fine-tune it first: `everest-ds finetune RECIPE model.init_from={runs}/pre-a`" in message
    assert f"fix: `everest-ds finetune {runs}/fine-b`" in refusal("pretrain", f"{runs}/fine-b")
    assert "empty: this folder is not a run, because" in refusal("evaluate", f"{runs}/empty")
    message = refusal("evaluate", f"{runs}/fine-c")
    assert f"did you mean {runs}/fine-b" in message and "vit_" not in message


@pytest.mark.parametrize(
    "line, says",
    [
        ("a.mp4", "list.txt:1: no label"),
        ("a.mp4 9", "0..5"),
    ],
)
def test_a_wrong_manifest_is_refused_before_any_rank_starts(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    motion_data: Path,
    tmp_path: Path,
    line: str,
    says: str,
) -> None:
    (tmp_path / "list.txt").write_text(line + "\n")
    config = write_config(motion_data, tmp_path, "finetune")
    code = run_main(
        monkeypatch, "finetune", str(config), f"data.train={tmp_path / 'list.txt'}", "--nproc", "2"
    )
    assert code == 3 and says in capsys.readouterr().err


def test_dry_run_prints_the_plan_and_writes_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], motion_data: Path, tmp_path: Path
) -> None:
    config = write_config(motion_data, tmp_path)
    code = run_main(
        monkeypatch, "pretrain", str(config), "--dry-run", "--nproc", "2", "--json", str(tmp_path / "p.json")
    )
    printed = capsys.readouterr().out
    plan = json.loads((tmp_path / "p.json").read_text())["plan"]
    assert code == 0
    assert plan["steps"] == "9 = 3 per epoch x 3 epochs"
    assert plan["batch"].startswith("8 clips = 4 per rank and micro-batch x 1 accumulated x 2")
    assert "backbone: vit_tiny" in printed and plan["forward_gmacs_per_clip"] > 0
    assert not (tmp_path / "pretrain").exists()


def test_a_dry_run_says_where_max_steps_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, motion_data: Path, tmp_path: Path
) -> None:
    config, file = write_config(motion_data, tmp_path), tmp_path / "p.json"

    def facts(*overrides: str) -> tuple[str, str]:
        assert (
            run_main(monkeypatch, "pretrain", str(config), *overrides, "--dry-run", "--json", str(file)) == 0
        )
        written = json.loads(file.read_text())
        return written["plan"]["steps"], written["predicted"]["training"]

    steps, training = facts("run.max_steps=2")
    assert steps == "9 = 3 per epoch x 3 epochs; this run ends after 2 (run.max_steps)"
    assert training.endswith(" in 2 steps (run.max_steps), without validation")
    assert facts("run.max_steps=9") == facts()


def test_a_deepspeed_file_with_its_own_batch_size_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], motion_data: Path, tmp_path: Path
) -> None:
    own = {"train_micro_batch_size_per_gpu": 3, "zero_optimization": {"stage": 2}}
    (tmp_path / "own.json").write_text(json.dumps(own))
    config = write_config(motion_data, tmp_path, parallelism={"ds_config": str(tmp_path / "own.json")})
    assert run_main(monkeypatch, "pretrain", str(config), "--dry-run") == 2
    assert "`train_micro_batch_size_per_gpu` contradicts the run config" in capsys.readouterr().err


def test_synthesised_videos_can_be_checked_and_a_broken_one_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    sizes = ["--train", "6", "--val", "1", "--test", "1", "--frames", "8", "--size", "32", "--workers", "1"]
    assert run_main(monkeypatch, "data", "synth", str(folder), *sizes) == 0
    check = ["data", "check", str(folder / "train.txt"), "--workers", "1", "--min-frames", "8"]
    assert run_main(monkeypatch, *check) == 0
    (folder / "train" / "00003.mp4").write_bytes(b"")
    assert run_main(monkeypatch, *check, "--json", str(tmp_path / "check.json")) == 3
    (problem,) = json.loads((tmp_path / "check.json").read_text())["problems"]
    assert problem["video"].endswith("00003.mp4")
    capsys.readouterr()
    assert run_main(monkeypatch, *check[:-1], "9", "--json", str(tmp_path / "check.json")) == 3
    found = json.loads((tmp_path / "check.json").read_text())
    assert (len(found["problems"]), len(found["too_short"]), found["known"]) == (1, 5, 6)
    printed = capsys.readouterr().out
    assert "1 of 6 videos are broken" in printed and "5 of 6 videos have fewer than 9 frames" in printed
    assert "6 of 6 results were already in" in printed


def test_help_and_import_are_light() -> None:
    heavy = {"torch", "deepspeed", "numpy", "av", "decord", "matplotlib", "pydantic", "tensorboard"}
    script = "import sys, everest_ds.cli.app; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not heavy & set(loaded.stdout.split())


def test_the_help_of_no_command_loads_what_only_its_work_needs() -> None:
    heavy = {"torch", "deepspeed", "av", "decord", "matplotlib", "tensorboard"}
    targets = [row for row in COMMANDS.values() if isinstance(row, str)]
    for group in COMMANDS.values():
        targets += group.commands.values() if isinstance(group, CommandGroup) else ()
    modules = {f"everest_ds.cli.{target.partition(':')[0]}" for target in targets}
    script = f"import sys, {', '.join(sorted(modules))}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert modules <= set(loaded.stdout.split()) and not heavy & set(loaded.stdout.split())


def test_the_list_of_commands_shows_the_docstrings_that_their_own_help_shows() -> None:
    checked = []
    groups = [row for row in COMMANDS.values() if isinstance(row, CommandGroup)]
    for group in [LazyGroup(), *(LazyGroup(row.commands) for row in groups)]:
        for name, listed in group.listing().items():
            assert listed.help == group.commands[name].help, name
            assert listed.hidden == group.commands[name].hidden, name
            checked.append(name)
    assert len(checked) == 36


def test_ctrl_c_saves_and_the_same_command_goes_on(motion_data: Path, tmp_path: Path) -> None:
    config = write_config(motion_data, tmp_path, schedule={"epochs": 20, "warmup_epochs": 0})
    command = [*EVEREST, "pretrain", str(config), "--nproc", "2"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = tmp_path / "pretrain" / "metrics.jsonl"
    wait_for_rows(first, metrics, 2)
    os.killpg(first.pid, signal.SIGINT)  # a terminal signals the whole process group
    _, said = first.communicate(timeout=120)
    assert first.returncode == 75, said
    assert "stopped after step" in said and "run the same command again" in said and "Traceback" not in said
    done = max(losses(tmp_path / "pretrain"))
    assert (tmp_path / "pretrain" / "checkpoints" / f"step-{done:08d}").is_dir()
    second = subprocess.run([*command, "run.log_every_steps=5"], capture_output=True, text=True, timeout=240)
    assert second.returncode == 0, second.stderr
    assert max(losses(tmp_path / "pretrain")) == 60


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_without_a_traceback(motion_data: Path, tmp_path: Path) -> None:
    config = write_config(motion_data, tmp_path, schedule={"epochs": 400, "warmup_epochs": 0})
    command = [*EVEREST, "pretrain", str(config), "--nproc", "2"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "pretrain" / "metrics.jsonl"
    wait_for_rows(run, metrics, 2)
    ranks = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 6, said
    assert "error: rank 0 lost a peer" in said and "rank 1" in said and "Traceback" not in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.slow
def test_a_stopped_rank_is_lost_after_the_timeout_and_named(motion_data: Path, tmp_path: Path) -> None:
    config = write_config(
        motion_data,
        tmp_path,
        schedule={"epochs": 400, "warmup_epochs": 0},
        run={"hang_timeout_s": 20, "save_every_steps": 1},
    )
    command = [*EVEREST, "pretrain", str(config), "--nproc", "2"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for_rows(run, tmp_path / "pretrain" / "metrics.jsonl", 2)
    ranks = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(ranks[1]), signal.SIGSTOP)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 6, said
    assert "error: rank 0 lost a peer: no answer from rank 1" in said and "Traceback" not in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "everest_ds", "--"],
        ["-m", "deepspeed.launcher.launch", "--world_info=eyJsb2NhbGhvc3QiOiBbMCwgMV19", "--module",
         "--no_local_rank", "everest_ds"],
    ],
    ids=["torchrun", "deepspeed"],
)  # fmt: skip
def test_the_same_command_joins_a_world_started_by(
    launcher: list[str], motion_data: Path, tmp_path: Path
) -> None:
    config = write_config(motion_data, tmp_path, schedule={"epochs": 1, "warmup_epochs": 0})
    result = subprocess.run(
        [sys.executable, *launcher, "pretrain", str(config)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )
    assert result.returncode == 0, result.stderr
    assert max(losses(tmp_path / "pretrain")) == 3
    manifest = next((tmp_path / "pretrain" / "checkpoints").glob("step-*/manifest.json"))
    assert json.loads(manifest.read_text())["facts"]["world"]["ranks"] == 2


@pytest.mark.slow
def test_the_same_command_joins_a_world_started_by_mpirun(motion_data: Path, tmp_path: Path) -> None:
    mpiexec = Path(sys.executable).parent / "mpiexec"
    if not mpiexec.is_file():
        pytest.skip("no mpiexec beside this Python: pip install mpich")
    config = write_config(motion_data, tmp_path, schedule={"epochs": 1, "warmup_epochs": 0})
    result = subprocess.run(
        [str(mpiexec), "-n", "2", *EVEREST, "pretrain", str(config)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert max(losses(tmp_path / "pretrain")) == 3


def test_checkpoints_are_inspected_verified_and_exported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_checkpoint(tmp_path / "checkpoints", 3)
    newest = make_checkpoint(tmp_path / "checkpoints", 6)
    assert run_main(monkeypatch, "checkpoint", "verify", str(tmp_path)) == 0
    assert (
        run_main(monkeypatch, "checkpoint", "inspect", str(tmp_path), "--json", str(tmp_path / "i.json")) == 0
    )
    assert json.loads((tmp_path / "i.json").read_text())["facts"]["step"] == 6
    export = ["checkpoint", "export", str(tmp_path), str(tmp_path / "w.safetensors"), "--dtype", "bf16"]
    assert run_main(monkeypatch, *export) == 0
    assert "w.safetensors: " in capsys.readouterr().out
    (newest / "b.safetensors").unlink()
    assert run_main(monkeypatch, "checkpoint", "verify", str(tmp_path)) == 4
    assert "b.safetensors is missing" in capsys.readouterr().out
    assert run_main(monkeypatch, "checkpoint", "inspect", str(newest)) == 4
    assert capsys.readouterr().err.count("\n") == 1


def test_recipes_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_main(monkeypatch, "recipes", "--json", str(tmp_path / "r.json")) == 0
    rows = yaml.safe_load((tmp_path / "r.json").read_text())
    assert "demo_pretrain" in {row["recipe"] for row in rows}
    assert "demo_pretrain" in capsys.readouterr().out


def test_a_dry_run_says_what_shared_memory_the_loaders_need(
    monkeypatch: pytest.MonkeyPatch, motion_data: Path, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(dump_experiment(experiment(motion_data, tmp_path / "run")))

    def shared_memory(*overrides: str) -> str:
        command = ("pretrain", str(config), *overrides, "--dry-run", "--nproc", "2")
        assert run_main(monkeypatch, *command, "--json", str(tmp_path / "plan.json")) == 0
        text: str = json.loads((tmp_path / "plan.json").read_text())["plan"]["shared_memory"]
        return text

    assert shared_memory().startswith("384.00 KiB of /dev/shm on a node with 2 ranks")
    assert "WARNING" not in shared_memory()
    vast = shared_memory("data.num_workers=100000000")
    assert "WARNING: this machine has " in vast and "loader workers need" in vast and "--shm-size=" in vast
    assert shared_memory("data.num_workers=0").startswith("none")
