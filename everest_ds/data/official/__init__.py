"""Conversion of the official annotation files of known data sets to manifests."""

from everest_ds.data.official.folder_tree import Indexed, index_dataset
from everest_ds.data.official.registry import DATASETS, OfficialDataset, find_dataset

__all__ = ["DATASETS", "Indexed", "OfficialDataset", "find_dataset", "index_dataset"]
