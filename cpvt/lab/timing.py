"""Stop-watches, and the training step that they time.

Machines are shared and their clocks wander: what is compared is timed in rounds, everything once in each, and
every round gives a ratio of its own.

Letters: B images of a batch, K classes, S side of an image in pixels.
"""

import math
import random
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from statistics import median

import torch
from scipy.stats import quantile_test
from torch import Tensor, nn

from cpvt.config import ModelConfig
from cpvt.errors import ConfigError
from cpvt.model.vit import VisionTransformer
from cpvt.training.loss import cross_entropy
from cpvt.training.optim import add_up_biases, param_groups

# --------------------------------------------------------------------------- stop-watches


def deadline(budget_minutes: float, clock: Callable[[], float] = time.monotonic) -> float:
    """What the clock will show when a budget is spent (0: no limit). Raises ConfigError where it is none."""
    if not 0 <= budget_minutes < math.inf:
        raise ConfigError(f"budget_minutes={budget_minutes:g}: give minutes, or 0 for no limit")
    return clock() + (60 * budget_minutes or math.inf)


def until(end: float, items: Iterable, clock: Callable[[], float] = time.monotonic) -> Iterator:
    """The items, for work on one after the other: the first, then each that would be done by `end` if it took as
    long as the longest so far."""
    longest = 0.0
    for item in items:
        started = clock()
        if longest and started + longest > end:
            return
        yield item
        longest = max(longest, clock() - started)


def wait(device: str) -> None:
    if "cuda" in device:
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], device: str, times: int = 1, warm: int = 0) -> float:
    """Seconds of one call, the mean of `times` in a row; `warm` calls before are not counted."""
    for _ in range(warm):
        work()
    wait(device)
    started = time.perf_counter()
    for _ in range(times):
        work()
    wait(device)
    return (time.perf_counter() - started) / times


def in_rounds(measures: dict[Hashable, Callable[[], float]], rounds: int) -> dict[Hashable, list[float]]:
    """Each measure once a round, in an order drawn anew: who follows whom must not count."""
    found = {name: [] for name in measures}
    for number in range(rounds):
        for name in random.Random(number).sample(list(measures), len(measures)):
            found[name].append(measures[name]())
    return found


def ratios(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(values, others, strict=True)]


def summary(name: str, values: Sequence[float]) -> dict[str, float]:
    """Metrics: the median over rounds as `name`, the extremes as /min and /max; from six values on also a 95 %
    interval of the median by the sign test, as /low and /high."""
    found = {name: median(values), f"{name}/min": min(values), f"{name}/max": max(values)}
    if len(values) > 5:
        interval = quantile_test(values).confidence_interval(0.95)
        found |= {f"{name}/low": float(interval.low), f"{name}/high": float(interval.high)}
    return found


# --------------------------------------------------------------------------- what is timed


def noise(config: ModelConfig, batch_size: int, device: str) -> tuple[Tensor, Tensor]:
    """Images (B, 3, S, S) and soft targets (B, K), always the same."""
    dice = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, config.in_channels, *config.image_size, generator=dice)
    targets = (4 * torch.randn(batch_size, config.num_classes, generator=dice)).softmax(-1)
    return images.to(device), targets.to(device)


class Step:
    """A training step, or a forward pass, as in training: AdamW, and bf16 on a GPU. Calling it does one.

    `mode`: "eager", or what torch.compile knows: "default", "reduce-overhead", ... The model comes from a CPU.
    """

    def __init__(self, model: nn.Module, device: str, mode: str = "eager", training: bool = True):
        self.device, self.mode, self.held = device, mode, torch.cuda.memory_allocated()
        self.model = model.to(device).train(training)
        self.autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled="cuda" in device)
        groups = param_groups(model, 0.05)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True) if training else None
        if "cuda" in device and isinstance(model, VisionTransformer):
            add_up_biases(model)
        if mode != "eager":
            model.compile(mode=mode)

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """Images (B, 3, S, S), soft targets (B, K) -> logits (B, K)."""
        scale = ()  # ours takes the factors of its drop path from the loop; timm's draws them itself
        if self.optimizer and isinstance(self.model, VisionTransformer) and self.model.config.drop_path:
            draws = torch.rand(len(self.model.blocks), 2, len(images), device=images.device)
            scale = (self.model.drop_path_scale(draws),)
        if self.mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()  # what the last replay returned may be overwritten
        with self.autocast, torch.set_grad_enabled(self.optimizer is not None):
            logits = self.model(images, *scale)
        if self.optimizer:
            cross_entropy(logits.float(), targets).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return logits

    def settle(self, *batch: Tensor) -> dict[str, float]:
        """Compiles, takes the memory that it keeps -> `first_s`, seconds of the first call, and on a GPU
        `gigabytes`, the most that a later one needs, model and optimiser included."""
        # Ten models are ten graphs of one function: beyond eight, by default, they are left eager with a warning.
        with torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):
            facts = {"first_s": seconds_of(partial(self, *batch), self.device)}
            self(*batch)
        if "cuda" in self.device:
            torch.cuda.reset_peak_memory_stats()
            self(*batch)
            facts["gigabytes"] = (torch.cuda.max_memory_allocated() - self.held) / 1e9
        return facts
