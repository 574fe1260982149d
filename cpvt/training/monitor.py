"""What a person sees of a run: a progress bar, a log of JSON lines, TensorBoard, and the faults of the data."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from cpvt.config import TrainConfig, to_json
from cpvt.data.loader import Batch


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
        self.faults: dict[str, str] = {}
        self.refused = 0  # images that the GPU did not decode
        self._board = None
        self._since = (time.perf_counter(), steps)
        if self.folder and chief:
            self._open(steps)
        total = config.optim.steps
        self._bar = tqdm(
            total=total, initial=steps, unit="step", disable=not (bar and chief and sys.stderr.isatty())
        )

    def _open(self, steps: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"config": json.loads(to_json(self.config))})]
        if steps and self._log.exists():
            entries = [entry for entry in map(_read, self._log.read_text().splitlines()[1:]) if entry]
            # The result stands at the end alone, and is measured again.
            kept = [entry for entry in entries if entry["step"] <= steps and "seconds" not in entry]
            self.history = [_lasting(entry) for entry in kept if "loss" in entry]
            lines += map(json.dumps, kept)
        aside = self._log.with_name(f".log.{os.getpid()}")
        aside.write_text("".join(f"{line}\n" for line in lines))
        aside.replace(self._log)
        if self.config.run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # half a second that only this option costs

            self._board = SummaryWriter(self.folder / "tensorboard", purge_step=steps + 1)

    @property
    def _log(self) -> Path:
        return self.folder / "log.jsonl"

    def step(self) -> None:
        """A step is done."""
        self._bar.update()

    def entry(self, entry: dict) -> None:
        """Logs an entry with the number of the step; with a loss, also the speed since the last one."""
        timed = dict(entry)
        if "loss" in entry:
            now, (before, step) = time.perf_counter(), self._since
            speed = (entry["step"] - step) * self.config.optim.batch / max(now - before, 1e-9)
            self._since = now, entry["step"]
            timed["images_per_s"] = float(f"{speed:.4g}")
            if self.refused:
                timed["gpu_refused"] = self.refused
            self.history.append(entry)
            self._bar.set_postfix_str(
                f"{speed:,.0f} images/s, loss {entry['loss']:.3f}, rate {entry['rate']:.2g}", refresh=False
            )
        self._write(timed)
        if self._board:
            for name, value in timed.items():
                if name not in ("step", "epoch"):
                    self._board.add_scalar(name, value, entry["step"])
        if self.report:
            self.report(timed if "loss" in entry else entry)

    def note(self, step: int, words: str) -> None:
        """A line for whoever reads the log or the screen."""
        self._write({"step": step, "note": words})
        if self.chief:
            tqdm.write(words, file=sys.stderr)

    def data(self, step: int, batch: Batch) -> None:
        """Names each unusable image once; every process writes its own to `out`/faults.jsonl."""
        self.refused += batch.refused
        for fault in batch.faults:
            if fault.key not in self.faults:
                self.faults[fault.key] = fault.reason
                if self.folder:
                    line = {
                        "step": step,
                        "image": fault.key,
                        "reason": fault.reason,
                        "instead": fault.replaced_by,
                    }
                    self.folder.mkdir(parents=True, exist_ok=True)
                    with open(self.folder / "faults.jsonl", "a") as file:
                        file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._bar.close()
        if self._board:
            self._board.close()

    def _write(self, entry: dict) -> None:
        if self.folder and self.chief:
            with open(self._log, "a") as file:
                file.write(json.dumps(entry) + "\n")


def _read(line: str) -> dict | None:
    """None for a line that was cut off by a kill."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _lasting(entry: dict) -> dict:
    return {name: value for name, value in entry.items() if name not in ("images_per_s", "gpu_refused")}
