"""Tests of docs/troubleshooting.md: the messages that it quotes and the keys that it names exist."""

from __future__ import annotations

import re

from everest_ds.config import Experiment, flatten
from tests.docs.commands import ROOT

TEXT = (ROOT / "docs" / "troubleshooting.md").read_text()
SOURCE = "".join(path.read_text() for path in (ROOT / "everest_ds").rglob("*.py"))


def test_quoted_messages_are_ours() -> None:
    quoted = re.findall(r'(?<!`)"([^"`]+)"', TEXT)
    assert len(quoted) > 20
    assert [message for message in quoted if message not in SOURCE] == []


def test_keys_exist() -> None:
    sections = "|".join(Experiment.model_fields)
    named = set(re.findall(rf"`((?:{sections})\.[a-z_]+)", TEXT)) - {"metrics.jsonl"}
    keys = {key for key, _ in flatten(Experiment(task="pretrain").model_dump())}
    assert named and named <= keys
    figures = ("data_wait_pct", "val_missing")
    assert all(figure in SOURCE and figure in TEXT for figure in figures)


def test_files_and_anchors_that_are_linked_exist() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target, anchor in re.findall(r"\]\(([^)#:\s]*\.md)?(?:#([^)\s]+))?\)", document.read_text()):
            linked = document.parent / target if target else document
            assert linked.is_file(), f"{document.name}: {target}"
            titles = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert not anchor or anchor in anchors, f"{document.name}: {target}#{anchor}"
