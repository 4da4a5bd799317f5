"""Distributed training: the only package that imports deepspeed, fairscale and torch.distributed."""
