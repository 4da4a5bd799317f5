"""Starting ranks: rank environment, local launcher, SLURM jobs, and checks of the machine."""
