"""The tuner: a pure cost model of a training step, a search over it, and trials that correct it."""
