"""What a person sees of a run: a progress bar, a log of JSON lines, TensorBoard, and the faults of the data."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from cpvt.config import TrainConfig, to_json
from cpvt.data.decode import Fault
from cpvt.training.distributed import World


class Monitor:
    """Writes `out`/log.jsonl (and TensorBoard's files) and draws the bar; only the chief does either.

    A run that goes on drops the entries behind the step it goes on from: the log of an interrupted run ends up
    as that of one which never stopped.
    """

    def __init__(
        self,
        config: TrainConfig,
        steps: int,
        chief: bool = True,
        report: Callable[[dict], None] | None = None,
        bar: bool = False,
    ):
        self.config, self.report, self.chief = config, report if chief else None, chief
        self.folder = Path(config.run.out) if config.run.out else None
        self.history: list[dict] = []  # entries with a loss, as `report` heard them
        self.faults: set[str] = set()  # names of images that could not be used, in this process
        self.refused = 0  # images that the GPU did not decode
        self.mute = False  # whether the log could not be written, and a person was told
        self._board = None
        self._since = (time.perf_counter(), steps)
        if self.folder and chief:
            self._open(steps)
        total = config.optim.steps
        self._bar = tqdm(
            total=total, initial=steps, unit="step", disable=not (bar and chief and sys.stderr.isatty())
        )

    def _open(self, steps: int) -> None:
        """Puts log and faults at the step that the run begins with, or goes on from."""
        config = {"config": json.loads(to_json(self.config))}
        # What was evaluated at this very step is evaluated again.
        kept = [
            entry
            for entry in self._entries("log.jsonl")
            if entry["step"] < steps or (entry["step"] == steps and "top1" not in entry)
        ]
        self.history = [_lasting(entry) for entry in kept if "loss" in entry] if steps else []
        self._replace("log.jsonl", [config, *(kept if steps else [])])
        faults = [entry for entry in self._entries("faults.jsonl") if steps and entry["step"] <= steps]
        self.faults = {entry["image"] for entry in faults}
        self._replace("faults.jsonl", faults)
        if self.config.run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # half a second that only this option costs

            self._board = SummaryWriter(self.folder / "tensorboard", purge_step=steps + 1)

    def step(self) -> None:
        """A step is done."""
        self._bar.update()

    def entry(self, entry: dict) -> None:
        """Logs an entry with the number of the step; with a loss, also the speed since the last one."""
        timed = dict(entry)
        if "loss" in entry:
            now, (before, step) = time.perf_counter(), self._since
            speed = (entry["step"] - step) * self.config.optim.global_batch_size / max(now - before, 1e-9)
            self._since = now, entry["step"]
            timed["images_per_s"] = float(f"{speed:.4g}")
            if self.refused:
                timed["gpu_refused"] = self.refused
            self.history.append(entry)
            words = f"{speed:,.0f} images/s, loss {entry['loss']}, rate {entry['rate']:.2g}"
            self._bar.set_postfix_str(words, refresh=False)
        self._write(timed)
        if self._board:
            with contextlib.suppress(OSError):
                for name in timed.keys() - {"step"}:
                    if timed[name] is not None:
                        self._board.add_scalar(name, timed[name], entry["step"])
        if self.report:
            self.report(timed if "loss" in entry else entry)

    def note(self, step: int, words: str) -> None:
        """A line for whoever reads the log or the screen."""
        self._write({"step": step, "note": words})
        if self.chief:
            tqdm.write(words, file=sys.stderr)

    def data(self, step: int, faults: Iterable[Fault], refused: int = 0) -> None:
        """Names each unusable image once; every process writes its own to `out`/faults.jsonl."""
        self.refused += refused
        for fault in faults:
            if fault.key not in self.faults:
                self.faults.add(fault.key)
                line = {
                    "step": step,
                    "image": fault.key,
                    "reason": fault.reason,
                    "instead": fault.replaced_by,
                }
                self._append("faults.jsonl", line)

    def count_faults(self, world: World) -> int:
        """Unusable images so far, those of an earlier part of the run and of other processes included."""
        mine = int(world.sum(torch.tensor(len(self.faults), device=world.device)))
        return len({entry["image"] for entry in self._entries("faults.jsonl")}) if self.folder else mine

    def close(self) -> None:
        self._bar.close()
        if self._board:
            self._board.close()

    def _write(self, entry: dict) -> None:
        if self.chief:
            self._append("log.jsonl", entry)

    def _append(self, name: str, entry: dict) -> None:
        """A line more, if there is room for it: a full disk costs the log, and not the run."""
        if not self.folder:
            return
        try:
            with open(self.folder / name, "a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            if not self.mute:
                tqdm.write(
                    f"{self.folder / name} cannot be written ({error}); the run goes on", file=sys.stderr
                )
            self.mute = True

    def _entries(self, name: str) -> list[dict]:
        path = self.folder / name
        lines = path.read_text().splitlines() if path.exists() else []
        return [entry for entry in map(_read, lines) if entry and "config" not in entry]

    def _replace(self, name: str, entries: list[dict]) -> None:
        aside = self.folder / f".{name}.{os.getpid()}"
        aside.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        aside.replace(self.folder / name)


def _read(line: str) -> dict | None:
    """None for a line that was cut off by a kill."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _lasting(entry: dict) -> dict:
    return {name: value for name, value in entry.items() if name not in ("images_per_s", "gpu_refused")}
