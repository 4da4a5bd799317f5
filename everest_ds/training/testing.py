"""The multi-view test of a fine-tuned run, and its result files in the run folder."""

from __future__ import annotations

import json
from typing import Any

from everest_ds.checkpoints.export import find_weights, load_weights
from everest_ds.config import Experiment
from everest_ds.data.video_list import read_class_names
from everest_ds.errors import ConfigError
from everest_ds.models import build_model
from everest_ds.models.precision import set_matmul_precision
from everest_ds.parallel.mesh import Mesh
from everest_ds.parallel.world import World
from everest_ds.reports.confusion import draw_confusion
from everest_ds.training.evaluate import Evaluation, evaluate_views
from everest_ds.training.run_folder import RunFolder
from everest_ds.training.samples import read_samples
from everest_ds.training.weights import copy_tensors

RESULT_FILE = "evaluation.json"
CONFUSION_FILE = "confusion.png"


def run_test(config: Experiment, world: World) -> dict[str, Any]:
    """Evaluate the best weights of `run.dir` on `data.test`; call on every rank.

    Returns:
        Top-1 and top-5 accuracy in per cent, and one row per class. They are also written to
        `evaluation.json`, next to a picture of the confusion matrix.

    Raises:
        CheckpointError: if the run has no weights, or weights of another architecture.
    """
    file = world.share(lambda: find_weights(config.run.dir, prefer_best=True))
    usable = world.share(lambda: read_samples(config, "test"))
    samples = usable.samples
    names = world.share(lambda: class_names(config))
    model = build_model(config)
    tensors, _ = world.together(lambda: load_weights(file))
    copy_tensors(model, tensors, file)
    model.to(world.device)
    set_matmul_precision(config.precision)
    data = config.data
    mesh = Mesh(world)  # every rank holds the whole model, even if training used tensor parallelism
    outcome = evaluate_views(
        model, samples, config, mesh, data.test_segments, data.test_crops, show_progress=True
    )
    missing = {problem.sample.name: problem.reason for problem in usable.excluded}
    missing |= {samples[index].name: reason for index, reason in outcome.missing.items()}
    result = {
        "weights": str(file),
        "top1": outcome.top(1),
        "top5": outcome.top(5),
        "num_clips": len(outcome.labels),
        "num_missing": len(missing),
        "missing": missing,
        "views": f"{data.test_segments} segments x {data.test_crops} crops",
        "classes": _by_class(outcome, names),
    }
    world.share(lambda: _write(config, result, outcome, names))
    return result


def class_names(config: Experiment) -> list[str]:
    """Return the class names from `data.class_names`; without that file, the class indices as text.

    Raises:
        ConfigError: if the number of names is not model.num_classes.
    """
    count = config.model.num_classes or 0
    if config.data.class_names is None:
        return [str(label) for label in range(count)]
    names = read_class_names(config.data.class_names)
    if len(names) != count:
        raise ConfigError(
            f"{config.data.class_names}: the number of names differs from model.num_classes",
            given=f"{len(names)} names",
            allowed=f"{count} names, one per line",
        )
    return names


def _by_class(outcome: Evaluation, names: list[str]) -> list[dict[str, Any]]:
    confusion = outcome.confusion()
    rows = []
    for label, name in enumerate(names):
        clips, right = int(confusion[label].sum()), int(confusion[label, label])
        others = confusion[label].copy()
        others[label] = 0
        rows.append(
            {
                "class": name,
                "clips": clips,
                "top1": round(100 * right / clips, 2) if clips else 0.0,
                "most_often_taken_for": names[int(others.argmax())] if others.any() else "-",
            }
        )
    return rows


def _write(config: Experiment, result: dict[str, Any], outcome: Evaluation, names: list[str]) -> None:
    folder = RunFolder(config.run.dir)
    (folder.path / RESULT_FILE).write_text(json.dumps(result, indent=2) + "\n")
    (folder.path / CONFUSION_FILE).write_bytes(draw_confusion(outcome.confusion(), names))
