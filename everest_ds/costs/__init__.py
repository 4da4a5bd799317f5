"""Closed forms of the compute, memory, time and communication of a training step."""
