"""Trials: short real runs of the best candidates, their records, ranking and report."""
