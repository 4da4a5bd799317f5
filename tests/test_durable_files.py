"""Tests of files that a restart reads: no crash, full disk or cut line makes a run folder unusable."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everest_ds.durable_files import append_row, read_json_rows, replace_file

ROWS = st.lists(st.dictionaries(st.text(), st.integers() | st.text()), min_size=1, max_size=6)


@given(rows=ROWS, cut=st.integers(0, 10_000), tail=st.binary(max_size=30))
def test_a_file_that_was_cut_anywhere_can_be_read_and_appended_to(
    rows: list[dict[str, Any]], cut: int, tail: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("cut") / "rows.jsonl"
    for row in rows:
        append_row(file, row)
    whole = file.read_bytes()
    kept = whole[: cut % (len(whole) + 1)]
    file.write_bytes(kept + tail.replace(b"\n", b""))
    append_row(file, {"after": 1})
    found = read_json_rows(file)
    num_whole = kept.count(b"\n")
    assert found.rows[:num_whole] == rows[:num_whole] and found.rows[-1] == {"after": 1}
    assert len(found.rows) + found.num_damaged <= num_whole + 2


def test_a_missing_file_has_no_rows_and_a_line_that_is_no_object_is_counted(tmp_path: Path) -> None:
    assert read_json_rows(tmp_path / "absent") == ([], 0)
    (tmp_path / "odd").write_text('[1]\n{"a": 1}\n7\n\n{"b":\n')
    assert read_json_rows(tmp_path / "odd") == ([{"a": 1}], 3)


# In a mount namespace of its own, fills a small disk, and appends to and replaces files on it.
_FULL = """
import os, sys
from pathlib import Path
from everest_ds.durable_files import append_row, read_json_rows, replace_file
folder = Path(sys.argv[1])
replace_file(folder / "state", "old")
append_row(folder / "rows", {"n": 0})
with open(folder / "ballast", "wb", buffering=0) as ballast:
    try:
        while ballast.write(bytes(512)): pass
    except OSError: pass
refused = 0
for n in range(1, 200):
    try: append_row(folder / "rows", {"n": n, "text": "x" * 100})
    except OSError: refused += 1
try: replace_file(folder / "state", "new" * 5000)
except OSError: refused += 1000
(folder / "ballast").unlink()
append_row(folder / "rows", {"n": "last"})
rows = read_json_rows(folder / "rows")
assert refused >= 1001, refused
assert (folder / "state").read_text() == "old" and not list(folder.glob(".state*"))
assert len(rows.rows) == 200 + 1 - (refused - 1000), (len(rows.rows), refused)
assert rows.rows[-1] == {"n": "last"}
"""


def test_a_full_disk_is_noticed_and_leaves_whole_files(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make mount namespaces (root)")
    mounted = 'mount -t tmpfs -o size=64k small "$2" && exec "$0" -c "$1" "$2"'
    command = ["unshare", "-m", "sh", "-c", mounted, sys.executable, _FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    replace_file(file, json.dumps({"a": 1}))
    with pytest.raises(UnicodeEncodeError):
        replace_file(file, "\ud800")
    assert json.loads(file.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [file]
