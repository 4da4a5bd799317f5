"""SLURM as a library: submission, requeueing, job status, events, chains and sweeps."""
