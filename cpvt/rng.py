"""Random numbers without a state: each is a function of a key and of whole numbers that count.

A draw names what it is for and which sample it belongs to: `uniform("flip", seed, epoch, position)`. The same
arguments give the same number on any process, in any order and on any device, so a batch that is drawn whole
and then cut among workers, processes and micro-batches stays the same batch.
"""

import hashlib
import math

import torch
from torch import Tensor

_POSITIVE = 2**63 - 1


def mix(counter: Tensor) -> Tensor:
    """The SplitMix64 hash (Steele, Lea and Flood 2014) of int64 tensors, whose products wrap around."""
    z = counter * (0x9E3779B97F4A7C15 - 2**64)
    z = (z ^ _shift(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ _shift(z, 27)) * (0x94D049BB133111EB - 2**64)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts drag the sign along; the hash wants zeros


def start(key: str) -> int:
    """A key -> the int64 at which its counting starts."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True)


def bits(key: str, *counters: int | Tensor) -> Tensor:
    """63 random bits for each combination of counters, which are broadcast: int64, 0 or more."""
    device = next((c.device for c in counters if isinstance(c, Tensor)), None)
    state = torch.tensor(start(key), device=device)
    for counter in counters:
        state = mix(state + counter)
    return state & _POSITIVE


def uniform(key: str, *counters: int | Tensor) -> Tensor:
    """Even in [0, 1), float64 with 53 random bits."""
    return (bits(key, *counters) >> 10).double() * 2.0**-53


def integers(key: str, sides: int | Tensor, *counters: int | Tensor) -> Tensor:
    """Even in 0 ... sides - 1, int64. (The bias of the remainder is below sides / 2^63.)"""
    return bits(key, *counters) % sides


def normal(key: str, *counters: int | Tensor) -> Tensor:
    """Standard normal, float64, by Box and Muller's transform of two even draws."""
    radius = (-2 * (1 - uniform(f"{key}/radius", *counters)).log()).sqrt()
    return radius * (2 * math.pi * uniform(f"{key}/angle", *counters)).cos()


def permutation(key: str, count: int, *counters: int) -> Tensor:
    """0 ... count - 1 in random order, int64 on the CPU."""
    return bits(key, *counters, torch.arange(count)).argsort(stable=True)
