"""Handing work to a device without waiting for it, and with few passes over its memory."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU -> the device. (Blocking, PyTorch would wait for all that a GPU has queued.)"""
    return tensor.to(device, non_blocking=True)


def fused(function: Callable, compile: bool, pixels: Tensor, *others: Tensor) -> Tensor:
    """`function(pixels, *others)`, compiled where `pixels` lie on a GPU: one pass instead of one an operation."""
    return (_compiled(function) if compile and pixels.is_cuda else function)(pixels, *others)


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)  # how many images get an operation differs from call to call
