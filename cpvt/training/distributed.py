"""One process or many: who this one is, and the few things that all must agree on."""

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from cpvt.data.loader import SIGNALS
from cpvt.errors import ConfigError, UserError


class Stopped(KeyboardInterrupt):
    """A signal came before there was anything to keep. It is no Exception: nobody takes it for a damaged file."""


def say(text: str, name: str = "stderr") -> None:
    """Prints a line above the bar. What nobody can read (a closed pipe, a full disk, a terminal that is gone) is
    left unsaid: no run ends for that."""
    with suppress(OSError, ValueError, AttributeError):
        tqdm.write(text, file=getattr(sys, name))
        getattr(sys, name).flush()


class SignalHandler:
    """Notes the name of a signal, and lets the step end; raises Stopped as long as it is `urgent`, since nothing
    is lost. A second Ctrl-C is as deadly as ever."""

    def __init__(self):
        self.name, self.urgent, self._before = "", True, {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()  # nohup
            self._before = {n: signal.signal(n, self._note) for n in SIGNALS if n not in ignored}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
        if self.urgent:
            raise Stopped(f"{self.name} before the first step was done")


@dataclass
class World:
    """The processes of a run. Without torchrun there is one, and nothing is sent.

    store    where they leave word for each other: a wait has no time limit, but ends at a signal or with the store
    control  a group on the CPU: agreeing on a signal must not wait for the GPU
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    signals: SignalHandler = field(default_factory=SignalHandler)
    store: dist.Store | None = None
    control: dist.ProcessGroup | None = None
    broadcasts: int = 0  # so far

    @property
    def is_main(self) -> bool:  # the one that writes and speaks
        return self.rank == 0

    def connect(self) -> None:
        """Opens the groups that tensors are sent through. NCCL starts threads, so whatever forks comes before."""
        if self.size == 1:
            return
        if "cuda" in self.device:
            torch.cuda.set_device(self.device)
        self.store.add("here", 1)
        self._wait(lambda: self.store.add("here", 0) == self.size)
        limit = {"timeout": timedelta(minutes=10)}
        backend = "nccl" if "cuda" in self.device else "gloo"
        dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.size, **limit)
        self.control = dist.new_group(backend="gloo", **limit)

    def broadcast(self, text: str = "") -> str:
        """What the main process says, in all of them: the others wait for as long as it takes."""
        if self.size == 1:
            return text
        self.broadcasts += 1
        key = f"broadcast {self.broadcasts}"
        if self.is_main:
            self.store.set(key, text)
        self._wait(lambda: self.store.check([key]))
        return self.store.get(key).decode()

    def _wait(self, until: Callable[[], bool]) -> None:
        while not until():
            if self.signals.name:  # from torchrun, where another process has died
                raise Stopped(f"{self.signals.name} while waiting for the other processes")
            time.sleep(0.1)

    def main_first(self, work: Callable[[], Any]) -> Any:
        """`work()`, by the main process before the others: these find what it downloads, and fail if it fails."""
        if not self.is_main:
            if failure := self.broadcast():
                raise ConfigError(failure)
            return work()
        try:
            done = work()
        except BaseException as error:
            self.broadcast(str(error) if isinstance(error, UserError) else f"process 0: {error!r}")
            raise
        self.broadcast()
        return done

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over all processes, in place; on a GPU the host does not wait."""
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers

    def any(self, mine: bool) -> bool:
        """Whether it holds for one process at least: the same answer in all of them."""
        found = torch.tensor(int(mine))
        if self.size > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX, self.control)
        return bool(found)

    def stopped(self) -> bool:  # whether a signal has come to one of the processes
        return self.any(bool(self.signals.name))

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over the processes."""
        if self.size == 1:
            return model
        devices = [torch.device(self.device)] if "cuda" in self.device else None
        # PyTorch counts the strides of a depthwise kernel's middle axis, which has one entry, as another layout.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        # The weights are equal at the start (same seed) and stay so: nothing but gradients is ever sent.
        options = {"forward_sync_buffers": False, "gradient_as_bucket_view": True}
        return nn.parallel.DistributedDataParallel(model, devices, **options)


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Finds the processes that torchrun started, on `device` ("cpu" or "cuda"); leaves them at the end."""
    given = {name: os.environ.get(name, "0") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    size, rank, local = (int(text) if text.isdecimal() else -1 for text in given.values())
    if min(size, rank, local) < 0 or rank >= max(size, 1):
        words = ", ".join(f"{name}={text!r}" for name, text in given.items())
        raise ConfigError(f"{words}, not as torchrun sets them: start with torchrun, or unset them")
    _check_slurm()
    with SignalHandler() as signals:
        if size <= 1:
            yield World(device=device, signals=signals)
            return
        if device == "cuda" and local >= torch.cuda.device_count():
            raise ConfigError(f"process {local} of this node has no GPU: give torchrun --nproc-per-node gpu")
        device = f"cuda:{local}" if device == "cuda" else device
        # A room of its own for each run of these processes, since the store outlives both.
        room = f"cpvt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}.{next(_runs)}"
        with warnings.catch_warnings():  # which `wrap` has a word with
            try:
                yield World(rank, size, device, signals, dist.PrefixStore(room, _rendezvous()))
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()


def _check_slurm() -> None:
    """srun alone starts every task as a run of its own, which would write the same files. Raises ConfigError."""
    names = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"
    task, step, tasks = (os.environ.get(name, "") for name in names)
    if task and int(step or tasks or 1) > 1 and "WORLD_SIZE" not in os.environ:
        words = f"task {task} of SLURM's {step or tasks} trains the whole run by itself: start one torchrun a node"
        if task != "0" or step:
            raise ConfigError(words)
        say(words)  # a batch script is task 0, and of no step


_runs = count()


@cache
def _rendezvous() -> dist.Store:
    try:
        return next(iter(dist.rendezvous("env://")))[0]
    except (ValueError, dist.DistError) as error:
        words = str(error).splitlines()[0].rpartition("rendezvous: ")[2]
        raise ConfigError(f"the processes cannot meet ({words}): start them with torchrun") from None


def pick_device(name: str) -> str:
    """ "auto" -> "cuda" where there is one, else "cpu". Raises ConfigError for a device that is not here."""
    here = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    if name not in ("auto", *here):
        raise ConfigError(f"device={name!r}; expected auto or what PyTorch sees here: {', '.join(here)}")
    return here[-1] if name == "auto" else name
