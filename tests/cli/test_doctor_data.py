"""Tests of `everest-ds doctor --data`: it measures a data set, names the bottleneck, and prices remedies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from everest_ds.profiling import cold_reading, storage_rates
from everest_ds.profiling.storage_rates import DiskRate
from everest_ds.tuning import diagnosis
from tests.cli.test_cli import run_main
from tests.data.store.conftest import pack


def measure_briefly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the measurement, leave out packing, which starts processes, and keep the record in the test."""
    for module in (storage_rates, cold_reading):
        monkeypatch.setattr(module, "_READ_S", 0.1)
    monkeypatch.setattr(diagnosis, "FASTER_FORMS", {"reencode": diagnosis.FASTER_FORMS["reencode"]})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_doctor_names_the_bottleneck_and_the_dry_run_repeats_it(
    motion_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure_briefly(tmp_path, monkeypatch)
    manifest, file = str(motion_data / "train.txt"), tmp_path / "found.json"
    settings = ("data.num_workers=3", "data.decoder=pyav", "batch.micro_batch_size=2")
    words = ("demo_pretrain", *settings, "--data", manifest, "--on", "8xa100-80gb", "--cores", "96")
    assert run_main(monkeypatch, "doctor", *words, "--json", str(file)) == 0
    said, found = capsys.readouterr().out, json.loads(file.read_text())
    cost, supply, bottleneck = found["measured"]["cost"], found["supply"], found["bottleneck"]
    assert supply["cores"] == 12 and supply["workers"] == 3 and supply["ranks_per_node"] == 8
    each_ms = cost["decode_ms"] + cost["crop_ms"] + cost["collate_ms"]
    assert bottleneck["rates"]["decoding"] == pytest.approx(3e3 / each_ms)
    rates = bottleneck["rates"]
    loading = min((name for name in rates if name != "compute"), key=rates.get)
    # Workers that wait for the disk and decode in turn are slower than the disk and the cores alone.
    binds = "compute" if rates["compute"] <= bottleneck["loader_clips_per_s"] else loading
    assert bottleneck["loader_clips_per_s"] <= rates[loading]
    assert bottleneck["binds"] == binds and f"{binds} binds: " in said
    remedies = {remedy["name"]: remedy for remedy in found["remedies"]}
    assert remedies["workers"]["apply"] == "data.num_workers=12"
    assert remedies["reencode"]["apply"] == f"everest-ds data reencode {manifest} --out FOLDER"
    for heading in ("open and decode", "Resources of a rank", "Remedies", "data.repeats=4"):
        assert heading in said
    dry = ("pretrain", "demo_pretrain", *settings, f"data.train={manifest}", "--dry-run")
    assert run_main(monkeypatch, *dry, "--on", "8xa100-80gb") == 0
    assert "(measured)" in capsys.readouterr().out


def test_without_gpus_or_a_calibration_the_models_rate_is_unknown(
    motion_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure_briefly(tmp_path, monkeypatch)
    words = ("demo_pretrain", f"data.train={motion_data / 'train.txt'}")
    assert run_main(monkeypatch, "doctor", *words) == 0
    said = capsys.readouterr().out
    assert "is unknown" in said and "--on 8xa100-80gb" in said


def test_a_store_can_be_staged_or_cached_but_not_packed(
    motion_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_briefly(tmp_path, monkeypatch)
    pack(motion_data / "val.txt", tmp_path / "store")
    # A test cannot slow a disk down: the shards' disk is reported to be slower than this machine's own.
    rates = iter([DiskRate(1e6, cold=True), DiskRate(1e9, cold=True)])
    monkeypatch.setattr(diagnosis, "disk_rate", lambda files: next(rates))
    file = tmp_path / "found.json"
    words = ("demo_pretrain", "tokens.score=pixel", "--data", str(tmp_path / "store"), "--on", "8xa100-80gb")
    assert run_main(monkeypatch, "doctor", *words, "--json", str(file)) == 0
    found = json.loads(file.read_text())
    remedies = {remedy["name"]: remedy for remedy in found["remedies"]}
    assert found["bottleneck"]["binds"] == "disk"
    assert remedies["stage"]["apply"].startswith("data.stage=/")
    assert remedies["stage"]["gain"] > 10
    assert "cache" in remedies
    assert not {"pack", "reencode"} & remedies.keys()


@pytest.mark.parametrize(
    "words, says",
    [
        (["--on", "8xa100-80gb"], "add --data MANIFEST"),
        (["data.num_workers=2"], "add --data MANIFEST"),
        (["--data", "no/list.txt"], "no/list.txt"),
        (["--data", ".", "--on", "8xvoodoo2"], "voodoo2"),
        (["demo_pretrain", "data.train=null"], "data.train is not set"),
    ],
)
def test_a_mistake_is_named(
    words: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "doctor", *words) != 0
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "reported, name, known",
    [("NVIDIA H100 80GB HBM3", "4 x H100", True), ("NVIDIA Voodoo2", "4 x NVIDIA Voodoo2", False)],
)
def test_the_gpus_of_this_machine_are_those_to_be_supplied(
    reported: str, name: str, known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # has no calibration
    monkeypatch.setattr(diagnosis, "num_gpus", lambda: 4)
    monkeypatch.setattr(diagnosis, "device_name", lambda device: reported)
    found = diagnosis.ranks_here()
    assert found.count == found.per_node == 4 and found.name.startswith(name)
    assert (found.machine is not None) == known
