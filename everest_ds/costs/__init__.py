"""The cost model: closed formulas for the compute, memory, time and communication of a training step."""
