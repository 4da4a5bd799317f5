"""The only importer of deepspeed, fairscale and torch.distributed."""
