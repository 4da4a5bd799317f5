"""One rank of an experiment of DeepSpeed's autotuner: our model on random clips. See bench_autotuner.py.

The autotuner starts this script with a DeepSpeed config in base64, and ends it from within `engine.step()`.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from typing import Any

import torch

from everest_ds.config import Experiment, load_experiment
from everest_ds.config.mesh_shape import MeshShape
from everest_ds.data.clip_batches import ClipBatch
from everest_ds.models import build_model
from everest_ds.parallel.engine import build_engine
from everest_ds.parallel.mesh import form_mesh
from everest_ds.parallel.world import join_world
from everest_ds.training.optimization import build_objective, parameter_groups

_MICRO_BATCHES = 1000  # more than the autotuner runs before it ends the process


def main(source: str, ds_config_base64: str) -> None:
    """Train on one random batch until the autotuner ends the process."""
    config = load_experiment(source)
    ds_config = json.loads(base64.urlsafe_b64decode(ds_config_base64))
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    world = join_world()
    torch.manual_seed(0)
    model = build_model(config)
    mesh = form_mesh(world, MeshShape.of(config, world.size))
    engine: Any = build_engine(model, parameter_groups(model, config.optimizer), config, ds_config, mesh)
    objective = build_objective(config)
    batch = random_clips(config, engine.train_micro_batch_size_per_gpu()).to(world.device)
    for _ in range(_MICRO_BATCHES):
        engine.backward(objective(engine, batch))
        engine.step()


def random_clips(config: Experiment, count: int) -> ClipBatch:
    """Return `count` clips of noise in the recipe's geometry."""
    geometry = config.candidate_geometry
    size = (count, geometry.num_frames, geometry.image_size, geometry.image_size, 3)
    keys = torch.arange(count)
    labels = keys % (config.model.num_classes or 1)
    return ClipBatch(torch.randint(0, 256, size, dtype=torch.uint8), labels, keys, keys)


if __name__ == "__main__":
    # The launcher adds --local_rank=N, which is not needed because the environment holds it too.
    recipe, _, encoded = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    main(recipe, encoded)
