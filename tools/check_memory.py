"""Error table of a training step's memory: predicted and counted against measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from everest_ds.cli.program import run_program
from everest_ds.config import Experiment
from everest_ds.config.schema import RecomputeConfig
from everest_ds.console import print_facts, print_table, write_json
from everest_ds.costs.memory import predict_step_bytes
from everest_ds.models import build_model
from everest_ds.parallel.recompute import apply_recompute
from everest_ds.profiling.allocations import track_allocations
from everest_ds.profiling.memory_trace import trace_memory
from everest_ds.profiling.step_measurement import device_name
from everest_ds.units import format_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TASKS, ATTENTIONS = ("pretrain", "finetune"), ("fused", "unfused")
MODES = get_args(RecomputeConfig.model_fields["mode"].annotation)
MIB = 1024**2


def experiment(clips: int, backbone: str, task: str, precision: str, attention: str, mode: str) -> Experiment:
    """Return the experiment of EVEREST at its released keep ratios."""
    return Experiment.model_validate(
        {
            "task": task,
            "model": {
                "backbone": backbone,
                "attention": attention,
                "num_classes": 400 if task == "finetune" else None,
                "drop_path": 0.1 if task == "finetune" else 0.0,
            },
            "tokens": {"keep_ratio": 0.6 if task == "finetune" else 0.3},
            "batch": {"micro_batch_size": clips},
            "precision": precision,
            "recompute": {"mode": mode},
        }
    )


def build(config: Experiment) -> nn.Module:
    """Build the model in the experiment's precision, with its recomputation applied."""
    model = build_model(config).to(DTYPES[config.precision]).train()
    apply_recompute(model, config.recompute)
    return model


def batch(config: Experiment) -> tuple[Tensor, Tensor, Tensor]:
    """Return blank uint8 clips (B, F, H, W, 3), keys (B,) and labels (B,)."""
    clip, size = config.candidate_geometry, config.batch.micro_batch_size
    pixels = torch.zeros(size, clip.num_frames, clip.image_size, clip.image_size, 3, dtype=torch.uint8)
    return pixels, torch.arange(size), torch.zeros(size, dtype=torch.int64)


def loss_of(config: Experiment) -> Callable[..., Tensor]:
    """Return the function that computes the training loss of a model on a batch."""

    def loss(model: nn.Module, clip_BFHWC: Tensor, key_B: Tensor, label_B: Tensor) -> Tensor:
        output = model(clip_BFHWC, key_B)
        return output.loss if config.task == "pretrain" else F.cross_entropy(output.float(), label_B)

    return loss


def measure(config: Experiment, device: torch.device) -> int:
    """Measure the bytes that a forward and backward pass allocates beyond weights, gradients and clips."""
    model, inputs = build(config).to(device), [tensor.to(device) for tensor in batch(config)]
    loss = loss_of(config)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)

    def step() -> None:
        loss(model, *inputs).backward()

    if device.type == "cuda":
        step()  # let libraries allocate their permanent workspaces first
    return track_allocations(step, device).peak_bytes


def count(config: Experiment) -> int:
    """Count, on the traced model, the bytes of both passes beyond weights, gradients and clips."""
    trace = trace_memory(lambda: build(config), lambda: batch(config), loss_of(config))
    resting = sum(trace.resting_bytes.values())
    return max(moment.total_bytes for moment in trace.timeline if moment.phase != "optimizer") - resting


def check(config: Experiment, device: torch.device) -> dict[str, Any]:
    """Return one row of the table."""
    predicted, counted, measured = predict_step_bytes(config), count(config), measure(config, device)
    return {
        "backbone": config.model.backbone,
        "task": config.task,
        "precision": config.precision,
        "attention": config.model.attention,
        "recompute": config.recompute.mode,
        "clips": config.batch.micro_batch_size,
        "predicted_mib": round(predicted / MIB, 1),
        "counted_mib": round(counted / MIB, 1),
        "measured_mib": round(measured / MIB, 1),
        "predicted_error_pct": round(100 * (predicted / measured - 1), 2),
        "counted_error_pct": round(100 * (counted / measured - 1), 2),
    }


def check_all(cases: Sequence[Experiment], device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the rows of all cases, and print each to stderr as progress."""
    for number, config in enumerate(cases, 1):
        row = check(config, device)
        print(f"{number}/{len(cases)} {' '.join(map(str, row.values()))}", file=sys.stderr, flush=True)
        yield row


def as_markdown(facts: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Render facts as a Markdown list and rows as a Markdown table."""
    head = [name.replace("_", " ") for name in rows[0]]
    lines = [head, ["---"] * len(head), *([str(value) for value in row.values()] for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join(f"- {name}: {value}" for name, value in facts.items()) + f"\n\n{table}\n"


def summarize(rows: Sequence[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Return the device and versions behind the table, and its worst errors."""
    worst = max(rows, key=lambda row: abs(row["predicted_error_pct"]))
    return {
        "device": device_name(device),
        "torch": version("torch"),
        "rows": len(rows),
        "worst_prediction_pct": worst["predicted_error_pct"],
        "worst_row": " ".join(str(value) for value in list(worst.values())[:6]),
        "worst_count_pct": max((row["counted_error_pct"] for row in rows), key=abs),
        "largest_step": format_bytes(max(row["measured_mib"] for row in rows) * MIB),
    }


def main(
    backbones: Annotated[list[str], typer.Argument(help="Backbones, such as vit_small vit_base.")],
    clips: Annotated[int, typer.Option(min=1, help="Clips per step.")] = 2,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write facts and rows to this file.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Also write facts and rows to this file as Markdown.")
    ] = None,
) -> None:
    """Compare predicted, counted and measured memory of an EVEREST step beyond weights, gradients and clips.

    The table covers both phases, all recompute modes, float32 and bfloat16, fused and unfused attention.
    Measured memory is the sum of tracked allocations on a CPU and the caching allocator's peak on a GPU.
    Optimiser states are left out: their sizes are exact, and tests check them against an engine's tensors.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    axes = (
        backbones or ["vit_small", "vit_base"],
        ("pretrain", "finetune"),
        DTYPES,
        ("fused", "unfused"),
        MODES,
    )
    rows = list(check_all([experiment(clips, *case) for case in product(*axes)], device))
    facts = summarize(rows, device)
    print_facts("Memory of a step beyond weights, gradients and clips", facts)
    print_table("", rows)
    write_json(json_file, {"facts": facts, "rows": rows})
    if markdown:
        markdown.write_text(as_markdown(facts, rows))


if __name__ == "__main__":
    run_program(main)
