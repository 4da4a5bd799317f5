"""Compute, memory and time of a run: predicted, counted or measured, and always labelled as such."""
