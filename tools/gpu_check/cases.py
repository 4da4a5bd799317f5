"""The measured experiments: the recipes on one GPU with one micro-batch per step."""

from __future__ import annotations

from typing import NamedTuple

from everest_ds.config import Experiment, load_experiment

RECIPES = {"pretrain": "ucf101_pretrain_{}", "finetune": "k400_finetune_{}"}
# In a rehearsal, the recipes get a model and clips so small that a CPU step takes a fraction of a second.
_TINY = (
    "model.backbone=vit_tiny",
    "model.image_size=32",
    "model.patch_size=8",
    "model.num_frames=4",
    "batch.micro_batch_size=2",
)


class Case(NamedTuple):
    """An experiment, with the file of its trace if it is traced."""

    task: str
    backbone: str
    clips: int
    overrides: tuple[str, ...] = ()
    trace: str | None = None

    @property
    def name(self) -> str:
        """Return the title of the row."""
        return " ".join([f"{self.task} {self.backbone} {self.clips} clips", *self.overrides])

    def config(self, tiny: bool) -> Experiment:
        """Return the recipe in bf16, with one micro-batch per step."""
        overrides = [f"batch.micro_batch_size={self.clips}", "batch.global_batch_size=null"]
        if self.task == "finetune":
            overrides += ["model.init_from=null"]
        recipe = RECIPES[self.task].format(self.backbone)
        return load_experiment(recipe, [*overrides, *(_TINY if tiny else ()), *self.overrides])
