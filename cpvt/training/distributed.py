"""One process or many: who this one is, and the few things that all must agree on."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import count
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cpvt.errors import ConfigError, DataError

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # SLURM announces the end of a job with SIGUSR1


@dataclass
class World:
    """The processes of a run. Without torchrun there is one, and nothing is sent."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    control: object = None  # a group on the CPU: agreeing on a signal must not wait for the GPU

    @property
    def chief(self) -> bool:
        """The one that writes and speaks."""
        return self.rank == 0

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over all processes, in place; on a GPU the host does not wait."""
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers

    def any(self, mine: bool) -> bool:
        """Whether it holds for one process at least: the same answer in all of them."""
        if self.size == 1:
            return mine
        flag = torch.tensor(int(mine))
        dist.all_reduce(flag, dist.ReduceOp.MAX, self.control)
        return bool(flag)

    def told(self, what: str) -> str:
        """What the chief says, in all processes."""
        if self.size == 1:
            return what
        told = [what]
        dist.broadcast_object_list(told, 0, self.control)
        return told[0]

    def first(self, work: Callable[[], T]) -> T:
        """`work()`, by the chief before the others: they find what it downloads, and its refusal is theirs."""
        done, refusal = None, ""
        if self.chief:
            try:
                done = work()
            except (ConfigError, DataError) as error:
                refusal, raised = str(error), error
        if refusal := self.told(refusal):
            raise raised if self.chief else ConfigError(refusal)
        return done if self.chief else work()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over the processes."""
        if self.size == 1:
            return model
        device_ids = [torch.device(self.device)] if "cuda" in self.device else None
        # PyTorch counts the strides of a depthwise kernel's middle axis, which has one entry, as another layout.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        # The weights are equal at the start (same seed) and stay so: nothing but gradients is ever sent.
        return nn.parallel.DistributedDataParallel(
            model, device_ids, forward_sync_buffers=False, gradient_as_bucket_view=True
        )


@contextlib.contextmanager
def join_world(device: str) -> Iterator[World]:
    """Joins the processes that torchrun started, on `device` ("cpu" or "cuda"); leaves them at the end."""
    size, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local} of this node, but {torch.cuda.device_count()} GPUs: "
                "give torchrun --nproc-per-node that number"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    if size == 1:
        yield World(device=device)
        return
    backend = "nccl" if "cuda" in device else "gloo"
    dist.init_process_group(
        backend, store=_store(), rank=rank, world_size=size, timeout=timedelta(minutes=10)
    )
    try:
        yield World(rank, size, device, dist.new_group(backend="gloo", timeout=timedelta(minutes=10)))
    finally:
        dist.destroy_process_group()


_joined = count()


@cache
def _meeting_point() -> dist.Store:
    store, *_ = next(iter(dist.rendezvous("env://")))
    return store


def _store() -> dist.Store:
    """Where the processes find each other: a room of its own each time, free of what an earlier run left there."""
    # The store outlives the processes of an attempt.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"cpvt, attempt {attempt}, run {next(_joined)}", _meeting_point())


class Stopped(RuntimeError):
    """A signal came before the end; nothing of what was under way is kept."""


class SignalHandler:
    """Notes a signal and lets the step end. A second Ctrl-C is as deadly as ever; torchrun and the kernel may well
    send the same SIGTERM twice."""

    def __init__(self):
        self.name, self._before = "", {}

    def __enter__(self) -> SignalHandler:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
