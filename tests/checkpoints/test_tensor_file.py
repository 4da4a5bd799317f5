"""Tests of streamed safetensors files: readable by the library, with a correct seal, written atomically."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from everest_ds.checkpoints.tensor_file import (
    FileSeal,
    TensorSpec,
    publish_tensors,
    save_weights,
    seal_of,
    write_tensors,
)

SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), max_size=5)


@given(SHAPES, st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_library_reads_back_what_was_streamed(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    file = tmp_path_factory.mktemp("files") / "x.safetensors"
    tensors = {f"p{i}": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)}
    specs = {name: TensorSpec(dtype, tuple(t.shape)) for name, t in tensors.items()}
    seal = write_tensors(file, specs, tensors.values(), {"task": "test"})
    assert (
        seal == FileSeal(file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()) == seal_of(file)
    )
    read = load_file(file)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "best.safetensors"
    save_weights({"w": torch.ones(3)}, file, {})

    def breaking() -> Iterator[Tensor]:
        yield torch.zeros(3)
        raise OSError("the disk is full")

    specs = {name: TensorSpec(torch.float32, (3,)) for name in "wv"}
    with pytest.raises(OSError, match="the disk is full"):
        publish_tensors(file, specs, breaking(), {})
    assert torch.equal(load_file(file)["w"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["best.safetensors"]
