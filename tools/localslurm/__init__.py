"""The parts of `tools/local_slurm`, which runs a real SLURM cluster of several nodes on one Linux machine."""
