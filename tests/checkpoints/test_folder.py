"""Tests of checkpoint folders: atomic writes, named damage, and reading of any range of a parameter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from everest_ds.checkpoints.export import export_weights, load_weights
from everest_ds.checkpoints.folder import (
    find_checkpoint,
    list_checkpoints,
    prune,
    set_aside,
    start_saving,
    verify_checkpoint,
)
from everest_ds.checkpoints.reader import CheckpointReader
from everest_ds.checkpoints.sealed_manifest import STATES, Parameter, Piece, read_checkpoint_manifest
from everest_ds.errors import CheckpointError
from tests.checkpoints.made import SHAPES, facts, forge_manifest, make_checkpoint, states_of

FILES = ("a.safetensors", "b.safetensors", "manifest.json", "manifest.sha256")


def flip(file: Path, place: float) -> None:
    """Flip one bit of the byte at `place`, from 0 (first byte) to 1 (last byte)."""
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "removed": lambda file: file.unlink(),
    "emptied": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "flipped at the start": lambda file: flip(file, 0),
    "flipped in the middle": lambda file: flip(file, 0.5),
    "flipped at the end": lambda file: flip(file, 1),
    "made a folder": make_folder,
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_older_checkpoint_is_taken(tmp_path: Path, file: str, damage: str) -> None:
    older = make_checkpoint(tmp_path / "checkpoints", 3)
    newer = make_checkpoint(tmp_path / "checkpoints", 6)
    DAMAGES[damage](newer / file)
    with pytest.raises(CheckpointError, match="manifest" if "manifest" in file else file):
        verify_checkpoint(newer)
    assert find_checkpoint(tmp_path)[0] == older


def test_a_flipped_bit_anywhere_in_the_manifest_is_seen(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 3)
    whole = {name: (path / name).read_bytes() for name in ("manifest.json", "manifest.sha256")}
    for name, content in whole.items():
        for place in range(len(content)):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            (path / name).write_bytes(damaged)
            with pytest.raises(CheckpointError):
                read_checkpoint_manifest(path)
        (path / name).write_bytes(content)
    read_checkpoint_manifest(path)


@given(st.sampled_from(sorted(SHAPES)), st.sampled_from(STATES), st.data())
def test_any_range_reads_back_across_the_files(
    tmp_path_factory: pytest.TempPathFactory, name: str, state: str, data: st.DataObject
) -> None:
    path = make_checkpoint(tmp_path_factory.mktemp("made"), 1)
    values = states_of(name)[state].reshape(-1)
    start = data.draw(st.integers(0, len(values)))
    stop = data.draw(st.integers(start, len(values)))
    with CheckpointReader(path, verify_checkpoint(path)) as reader:
        assert torch.equal(reader.read(state, name, start, stop - start), values[start:stop])


@pytest.mark.parametrize("dtype, torch_dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_an_export_is_one_file_of_whole_tensors(tmp_path: Path, dtype: str, torch_dtype: torch.dtype) -> None:
    path = make_checkpoint(tmp_path / "checkpoints", 6)
    assert export_weights(tmp_path, tmp_path / "w.safetensors", dtype) == path  # type: ignore[arg-type]
    exported = load_file(tmp_path / "w.safetensors")
    for name, tensor in load_weights(path)[0].items():
        assert torch.equal(tensor, states_of(name)["weight"])
        assert torch.equal(exported[name], tensor.to(torch_dtype))


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda m: m["files"].update({"../../x": [0, "0"]}), "plain file name"),
        (lambda m: m["parameters"]["scale"]["pieces"].clear(), "0 of 1 elements"),
        (lambda m: m["parameters"]["encoder.bias"]["pieces"].pop(0), "element 0 is in no piece"),
        (lambda m: m["files"].pop("b.safetensors"), "which is not listed"),
        (lambda m: m["facts"].update(step="__import__('os')"), "facts.step"),
        (lambda m: m.update(format="everest-ds checkpoint 2"), "format"),
        (lambda m: m.update(code="1"), "code"),
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path: Path, change: Callable[[dict], object], says: str) -> None:
    path = make_checkpoint(tmp_path, 3)
    forge_manifest(path, change)
    with pytest.raises(CheckpointError, match=says):
        read_checkpoint_manifest(path)


def test_a_file_that_holds_less_than_the_manifest_says_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 3)
    wider = Parameter(shape=(16,), pieces=(Piece("a.safetensors", 0, 0, 16),))
    manifest = verify_checkpoint(path).model_copy(update={"parameters": {"encoder.bias": wider}})
    with CheckpointReader(path, manifest) as reader, pytest.raises(CheckpointError, match="a.safetensors"):
        reader.whole("weight", "encoder.bias")


def test_the_newest_and_every_nth_stay(tmp_path: Path) -> None:
    for step in range(1, 8):
        make_checkpoint(tmp_path, step)
    prune(tmp_path, keep=2, keep_every_steps=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{n:08d}" for n in (3, 6, 7)]
    prune(tmp_path, keep=1, keep_every_steps=None)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000007"]


def test_what_a_crash_left_is_removed_by_the_next_save(tmp_path: Path) -> None:
    (start_saving(tmp_path, 3) / "a.safetensors").write_bytes(b"half")
    (tmp_path / ".deleting-step-00000001").mkdir()
    saving = start_saving(tmp_path, 6)
    assert list(tmp_path.iterdir()) == [saving] and not list(saving.iterdir())
    assert list_checkpoints(tmp_path) == []


def test_a_checkpoint_that_was_moved_behind_a_link_is_pruned_and_its_files_stay(tmp_path: Path) -> None:
    folder, other_disk = tmp_path / "checkpoints", tmp_path / "other"
    other_disk.mkdir()
    moved = make_checkpoint(folder, 2).rename(other_disk / "step-00000002")
    (folder / "step-00000002").symlink_to(moved)
    assert verify_checkpoint(folder / "step-00000002").facts == facts(2)
    make_checkpoint(folder, 4)
    prune(folder, keep=1, keep_every_steps=None)
    (folder / ".deleting-step-00000001").symlink_to(moved)  # as an older version left it
    saving = start_saving(folder, 6)
    assert sorted(folder.iterdir()) == [saving, folder / "step-00000004"]
    assert verify_checkpoint(moved).facts == facts(2)


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 3)
    (path / "manifest.json").unlink()
    assert make_checkpoint(tmp_path, 3) == path
    assert verify_checkpoint(path).facts == facts(3)
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_set_aside_is_no_longer_listed(tmp_path: Path) -> None:
    for _ in range(2):
        assert set_aside(make_checkpoint(tmp_path, 3)).name == "damaged-step-00000003"
    assert list_checkpoints(tmp_path) == []


def test_only_damaged_checkpoints_are_no_checkpoint(tmp_path: Path) -> None:
    (make_checkpoint(tmp_path / "checkpoints", 3) / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint; given: .*b.safetensors is missing"):
        find_checkpoint(tmp_path)
