"""Measurements of training that need a GPU, in parts of one or two minutes; see tools/gpu_check.sh."""
