"""What is on disk of a run: checkpoints to go on from, and the model to keep.

Everything is written aside, flushed to the disk and renamed, so that a kill or a full disk leaves what stood
there before. A checkpoint carries the hash of its bytes in its name; one that does not match is passed over.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cpvt.config import TrainConfig, from_json, to_json
from cpvt.errors import ConfigError
from cpvt.model.vit import VisionTransformer

_NAME = re.compile(r"step-(\d{9})\.([0-9a-f]{16})\.pt")


@contextmanager
def _aside(path: Path):
    """-> a path beside `path` to write to, which then takes its place, whole and on the disk, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        _flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    """A rename is on the disk once its folder is."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write(data, path: Path) -> None:
    with open(path, "wb") as file:
        file.write(data)


# --------------------------------------------------------------------------- the model


def save_model(path: str | Path, model: VisionTransformer, config: TrainConfig) -> Path:
    """Writes weights and configuration as safetensors."""
    path = Path(path)
    state = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    with _aside(path) as aside:
        save_file(state, aside, metadata={"config": to_json(config)})
    return path


def load_model(path: str | Path) -> tuple[VisionTransformer, TrainConfig]:
    """-> the model as it was saved, and its configuration. Raises ConfigError for a file that is not one."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata, state = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a model saved by `cpvt train`") from None
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path}: not a safetensors file ({error}); expected one saved by `cpvt train`"
        ) from None
    if "config" not in metadata:
        raise ConfigError(f"{path}: carries no configuration; expected a model saved by `cpvt train`")
    config = from_json(TrainConfig, metadata["config"])
    model = VisionTransformer(config.model)
    model.load_state_dict(state, strict=True)
    return model.eval(), config


# --------------------------------------------------------------------------- checkpoints


class Checkpoints:
    """The last `keep` checkpoints of a run, in a folder; without a folder, none."""

    def __init__(self, folder: str | Path, keep: int = 3):
        self.folder, self.keep = Path(folder) if str(folder) else None, keep

    def save(self, step: int, state: dict) -> Path:
        """Writes the state after `step` steps; raises OSError, the older ones untouched, if it cannot."""
        buffer = io.BytesIO()  # in memory first, so that the hash is that of what should be written
        torch.save(state, buffer)
        data = buffer.getbuffer()
        path = self.folder / f"step-{step:09d}.{hashlib.sha256(data).hexdigest()[:16]}.pt"
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".step-*"):  # by a process that was killed while writing
            left.unlink(missing_ok=True)
        with _aside(path) as aside:
            write(data, aside)
        for old in [found for found in self._found() if found != path][self.keep - 1 :]:
            old.unlink(missing_ok=True)
        return path

    def latest(self, spoiled: Callable[[Path], None] | None = None) -> tuple[int, dict] | None:
        """-> (steps taken, state) of the newest one whose bytes match its name; None where there is none.

        The others are renamed, out of the way of what is saved from now on; `spoiled` hears of them.
        """
        for path in self._found():
            if found := self.read(path.name):
                return found
            path.rename(path.with_name(f"spoiled-{path.name}"))
            if spoiled:
                spoiled(path)
        return None

    def read(self, name: str) -> tuple[int, dict] | None:
        """-> (steps taken, state) of the checkpoint of that name; None where it is not there, or not whole."""
        step, digest = _NAME.fullmatch(name).groups()
        try:
            data = (self.folder / name).read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest()[:16] != digest:
            return None
        return int(step), torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)

    def name_of(self, steps: int) -> str:
        """The file name of the newest checkpoint after so many steps."""
        return next(path.name for path in self._found() if int(_NAME.fullmatch(path.name)[1]) == steps)

    def lock(self) -> None:
        """Keeps the run to one writer, for as long as this process lives. Raises ConfigError for a second one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder.parent / ".lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"run.out={str(self.folder.parent)!r} is being written by another run: wait for it, or give "
                "another folder"
            ) from None

    def _found(self) -> list[Path]:
        """The newest first."""
        if not self.folder or not self.folder.is_dir():
            return []
        return sorted((path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def differences(own: TrainConfig, saved: TrainConfig, drawn: str = "") -> list[str]:
    """The fields, as text, in which a saved run is another run than `own`: what changes no step may differ.

    `drawn`: the fingerprint of the data; "drawn" for diagnostics, which are known by their configuration.
    """
    free = {"out", "log_every", "save_every", "keep_checkpoints", "evaluate_every", "tensorboard", "device"}
    free |= {"compile", "workers", "decode", "root", "micro_batch_size", "skip_limit"}
    free |= {"init", "weights"}
    if drawn != "drawn":
        free |= {"name"}  # wherever the images lie: they are known by their fingerprint
    found = []
    for group in ("model", "data", "augment", "optim", "distill", "run"):
        one, other = vars(getattr(own, group)), vars(getattr(saved, group))
        found += [
            f"{group}.{name}: {other[name]!r} there, {value!r} here"
            for name, value in one.items()
            if name not in free and value != other[name]
        ]
    return found
