"""Measurements of training that need a GPU, in parts of a minute or two: see tools/gpu_check.sh."""
