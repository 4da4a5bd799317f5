"""Tests of the index of a store: damage of any byte is noticed, and a part of a store is a store."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from everest_ds.data.store.index import StoredSamples, open_store, write_part_of_store
from everest_ds.data.video_list import leave_out
from everest_ds.errors import DataError
from tests.data.store.conftest import pack, samples_of


def test_a_changed_byte_of_the_index_is_noticed(packed_motion: StoredSamples, tmp_path: Path) -> None:
    shutil.copytree(packed_motion.shards.parent, tmp_path / "store")
    (index,) = (tmp_path / "store").glob("index-*.npz")
    content = index.read_bytes()
    for place in np.linspace(0, len(content) - 1, 50).astype(int):
        index.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        with pytest.raises(DataError, match=f"{index.name}: the index of the frame store is damaged"):
            open_store(tmp_path / "store")
    index.unlink()
    with pytest.raises(DataError, match="the index of the frame store is missing.*data pack"):
        open_store(tmp_path / "store")


def test_packing_again_restores_a_damaged_description(motion_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    pack(motion_data / "val.txt", out)
    before = samples_of(out)
    for content in ("{", "[]", json.dumps({"packing": {"colour": 1}})):
        (out / "store.json").write_text(content)
        with pytest.raises(DataError, match="store.json: the description of the frame store is damaged"):
            open_store(out)
        assert pack(motion_data / "val.txt", out).num_known == 12
        assert samples_of(out) == before


def test_a_store_of_another_version_is_refused(packed_motion: StoredSamples, tmp_path: Path) -> None:
    facts = json.loads((packed_motion.shards.parent / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps({**facts, "form": "everest-ds frame store, version 9"}))
    with pytest.raises(DataError, match="not a frame store of this version; given: .*version 9"):
        open_store(tmp_path)


def test_samples_keep_their_places_when_some_are_left_out_or_sent(packed_motion: StoredSamples) -> None:
    fewer = leave_out(packed_motion, [0, 4, 23])
    kept = [row for row in range(24) if row not in (0, 4, 23)]
    assert list(fewer) == [packed_motion[row] for row in kept]
    sent = pickle.loads(pickle.dumps(fewer))
    assert list(sent) == list(fewer)


def test_a_part_of_a_store_is_a_store(packed_motion: StoredSamples, tmp_path: Path) -> None:
    rows = [5, 1, 1, 22]
    write_part_of_store(tmp_path / "part", leave_out(packed_motion, [0]), rows)  # type: ignore[arg-type]
    part = open_store(tmp_path / "part")
    assert [sample.label for sample in part] == [packed_motion[row + 1].label for row in rows]
    assert [sample.stored._replace(shard=Path()) for sample in part if sample.stored] == [
        stored._replace(shard=Path()) for row in rows if (stored := packed_motion[row + 1].stored)
    ]
