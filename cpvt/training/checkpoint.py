"""What is on disk of a run: checkpoints to go on from, and the model to keep.

Everything is written aside, flushed to the disk and renamed, so that a kill or a full disk leaves what stood
there before. A checkpoint carries checksums; one whose bytes do not match them is passed over.
"""

import fcntl
import io
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cpvt.config import ModelConfig, TrainConfig, from_json, to_json
from cpvt.data.shards import new_folder
from cpvt.errors import ConfigError
from cpvt.model.vit import VisionTransformer


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """-> a path beside `path` to write to, which then takes its place, whole and on the disk, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        _flush(aside)
        os.replace(aside, path)
        _flush(path.parent)  # a rename is on the disk once its folder is
    finally:
        aside.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def only_run(folder: str | Path) -> Iterator[None]:
    """Keeps a folder ("": none) to one run until the block ends or the process dies. Raises ConfigError.

    A block that leaves nothing in it leaves no folder either.
    """
    if not folder:
        yield
        return
    with ExitStack() as stack:
        try:
            path = stack.enter_context(new_folder(Path(folder))) / ".lock"
            stack.enter_context(_locked(path))
        except OSError as error:
            taken = isinstance(error, BlockingIOError)
            reason = "another run is writing it" if taken else f"cannot be locked, {error.strerror}"
            raise ConfigError(f"run.out={str(folder)!r}: {reason}; give another folder") from None
        yield


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Creates a file and locks it until the block ends; then deletes it. BlockingIOError: another process has it.

    Nothing is written to it, and no link is followed, which may lead to a file that is more than a lock.
    """
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.lockf(
                number, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # unlike flock's, not shared with forked readers
        except PermissionError as error:  # as POSIX allows
            raise BlockingIOError from error
        if not os.path.samestat(os.fstat(number), os.stat(path)):  # another process has just deleted this one
            raise BlockingIOError
        try:
            yield
        finally:
            os.unlink(path)
    finally:
        os.close(number)


def save_model(path: str | Path, model: VisionTransformer, config: TrainConfig) -> None:
    """Writes weights and configuration as safetensors."""
    state = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    with _replacing(Path(path)) as aside:  # safetensors' own file has errors of its own on a full disk
        aside.write_bytes(save(state, metadata={"config": to_json(config)}))


def load_model(path: str | Path) -> tuple[VisionTransformer, TrainConfig]:
    """-> the model as it was saved, and its configuration. Raises ConfigError for a file that is not one."""
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            config = from_json(TrainConfig, (file.metadata() or {}).get("config", ""))
        check_shapes(config.model, state)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give a model of `cpvt train`") from None
    model = VisionTransformer(config.model)
    model.load_state_dict(state)
    return model.eval(), config


def check_shapes(config: ModelConfig, state: dict[str, Tensor]) -> None:
    """Raises ConfigError unless these are the weights of such a model."""
    with torch.device("meta"):  # shapes without memory
        own = {name: tensor.shape for name, tensor in VisionTransformer(config).state_dict().items()}
    if wrong := own.items() ^ {name: tensor.shape for name, tensor in state.items()}.items():
        raise ConfigError(f"{min(wrong)[0]} is not as its configuration says")


class Checkpoints:
    """The last `keep` checkpoints of a run, in a folder: step-000000012.pt and so on."""

    def __init__(self, folder: str | Path, keep: int = 3):
        self.folder, self.keep = Path(folder), keep

    def save(self, step: int, state: dict) -> Path:
        """Writes the state after `step` steps; raises OSError, the older ones untouched, if it cannot."""
        for left in self.folder.glob(".step-*"):  # by a process that was killed while writing
            left.unlink(missing_ok=True)
        buffer = io.BytesIO()  # torch.save by itself hides why it could not write
        torch.save(state, buffer)
        with _replacing(self._path(step)) as aside:
            aside.write_bytes(buffer.getbuffer())
        for old in [path for path in self._found() if path != self._path(step)][self.keep - 1 :]:
            old.unlink(missing_ok=True)
        return self._path(step)

    def latest(self, check: Callable[[dict], object] = bool) -> tuple[int, list[str]]:
        """-> the step of the newest whole one, 0 for none; names of newer, spoiled ones, which are renamed.

        Spoiled is also what `check` raises an error for.
        """
        spoiled = []
        for path in self._found():
            step = int(path.stem.removeprefix("step-"))
            with suppress(Exception):  # foreign content can raise anything
                if state := self.read(step):
                    check(state)
                    return step, spoiled
            path.rename(path.with_suffix(".spoiled"))
            spoiled.append(path.name)
        return 0, spoiled

    def read(self, step: int) -> dict | None:
        """-> the state after `step` steps; None where it is not there, or not whole."""
        try:
            with zipfile.ZipFile(self._path(step)) as archive:
                if archive.testzip():  # the checksums, which torch.save writes and torch.load ignores
                    return None
            return torch.load(self._path(step), map_location="cpu", weights_only=True)
        except Exception:  # a byte in the wrong place can raise anything
            return None

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}.pt"

    def _found(self) -> list[Path]:
        """The newest first."""
        return sorted(self.folder.glob("step-*.pt"), reverse=True)


def changed(one: TrainConfig, other: TrainConfig) -> dict[str, tuple]:
    """{"optim.lr": (its value in one, in the other)} and so on, for every option that differs."""
    found = {}
    for group, options in vars(one).items():
        for name, value in vars(options).items():
            if (there := getattr(getattr(other, group), name)) != value:
                found[f"{group}.{name}"] = value, there
    return found


def differences(own: TrainConfig, saved: TrainConfig, fingerprint: str = "") -> list[str]:
    """The options, as text, in which a saved run is another run than `own`: what changes no step may differ."""
    free = {"out", "log_every", "save_every", "keep_checkpoints", "evaluate_every", "device"}
    free |= {"compile", "workers", "decode", "root", "micro_batch_size", "skip_limit", "init", "weights"}
    free |= set() if fingerprint == "drawn" else {"name"}  # wherever images lie: their fingerprint says which
    apart = {name: pair for name, pair in changed(own, saved).items() if name.split(".")[1] not in free}
    return [f"{name}: {there!r} there, {here!r} here" for name, (here, there) in apart.items()]
