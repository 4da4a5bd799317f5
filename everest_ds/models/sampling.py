"""Random numbers that belong to a sample, not to a process: the same on any rank, device and restart.

Each clip carries a 64-bit key made of (seed, epoch, sample id). A number is a hash of (key, stream,
counter), computed in plain integer tensor arithmetic where the clip lives: no generator state to save,
no host synchronisation, and tensor-parallel ranks agree without a message.

Shape legend: B clips, n numbers a clip, S streams.
"""

from __future__ import annotations

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014),
# constants written as signed 64-bit integers; tensor multiplication wraps modulo 2^64.
_GOLDEN_GAMMA = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


def _as_int64(value: int) -> int:
    # a Python int does not wrap as a tensor does, and torch refuses one beyond 64 bits
    return (value + 2**63) % 2**64 - 2**63


def _logical_shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _logical_shift_right(x, 30)) * _MIX_1
    x = (x ^ _logical_shift_right(x, 27)) * _MIX_2
    return x ^ _logical_shift_right(x, 31)


def random_bits(key_B: Tensor, stream: int, count: int) -> Tensor:
    """Hash each clip's key into `count` independent 63-bit integers.

    Args:
        key_B: int64 keys, one a clip.
        stream: which use of randomness this is; different streams of a clip are independent.
        count: n.

    Returns:
        int64 (B, n), each in [0, 2^63).
    """
    counter = torch.arange(1, count + 1, device=key_B.device)
    state_B = _mix(key_B + _as_int64((stream + 1) * _GOLDEN_GAMMA))
    return _logical_shift_right(_mix(state_B[:, None] + counter * _GOLDEN_GAMMA), 1)


def _first_bits(key_B: Tensor, first_stream: int, num_streams: int) -> Tensor:
    """The first number of `random_bits` in each of several neighbouring streams: (S, B)."""
    stream_S = torch.arange(first_stream + 1, first_stream + num_streams + 1, device=key_B.device)
    state_SB = _mix(key_B + stream_S[:, None] * _GOLDEN_GAMMA)
    return _logical_shift_right(_mix(state_SB + _GOLDEN_GAMMA), 1)


def _as_uniform(bits: Tensor) -> Tensor:
    return _logical_shift_right(bits, 39).float() * 2.0**-24


def random_uniform(key_B: Tensor, stream: int, count: int) -> Tensor:
    """float32 (B, n) in [0, 1), a function of key and stream alone."""
    return _as_uniform(random_bits(key_B, stream, count))


def drop_scale(key_B: Tensor, stream: int, count: int, rate: float) -> Tensor:
    """What dropout multiplies with, float32 (B, n): 0 with probability `rate`, else 1 / (1 - rate)."""
    return (random_uniform(key_B, stream, count) >= rate) / (1 - rate)


def drop_scales(key_B: Tensor, first_stream: int, rate_S: Tensor) -> Tensor:
    """`drop_scale` of one number a clip in S neighbouring streams, each with a rate of its own, in one hash.

    Args:
        first_stream: of the first rate; the next rate's is the next stream.
        rate_S: float64, on the keys' device.

    Returns:
        float32 (S, B).
    """
    uniform_SB = _as_uniform(_first_bits(key_B, first_stream, len(rate_S)))
    return (uniform_SB >= rate_S.float()[:, None]) / (1 - rate_S).float()[:, None]


def random_permutation(key_B: Tensor, stream: int, count: int) -> Tensor:
    """int64 (B, n): a uniform random order of `range(count)` for each clip."""
    return random_bits(key_B, stream, count).argsort(dim=1, stable=True)
