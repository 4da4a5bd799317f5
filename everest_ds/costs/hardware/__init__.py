"""The hardware of the closed forms: GPUs, the links between them, and machines with measured rates."""
