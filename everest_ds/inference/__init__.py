"""Inference on videos with trained models: feature tables, class predictions and token selections."""

from everest_ds.inference.feature_table import check_table_file
from everest_ds.inference.features import extract
from everest_ds.inference.open_model import open_trained
from everest_ds.inference.predictions import best_classes, class_names_of, predict_videos, prediction_row
from everest_ds.inference.views import Views

__all__ = [
    "Views",
    "best_classes",
    "check_table_file",
    "class_names_of",
    "extract",
    "open_trained",
    "predict_videos",
    "prediction_row",
]
