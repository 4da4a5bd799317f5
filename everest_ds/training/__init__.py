"""Steps, the loop, evaluation, observers, and the run folder."""
