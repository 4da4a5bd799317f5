"""The demo of `make demo`: a complete experiment on two CPU ranks, from synthetic data to a result page.

    doctor -> synthetic videos -> EVEREST pre-training (ZeRO-2) -> fine-tuning -> test -> summary.html

Every step is a command of `everest-ds`, printed before it runs. The control is the same fine-tuning from
random weights.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from everest_ds.config import Experiment, load_experiment
from everest_ds.costs.compute import predict_macs
from everest_ds.data.synthetic import MOTIONS
from everest_ds.reports.page import Page, PageSection, render_page
from everest_ds.reports.plots import draw_accuracies, draw_curves
from everest_ds.training.run_folder import EVALUATION_FILE, read_metrics
from everest_ds.units import format_count, format_duration

DEMO = Path("runs/demo")
NUM_RANKS = 2
CHANCE = 1 / len(MOTIONS)


def main() -> None:
    """Run every step; stop at the first failure."""
    started = time.monotonic()
    shutil.rmtree(DEMO, ignore_errors=True)
    ranks = ("--nproc", str(NUM_RANKS))
    everest("doctor")
    everest("data", "synth", str(DEMO / "data"))
    everest("pretrain", "demo_pretrain", *ranks)
    for recipe, run in (("demo_finetune", "finetune"), ("demo_scratch", "scratch")):
        everest("finetune", recipe, *ranks)
        everest("evaluate", str(DEMO / run), *ranks)
    summary = summarise(time.monotonic() - started)
    (DEMO / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (DEMO / "summary.html").write_text(render_page(build_page(summary)))
    print_end(summary)


def everest(*arguments: str) -> None:
    """Print and run one command of `everest-ds`; exit with its code if it fails."""
    print(f"\n$ everest-ds {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "everest_ds", *arguments])
    if done.returncode:
        sys.exit(done.returncode)


def summarise(seconds: float) -> dict[str, Any]:
    """Return the figures of the demo, from the run folders."""
    steps = [row for row in read_metrics(DEMO / "pretrain") if "loss" in row]
    tested, control = (evaluation(run) for run in ("finetune", "scratch"))
    return {
        "seconds": round(seconds, 1),
        "pretrain": {
            "loss_first": steps[0]["loss"],
            "loss_last": steps[-1]["loss"],
            "steps": steps[-1]["step"],
            "gmacs_per_clip": predict_macs(load_experiment(DEMO / "pretrain")).forward_macs / 1e9,
        },
        "finetune": {
            "top1": tested["top1"],
            "top1_from_scratch": control["top1"],
            "chance": 100 * CHANCE,
            "num_test_clips": tested["num_clips"],
        },
    }


def evaluation(run: str) -> dict[str, Any]:
    """Return the result that `everest-ds evaluate` wrote into a run folder."""
    result: dict[str, Any] = json.loads((DEMO / run / EVALUATION_FILE).read_text())
    return result


def build_page(summary: dict[str, Any]) -> Page:
    """Build the summary page."""
    pre, fine = summary["pretrain"], summary["finetune"]
    curves = {"from EVEREST pre-training": "finetune", "from scratch": "scratch"}
    finetunings = {label: read_metrics(DEMO / run) for label, run in curves.items()}
    tops = {"pre-trained": fine["top1"], "from scratch": fine["top1_from_scratch"]}
    return Page(
        title="EVEREST-DS demo",
        lead="A tiny EVEREST model, pre-trained on synthetic videos of moving objects with DeepSpeed ZeRO-2"
        f" on {NUM_RANKS} ranks, then fine-tuned to classify the motion, which no single frame reveals.",
        figures={
            "test top-1 after fine-tuning": f"{fine['top1']:.1f} %",
            "from scratch, same fine-tuning budget": f"{fine['top1_from_scratch']:.1f} %",
            f"chance, {len(MOTIONS)} motions": f"{fine['chance']:.1f} %",
            "total time": format_duration(summary["seconds"]),
        },
        sections=[
            PageSection(
                "What the model sees",
                "Rows: the clip; the tokens that EVEREST keeps (those that changed most); the kept tokens"
                " that the encoder sees; the prediction of the other kept tokens. Columns: slots in time.",
                pictures={
                    "a training clip at the last step": (
                        DEMO / "pretrain/tensorboard/reconstruction.png"
                    ).read_bytes(),
                    "where the fine-tuned encoder looks (attention rollout)": (
                        DEMO / "finetune/tensorboard/attention.png"
                    ).read_bytes(),
                },
            ),
            PageSection(
                "Learning",
                f"Pre-training loss in {pre['steps']} steps:"
                f" {pre['loss_first']:.3f} to {pre['loss_last']:.3f}.",
                pictures={
                    "pre-training loss": draw_curves({"": read_metrics(DEMO / "pretrain")}, "loss", "loss"),
                    "fine-tuning loss": draw_curves(finetunings, "loss", "loss"),
                    f"test accuracy over {fine['num_test_clips']} clips": draw_accuracies(
                        tops, fine["chance"]
                    ),
                    "confusion matrix": (DEMO / "finetune/confusion.png").read_bytes(),
                },
            ),
            PageSection("By motion", rows=evaluation("finetune")["classes"]),
            PageSection(
                "Compute used",
                "Predicted from the token counts; one multiply-accumulate (MAC) is two floating-point"
                " operations. `all tokens` is VideoMAE: tube masking, and fine-tuning on every token.",
                rows=[compute_row(run) for run in ("pretrain", "finetune")],
            ),
            PageSection("Look further", f"tensorboard --logdir {DEMO}"),
        ],
    )


def compute_row(run: str) -> dict[str, Any]:
    """Return the compute of one phase, and the compute that all tokens would need."""
    config = load_experiment(DEMO / run)
    last = read_metrics(DEMO / run)[-1]["step"]
    clips = last * (config.batch.global_batch_size or config.batch.micro_batch_size * NUM_RANKS)
    ours, dense = predict_macs(config), predict_macs(on_all_tokens(config))
    return {
        "phase": run,
        "kept_tokens": f"{config.token_counts.num_kept} of {config.token_counts.num_tokens}",
        "GMACs per clip": round(ours.training_macs / 1e9, 3),
        "all tokens": round(dense.training_macs / 1e9, 3),
        "ratio": round(ours.training_macs / dense.training_macs, 2),
        "total": f"{format_count(2 * ours.training_macs * clips)}FLOP",
    }


def on_all_tokens(config: Experiment) -> Experiment:
    """Return the config of the same run as plain VideoMAE."""
    selection = "tube" if config.task == "pretrain" else "none"
    return load_experiment(config.run.dir, [f"tokens.selection={selection}"])


def print_end(summary: dict[str, Any]) -> None:
    """Print the results and the places to look at."""
    fine = summary["finetune"]
    print(
        f"\nTop-1 {fine['top1']:.1f} % after pre-training, {fine['top1_from_scratch']:.1f} % from scratch,"
        f" chance {fine['chance']:.1f} %; {format_duration(summary['seconds'])} in total.\n"
        f"Open   {DEMO / 'summary.html'}\n"
        f"Watch  tensorboard --logdir {DEMO}"
    )


if __name__ == "__main__":
    main()
