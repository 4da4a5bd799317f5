"""The hardware of the cost model: GPUs, the links between them, and machines with their rates."""
