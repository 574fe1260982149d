"""What a person sees of a run: what it will do, its log, its progress, and the images that could not be used."""

import dataclasses
import json
import sys
import textwrap
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

from torch import nn
from tqdm import tqdm

from cpvt.config import TrainConfig
from cpvt.data.decode import Fault
from cpvt.proven import verdicts
from cpvt.training.checkpoint import changed, replacing
from cpvt.training.distributed import World, say

CLOCK = {"images_per_s", "hours_left", "gpu_refused"}  # in a log entry: what another run may find otherwise


def describe(config: TrainConfig, model: nn.Module, loader, world: World) -> str:
    """What a run is going to do: its sizes, and the options that are not as they are by default."""
    sampler, parameters = loader.sampler, sum(p.numel() for p in model.parameters())
    options = [f"{name}={value}" for name, (value, _) in changed(config, TrainConfig()).items()]
    height, width = config.model.grid
    passed = f"files passed over by their names: {loader.passed_over}; " if loader.passed_over else ""
    text = f"{parameters:,} parameters, {height} x {width} tokens, {loader.num_classes} classes; "
    text += f"{sampler.distinct_images:,} images in {sampler.steps_per_epoch:,} steps an epoch; "
    text += f"{loader.micro_batches_per_step} micro-batches a step in {world.size} processes; "
    return textwrap.fill(f"{text}{passed}{', '.join(options)}", 110, break_long_words=False)


class Logger:
    """Writes `out`/log.jsonl and draws the bar; only the main process does either.

    entries: the lines so far, which a checkpoint keeps, so that a run which goes on has one log.
    report: called with each entry.
    """

    def __init__(self, config: TrainConfig, step: int, entries: list, world: World, report=None, bar=False):
        self.config, self.entries, self.world, self.report = config, entries, world, report
        self.folder = Path(config.run.out) if config.run.out else None
        self.faulty: set[str] = set()  # names of images that this process could not use
        self.refused = 0  # images that the GPU did not decode
        self._told_of_disk, self._torn = False, True  # torn: the log is not as `entries` has it
        self._told = set()  # of what proved right, or not
        self._first, self._since = step, (time.perf_counter(), step)
        if self.folder and world.is_main:
            self._write_log()
            if not step:
                (self.folder / "faults.jsonl").unlink(missing_ok=True)
        hidden = not (bar and world.is_main and sys.stderr and sys.stderr.isatty())
        self._bar = tqdm(total=config.optim.steps, initial=step, unit="step", disable=hidden)

    @property
    def history(self) -> list[dict]:
        """The entries with a loss, without what depends on the clock."""
        return [{k: v for k, v in e.items() if k not in CLOCK} for e in self.entries if "loss" in e]

    def step(self, step: int) -> None:
        self._bar.update()
        if step == self._first + 3:  # speed counts from here: the first steps compile, and take their memory
            self._since = time.perf_counter(), step

    def entry(self, entry: dict) -> None:
        """Logs an entry with the number of the step; with a loss, also the speed since the last one."""
        step = entry["step"]
        if "loss" in entry:
            seconds, steps = time.perf_counter() - self._since[0], step - self._since[1]
            self._since = time.perf_counter(), step
            if steps:
                left = (self.config.optim.steps - step) * seconds / steps / 3600
                speed = steps * self.config.optim.global_batch_size / seconds
                entry |= {"images_per_s": float(f"{speed:.4g}"), "hours_left": float(f"{left:.2g}")}
            entry |= {"gpu_refused": self.refused} if self.refused else {}
            if new := {name: how for name, how in verdicts.items() if name not in self._told}:
                self._keep({"step": step, "proven": new})
                self._told |= new.keys()
        self._keep(entry)
        if self.report and self.world.is_main:
            self.report(entry)

    def note(self, step: int, words: str) -> None:
        """A line for whoever reads the log or the screen."""
        self._keep({"step": step, "note": words})
        if self.world.is_main:
            say(words)

    def faults(self, step: int, faults: Iterable[Fault], refused: int = 0) -> None:
        """Names each unusable image once; every process writes its own to `out`/faults.jsonl."""
        self.refused += refused
        for fault in faults:
            if fault.key not in self.faulty:
                self.faulty.add(fault.key)
                line = {"step": step, "image": fault.key, "reason": fault.reason}
                self._write("faults.jsonl", line)

    def close(self) -> None:
        self._bar.close()

    def _keep(self, entry: dict) -> None:
        self.entries.append(entry)
        if self.world.is_main:
            self._write_log(entry)

    def _write_log(self, *more: dict) -> None:
        """Adds lines; or, at first and where lines were lost, writes all of them."""
        lines = [{"config": dataclasses.asdict(self.config)}, *self.entries]
        self._torn = not self._write("log.jsonl", *(lines if self._torn else more), anew=self._torn)

    def _write(self, name: str, *lines: dict, anew: bool = False) -> bool:
        """Lines more, if there is room for them: a full disk costs the log, and not the run."""
        if not self.folder:
            return True
        path, text = self.folder / name, "".join(json.dumps(line) + "\n" for line in lines)
        try:
            with replacing(path) if anew else nullcontext(path) as path, open(path, "a") as file:
                file.write(text)
        except OSError as error:
            if not self._told_of_disk:
                say(f"no room for {name} ({error}); the run goes on")
            self._told_of_disk = True
            return False
        return True
