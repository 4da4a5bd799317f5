"""Training and evaluation: steps, the loop, observers and the run folder."""
