"""How ranks come to be: the environment of a rank, the local launcher, and what a machine can run."""
