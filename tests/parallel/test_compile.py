"""Tests of compiled blocks: few graphs per stack, no graph breaks, and the losses of eager blocks."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from everest_ds.config import Experiment
from everest_ds.config.backbones import BACKBONES
from everest_ds.errors import ConfigError
from everest_ds.models import build_model
from everest_ds.models.vit import Block
from everest_ds.parallel.compile import apply_compile
from everest_ds.parallel.world import World
from everest_ds.training.observers import watch
from tests.parallel.equality import (
    GLOBAL_BATCH,
    SPLITTABLE,
    TOLERANCE,
    Trajectory,
    engine_run,
    experiment,
    global_batch,
    start,
)
from tests.ranks import run_ranks

# Whole blocks need one graph per stack, and a second one if they first run without gradients. In parts,
# attention, MLP and the code between them need one graph each, and the recomputed part needs two.
GRAPHS_OF_A_STACK = {"none": 1, "gelu": 1, "attention": 4, "mlp": 4, "blocks": 2, "full": 2}


class Case(NamedTuple):
    task: str
    stage: int
    tensor: int = 1
    mode: str = "none"
    offload: bool = False

    def config(self, num_ranks: int, compiles: bool | None) -> Experiment:
        recompute = {"mode": self.mode, "offload_to_cpu": self.offload}
        degree = num_ranks // self.tensor
        config = experiment(self.task, self.stage, degree, self.tensor, recompute)
        model = config.model.model_dump() | {"compile": compiles}
        return Experiment.model_validate({**config.model_dump(), "model": model})


class Outcome(NamedTuple):
    eager: Trajectory
    compiled: Trajectory
    graphs: int
    breaks: dict[str, int]


def by(backend: str) -> AbstractContextManager[Any]:
    """Use this compiler back end of torch; `aot_eager` traces a graph and runs it without generating code."""
    return torch.compiler.set_stance("default", force_backend=backend)


def train_both_ways(world: World, cases: list[Case], backend: str) -> list[Outcome]:
    """Run twenty steps of the engine for each case, once eager and once compiled."""
    from torch._dynamo.utils import counters

    BACKBONES["vit_tiny"] = SPLITTABLE
    outcomes = []
    for case in cases:
        eager = engine_run(world, case.config(world.size, False))
        torch._dynamo.reset()
        counters.clear()
        with by(backend):
            compiled = engine_run(world, case.config(world.size, True))
        graphs = counters["stats"]["unique_graphs"] - 1  # without the graph that checks the compiler
        outcomes.append(Outcome(eager, compiled, graphs, dict(counters["graph_break"])))
    return outcomes


def assert_as_eager(num_ranks: int, cases: list[Case], backend: str, tolerance: float) -> None:
    for case, *outcomes in zip(cases, *run_ranks(train_both_ways, num_ranks, cases, backend), strict=True):
        num_stacks = 2 if case.task == "pretrain" else 1
        for eager, compiled, graphs, breaks in outcomes:
            assert (graphs, breaks) == (num_stacks * GRAPHS_OF_A_STACK[case.mode], {}), case
            assert compiled.losses == pytest.approx(eager.losses, rel=tolerance), case


def test_a_stack_is_one_graph_that_trains_as_the_eager_blocks_do() -> None:
    cases = [Case("pretrain", 2), Case("finetune", 1), Case("finetune", 2, mode="full")]
    assert_as_eager(1, cases, "aot_eager", tolerance=1e-7)


@pytest.mark.slow
def test_tensor_parallel_sums_are_in_the_graph_of_a_block() -> None:
    cases = [Case("pretrain", 2, tensor=2), Case("finetune", 1, tensor=2, mode="attention")]
    assert_as_eager(2, cases, "aot_eager", tolerance=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("mode", GRAPHS_OF_A_STACK)
def test_every_recompute_mode_repeats_compiled_code(mode: str) -> None:
    offloads = (False,) if mode in ("none", "gelu") else (False, True)
    cases = [
        Case(task, 2, mode=mode, offload=offload) for task in ("pretrain", "finetune") for offload in offloads
    ]
    assert_as_eager(1, cases, "aot_eager", tolerance=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "case"),
    [
        (1, Case("pretrain", 2)),
        (1, Case("finetune", 1)),
        (1, Case("finetune", 2, mode="mlp")),
        (2, Case("finetune", 2)),
        (2, Case("pretrain", 1)),
        (2, Case("finetune", 1, tensor=2)),
        (2, Case("pretrain", 2, tensor=2, mode="full")),
    ],
)
def test_twenty_steps_of_compiled_kernels_are_those_of_eager_ones(num_ranks: int, case: Case) -> None:
    """Blocks compiled by Inductor, which generates C++ on a CPU, train as eager blocks do."""
    assert_as_eager(num_ranks, [case], "inductor", TOLERANCE)


def graphs_of_a_run_with_pictures_and_validation(world: World) -> tuple[int, int, bool]:
    """Count the graphs after a step, and after a picture, evaluations and another step.

    Returns:
        Both counts, and True if the picture has recorded attention.
    """
    from torch._dynamo.utils import counters

    engine = start(world, Case("finetune", 2).config(1, True))
    counters.clear()
    with by("aot_eager"):
        arguments = global_batch(0).arguments
        engine.backward(engine(*arguments).sum())
        first = counters["stats"]["unique_graphs"]
        seen = watch(engine, global_batch(0))
        engine.eval()
        for clips in range(1, GLOBAL_BATCH):
            with torch.no_grad():
                engine(*(tensor[:clips] for tensor in arguments[:2]))
        engine.train()
        engine.backward(engine(*arguments).sum())
        return first, counters["stats"]["unique_graphs"], bool(seen.attention_BThw.any())


def test_pictures_and_evaluation_at_other_sizes_compile_nothing() -> None:
    assert run_ranks(graphs_of_a_run_with_pictures_and_validation, 1) == [(1, 1, True)]


def blocks_after(world: World, config: Experiment) -> set[type[nn.Module]]:
    model = build_model(config)
    apply_compile(model, config, world)
    return {type(module) for module in model.modules() if isinstance(module, Block)}


def names_of_blocks(world: World, device: str, stage: int, compiles: bool | None) -> tuple[set[str], str]:
    """Return the names of the blocks' classes, and the logged text, as if the world had this device."""
    from everest_ds.log import logger

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    found = blocks_after(
        replace(world, device=torch.device(device)), Case("finetune", stage).config(1, compiles)
    )
    return {kind.__name__ for kind in found}, " ".join(said)


def test_left_to_itself_a_cpu_does_not_compile() -> None:
    assert run_ranks(names_of_blocks, 1, "cpu", 2, None) == [({"Block"}, "")]


def test_left_to_itself_zero_3_does_not_compile() -> None:
    assert run_ranks(names_of_blocks, 1, "cuda", 3, None) == [({"Block"}, "")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiler works on this machine's GPU")
def test_a_gpu_whose_compiler_does_not_work_runs_eagerly_and_says_so() -> None:
    ((kinds, said),) = run_ranks(names_of_blocks, 1, "cuda", 2, None)
    assert kinds == {"Block"}
    assert said.startswith("the blocks run without torch.compile: model.compile: torch.compile does not work")


def refusal_without_a_cpp_compiler(world: World) -> str:
    from torch._inductor import config as inductor

    with inductor.patch({"cpp.cxx": (None, "/no/such/compiler"), "force_disable_caches": True}):
        with pytest.raises(ConfigError) as refusal:
            blocks_after(world, Case("finetune", 2).config(1, True))
    return str(refusal.value)


def test_without_a_compiler_what_was_asked_for_is_refused() -> None:
    (message,) = run_ranks(refusal_without_a_cpp_compiler, 1)
    assert message.startswith("model.compile: torch.compile does not work on this machine; given: ")
    assert message.endswith("or set model.compile=false")


def compile_into(world: World, folder: Path) -> tuple[int, int]:
    """Compile with a cache in `folder`; return the numbers of graphs found and not found in the cache."""
    from torch._dynamo.utils import counters

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    engine = start(world, Case("finetune", 2).config(1, True))
    engine.backward(engine(*global_batch(0).arguments).sum())
    found = counters["inductor"]
    return found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]


@pytest.mark.slow
def test_another_process_finds_what_one_has_compiled(tmp_path: Path) -> None:
    (first,), (second,) = (run_ranks(compile_into, 1, tmp_path) for _ in range(2))
    assert first[1] > 0 and second[1] == 0
