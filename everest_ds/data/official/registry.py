"""The registry of official data sets that can be indexed by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from everest_ds.data.official import hmdb51, kinetics400, oscc, ssv2, ucf101
from everest_ds.data.official.annotations import Annotations
from everest_ds.errors import UsageError, nearest


@dataclass(frozen=True)
class OfficialDataset:
    """A data set whose authors publish its annotation.

    Attributes:
        name: its name on the command line.
        title: its full name, for display.
        read: reads the annotation for a fold from a folder.
        num_classes: number of classes of the whole data set.
        num_folds: number of official divisions into training and test.
        evaluated_on: the labelled split on which results are published.
        num_train: number of training samples as published; for Kinetics, as in VideoMAE's list.
        recipes: the recipes that it is trained with, which set stride, sampling, test views and flips.
    """

    name: str
    title: str
    read: Callable[[Path, int], Annotations]
    num_classes: int
    num_folds: int
    evaluated_on: str
    num_train: int

    @property
    def recipes(self) -> dict[str, str]:
        """The names of the data set's recipes, by task."""
        return {task: f"{self.name}_{task}_vit_base" for task in ("pretrain", "finetune")}


DATASETS = {
    dataset.name: dataset
    for dataset in (
        OfficialDataset("k400", "Kinetics-400", kinetics400.read_kinetics400, 400, 1, "val", 240_436),
        OfficialDataset("ssv2", "Something-Something v2", ssv2.read_ssv2, 174, 1, "val", 168_913),
        OfficialDataset("ucf101", "UCF101", ucf101.read_ucf101, 101, 3, "test", 9_537),
        OfficialDataset("hmdb51", "HMDB51", hmdb51.read_hmdb51, 51, 3, "test", 3_570),
        OfficialDataset("oscc", "Ego4D OSCC", oscc.read_oscc, 2, 1, "val", 41_085),
    )
}


def find_dataset(name: str) -> OfficialDataset:
    """Return the data set called `name`.

    Raises:
        UsageError: if there is no such data set.
    """
    if name not in DATASETS:
        raise UsageError("no such data set", given=repr(name), allowed=nearest(name, DATASETS))
    return DATASETS[name]
