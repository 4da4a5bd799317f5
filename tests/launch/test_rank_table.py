"""Tests of the predicted host of every rank, checked against SLURM's own expansion of node lists."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everest_ds.errors import UsageError
from everest_ds.launch.slurm_nodelist import hosts_of, place_ranks
from tests.launch.test_slurm_nodelist import ELEMENTS, compress

Element = list[str | list[tuple[int, int, int]]]


def test_a_hosts_ranks_are_neighbours() -> None:
    assert [tuple(place) for place in place_ranks(["a", "b"], 2)] == [
        (0, "a", 0),
        (1, "a", 1),
        (2, "b", 0),
        (3, "b", 1),
    ]


@pytest.mark.parametrize(("nodelist", "nodes"), [("a[1-2]", 3), ("a[1-4]", 2), ("a1,a1", 2)])
def test_a_node_list_that_is_not_the_nodes_asked_for_is_refused(nodelist: str, nodes: int) -> None:
    with pytest.raises(UsageError, match="--nodelist and --nodes disagree"):
        hosts_of(nodelist, nodes)


@pytest.fixture(scope="module")
def scontrol(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the command `scontrol show hostnames`, with the configuration file that scontrol needs."""
    if shutil.which("scontrol") is None:
        pytest.skip("scontrol is missing: apt-get install slurm-client")
    conf = tmp_path_factory.mktemp("slurm") / "slurm.conf"
    conf.write_text("ClusterName=none\nSlurmctldHost=localhost\n")
    return ["env", f"SLURM_CONF={conf}", "scontrol", "show", "hostnames"]


def _nodelist(elements: list[Element]) -> str:
    """Compress elements, with a leading letter and nothing after the last bracket, as scontrol requires."""
    return ",".join("n" + compress(_cut(element)) for element in elements)


def _cut(element: Element) -> Element:
    last = max((i for i, piece in enumerate(element) if not isinstance(piece, str)), default=len(element) - 1)
    return element[: last + 1]


@pytest.mark.slurm
@settings(max_examples=60)
@given(nodelist=st.lists(ELEMENTS, min_size=1, max_size=3).map(_nodelist))
def test_every_rank_sits_where_slurm_would_put_it(scontrol: list[str], nodelist: str) -> None:
    said = subprocess.run([*scontrol, nodelist], capture_output=True, text=True, check=True).stdout.split()
    if len(set(said)) != len(said):
        with pytest.raises(UsageError):
            hosts_of(nodelist, len(said))
        return
    table = place_ranks(hosts_of(nodelist, len(said)), 8)
    assert [place.host for place in table[::8]] == said
    assert [place.rank for place in table] == list(range(8 * len(said)))
