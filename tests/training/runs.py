"""Small real runs on synthetic data, for tests of the training loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from everest_ds.config import Experiment
from everest_ds.parallel.world import World
from everest_ds.training.loop import train

Row = dict[str, Any]


def experiment(data: Path, folder: Path, task: str = "pretrain", /, **sections: dict[str, Any]) -> Experiment:
    """Return a run of 9 steps (3 epochs of 3) with 8 clips per step; `sections` override the defaults."""
    tree: dict[str, Any] = {
        "task": task,
        "model": {"backbone": "vit_tiny", "image_size": 32, "patch_size": 8, "num_frames": 4},
        "tokens": {"keep_ratio": 0.5, "mask_ratio": 0.75},
        "data": {
            "train": str(data / "train.txt"),
            "val": str(data / "val.txt"),
            "test": str(data / "test.txt"),
            "class_names": str(data / "classes.txt"),
            "frame_stride": 2,
            "num_workers": 1,
            "test_segments": 2,
            "test_crops": 1,
        },
        "schedule": {"epochs": 3, "warmup_epochs": 1, "base_lr": 0.02},
        "batch": {"micro_batch_size": 4, "global_batch_size": 8},
        "precision": "fp32",
        "run": {"dir": str(folder), "log_every_steps": 1, "save_every_steps": 100, "image_every_steps": 100},
    }
    if task == "finetune":
        tree["model"] |= {"num_classes": 6, "drop_path": 0.1}
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return Experiment.model_validate(tree)


def train_rank(world: World, config: Experiment) -> None:
    """Train a whole run on this rank."""
    train(config, world)


def metrics(run: Path) -> list[Row]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    """Return the logged losses, by step."""
    return {row["step"]: row["loss"] for row in metrics(run) if "loss" in row}
