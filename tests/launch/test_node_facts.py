"""Tests of the comparison that finds the node that differs from the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from everest_ds.launch.node_facts import collect_facts, compare_nodes


def test_this_node_agrees_with_itself(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.mp4\n")
    (tmp_path / "token").write_text("seen")
    facts = collect_facts([tmp_path / "list.txt", tmp_path / "none"], tmp_path / "token", 1.0)
    assert facts.run == "seen" and "list.txt=6" in facts.files and "none=-1" in facts.files
    assert compare_nodes([facts, facts, facts]) == []


@pytest.mark.parametrize(
    "fact, value, says",
    [
        ("code", "123", "another version of everest-ds"),
        ("packages", "torch=2.5 deepspeed=0.19.8", "torch=2.5 (elsewhere 2.13)"),
        ("files", "/data/a.mp4=-1 /data/b.mp4=7", "/data/a.mp4=-1 (elsewhere 5)"),
        ("run", "No such file", "does not see the run folder"),
        ("gpus", "", "other GPUs: none (elsewhere H100)"),
        ("gpu_errors", "GPU 3: 12", "uncorrected memory errors: GPU 3: 12"),
        ("clock_s", 9.0, "+8.0 s off"),
    ],
)
def test_the_odd_node_is_named(tmp_path: Path, fact: str, value: Any, says: str) -> None:
    usual = replace(
        collect_facts([], tmp_path, 1.0),
        node="node1",
        packages="torch=2.13 deepspeed=0.19.8",
        files="/data/a.mp4=5 /data/b.mp4=7",
        gpus="H100",
    )
    odd = replace(usual, node="node9", **{fact: value})
    ((node, finding),) = compare_nodes([usual, odd, replace(usual, node="node2")])
    assert node == "node9" and says in finding.detail
    assert finding.status == ("warning" if fact == "clock_s" else "missing")
