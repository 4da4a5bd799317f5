"""A real SLURM cluster of several nodes on one Linux machine: the parts of `tools/local_slurm`."""
