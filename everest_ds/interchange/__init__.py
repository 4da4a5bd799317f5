"""Other systems' checkpoints under our names, ours under theirs, every key accounted for."""
