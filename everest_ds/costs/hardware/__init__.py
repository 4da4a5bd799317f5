"""The hardware that the closed forms compute for: GPUs, links between them, and machines with measured rates."""
