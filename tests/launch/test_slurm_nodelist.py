"""Tests of SLURM's node lists and task counts, and of the hosts on which ranks run, also against scontrol."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everest_ds.errors import UsageError
from everest_ds.launch.slurm_nodelist import expand_nodelist, expand_task_counts, hosts_of, place_ranks

Element = list[str | list[tuple[int, int, int]]]  # of a node list; a range is (first, more, width)


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("login", "login"),
        ("node[1-3,7]", "node1 node2 node3 node7"),
        ("gpu-a[08-10],b", "gpu-a08 gpu-a09 gpu-a10 b"),
        ("x[1-2]-y[3-4]", "x1-y3 x1-y4 x2-y3 x2-y4"),
        ("n[1-2][3-4]", "n13 n14 n23 n24"),
        ("n[1-2]x[3-4]y[5-6]", "n1x3y5 n1x3y6 n2x3y5 n2x3y6 n1x4y5 n1x4y6 n2x4y5 n2x4y6"),
        ("a[8-010]", "a8 a9 a10"),
        ("x[099-101]", "x099 x100 x101"),
        ("a[1-2],a1", "a1 a2 a1"),
        ("[1-2]", "1 2"),
    ],
)
def test_expands_like_scontrol_show_hostnames(nodelist: str, hosts: str) -> None:
    assert expand_nodelist(nodelist) == hosts.split()  # expected hosts: the output of SLURM 22.05's scontrol


@pytest.mark.parametrize(
    "nodelist",
    ["", "a[1", "a]", "a[]", "a[2-1]", "a[1,]", "a[1-2-3]", "a[x]", "a,,b", "a,", ",a", "a b", "a[[1]]"],
)
def test_malformed_node_list_is_refused_and_quoted(nodelist: str) -> None:
    with pytest.raises(UsageError) as caught:
        expand_nodelist(nodelist)
    assert repr(nodelist) in str(caught.value)


@pytest.mark.parametrize("nodelist", ["a[0-999999999999]", "a[1-1000]-b[1-1000]"])
def test_a_mistyped_range_does_not_fill_the_memory(nodelist: str) -> None:
    with pytest.raises(UsageError, match="at most 65536 hosts"):
        expand_nodelist(nodelist)


NAMES = st.text("abcxyz-.", min_size=1, max_size=4)
RANGES = st.tuples(st.integers(0, 120), st.integers(0, 5), st.integers(1, 4))
ELEMENTS = st.lists(st.one_of(NAMES, st.lists(RANGES, min_size=1, max_size=3)), min_size=1, max_size=4)


def compress(element: Element) -> str:
    parts = []
    for piece in element:
        if isinstance(piece, str):
            parts.append(piece)
        else:
            spans = (
                f"{first:0{width}d}-{first + more:0{width}d}" if more else f"{first:0{width}d}"
                for first, more, width in piece
            )
            parts.append(f"[{','.join(spans)}]")
    return "".join(parts)


def _naive_hosts(element: Element) -> list[str]:
    hosts = [""]
    for piece in element:
        if isinstance(piece, str):
            hosts = [host + piece for host in hosts]
        else:
            numbers = [
                str(n).zfill(width) for first, more, width in piece for n in range(first, first + more + 1)
            ]
            hosts = [host + number for host in hosts for number in numbers]
    return hosts


@given(st.lists(ELEMENTS, min_size=1, max_size=4))
def test_compressed_lists_expand_to_the_hosts_they_were_made_from(
    elements: list[Element],
) -> None:
    nodelist = ",".join(map(compress, elements))
    # The order of several brackets is checked against SLURM itself, below.
    assert Counter(expand_nodelist(nodelist)) == Counter(
        host for element in elements for host in _naive_hosts(element)
    )


@given(st.text("ab[]-,019 \n", max_size=12))
def test_any_text_is_expanded_or_refused_but_never_crashes(nodelist: str) -> None:
    try:
        assert all(expand_nodelist(nodelist))
    except UsageError:
        pass


def test_task_counts_repeat_per_node() -> None:
    assert expand_task_counts("4(x2),3") == [4, 4, 3]
    assert expand_task_counts("8") == [8]


@pytest.mark.parametrize("counts", ["", "4(x2", "4(x0)", "x2", "4,", "-1", "1(x999999999)"])
def test_malformed_task_counts_are_refused(counts: str) -> None:
    with pytest.raises(UsageError, match="task counts"):
        expand_task_counts(counts)


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
