"""Random numbers derived from each sample, equal on every rank, on every device and after every restart.

Each clip carries an int64 key, a hash of (seed, epoch, sample, repeat). A number is a hash of (key, stream,
counter), computed in integer tensor arithmetic on the device of the clip: there is no generator state to save
and no host synchronisation, and tensor-parallel ranks agree without communication.

Shape legend: B clips, n numbers per clip, S streams.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Constants of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014),
# written as signed 64-bit integers, because tensor multiplication wraps modulo 2^64.
_GOLDEN_GAMMA = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


def _as_int64(value: int) -> int:
    # A Python int does not wrap as a tensor does, and torch rejects integers beyond 64 bits.
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
        key_B: int64 random keys, one per clip.
        stream: number that identifies one use of randomness; the streams of a clip are independent.
        count: number n of integers per clip.

    Returns:
        int64 (B, n), each in [0, 2^63).
    """
    counter = torch.arange(1, count + 1, device=key_B.device)
    state_B = _mix(key_B + _as_int64((stream + 1) * _GOLDEN_GAMMA))
    return _logical_shift_right(_mix(state_B[:, None] + counter * _GOLDEN_GAMMA), 1)


def _first_bits(key_B: Tensor, first_stream: int, num_streams: int) -> Tensor:
    """Return the first number of `random_bits` in each of S consecutive streams: (S, B)."""
    stream_S = torch.arange(first_stream + 1, first_stream + num_streams + 1, device=key_B.device)
    state_SB = _mix(key_B + stream_S[:, None] * _GOLDEN_GAMMA)
    return _logical_shift_right(_mix(state_SB + _GOLDEN_GAMMA), 1)


def _as_uniform(bits: Tensor) -> Tensor:
    return _logical_shift_right(bits, 39).float() * 2.0**-24


def random_uniform(key_B: Tensor, stream: int, count: int) -> Tensor:
    """Draw n uniform numbers in [0, 1) per clip from its key and a stream: float32 (B, n)."""
    return _as_uniform(random_bits(key_B, stream, count))


def drop_scale(key_B: Tensor, stream: int, count: int, rate: float) -> Tensor:
    """Draw dropout factors, float32 (B, n): 0 with probability `rate`, else 1 / (1 - rate)."""
    return (random_uniform(key_B, stream, count) >= rate) / (1 - rate)


def drop_scales(key_B: Tensor, first_stream: int, rate_S: Tensor) -> Tensor:
    """Draw one dropout factor per clip in each of S consecutive streams, with one hash over all of them.

    Args:
        key_B: int64 random keys, one per clip.
        first_stream: stream of the first rate; the following rates use the following streams.
        rate_S: drop rate of each stream, float64, on the device of the keys.

    Returns:
        float32 (S, B).
    """
    uniform_SB = _as_uniform(_first_bits(key_B, first_stream, len(rate_S)))
    return (uniform_SB >= rate_S.float()[:, None]) / (1 - rate_S).float()[:, None]


def random_permutation(key_B: Tensor, stream: int, count: int) -> Tensor:
    """Draw a uniform random order of `range(count)` for each clip: int64 (B, n)."""
    return random_bits(key_B, stream, count).argsort(dim=1, stable=True)
