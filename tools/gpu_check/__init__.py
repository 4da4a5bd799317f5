"""What only a GPU can answer about training, in parts that take a minute each: see tools/gpu_check.sh."""
