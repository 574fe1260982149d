"""What is on disk of a run: checkpoints to go on from, and the model to keep.

Everything is written aside, flushed to the disk and renamed, so that a kill or a full disk leaves what stood
there before. A checkpoint carries checksums; one whose bytes do not match them is passed over.
"""

import dataclasses
import fcntl
import io
import json
import math
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.optim import Optimizer

from cpvt.config import ModelConfig, TrainConfig, from_json, replace, to_json
from cpvt.data.shards import new_folder
from cpvt.data.transforms import MEAN, STD
from cpvt.errors import ConfigError, nearest, typed
from cpvt.model.vit import VisionTransformer
from cpvt.model.zoo import MODELS, load_weights, read_weights
from cpvt.training.optim import freeze
from cpvt.training.recipes import deit


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
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
    opener = lambda name, flags: os.open(name, flags | os.O_CREAT | os.O_NOFOLLOW, 0o666)  # noqa: E731
    with open(path, "r+b", buffering=0, opener=opener) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not shared with forked readers
        except PermissionError as error:  # as POSIX allows
            raise BlockingIOError from error
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):  # it has just been deleted
            raise BlockingIOError
        try:
            yield
        finally:
            os.unlink(path)


class Saved(NamedTuple):
    """A trained model in evaluation mode, and what it takes to use it."""

    model: VisionTransformer
    config: TrainConfig
    classes: tuple[str, ...]  # their names; none where these are not known
    mean: tuple[float, ...] = MEAN  # of the images that it was trained on
    std: tuple[float, ...] = STD
    note: str = ""  # what is worth knowing of these weights


@typed
def save_model(path: str | Path, model: VisionTransformer, config: TrainConfig, classes: Iterable[str] = ()):
    """Writes weights, configuration, names of the classes and preprocessing as safetensors."""
    state = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    data = {name: getattr(config.data, name) for name in ("crop_pct", "interpolation")}
    data |= {"image_size": config.model.image_size, "mean": MEAN, "std": STD}
    about = {"classes": json.dumps([*classes]), "preprocessing": json.dumps(data)}
    with replacing(Path(path)) as aside:  # safetensors' own file has errors of its own on a full disk
        aside.write_bytes(save(state, metadata={"config": to_json(config), **about}))


@typed
def load_saved(source: str | Path, weights: str | Path = "") -> Saved:
    """A model.safetensors, a checkpoint of a run (step-*.pt), or the name of a model and a file of its weights.

    Of a checkpoint the average of the weights is taken, where the run keeps one. Raises UserError.
    """
    path = Path(source)
    if str(source) in MODELS:
        if not weights:
            words = "give a model.safetensors or step-*.pt; cpvt evaluate: or --weights FILE"
            raise ConfigError(f"{source} is the name of a model, without weights: {words}")
        return _named(str(source), weights)
    if weights:
        raise ConfigError(f"weights={str(weights)!r}: {source} has its own; give a model's name with them")
    if saved := _own(path):
        return saved
    words = "it is not what `cpvt train` wrote" if path.exists() else nearest(str(source), MODELS)
    raise ConfigError(f"{path} cannot be read ({words}); give a model.safetensors or a step-*.pt")


def _own(path: Path) -> Saved | None:
    """A model or a whole checkpoint of a run; None for any other file."""
    if path.suffix == ".pt":
        return _from_checkpoint(path)
    about = _metadata(path)
    if "config" not in about:
        return None
    try:
        seen, config = json.loads(about.get("preprocessing", "{}")), from_json(TrainConfig, about["config"])
        norm = tuple(seen.get("mean", MEAN)), tuple(seen.get("std", STD))
        check_shapes(config.model, state := load_file(path))
        model = load_weights(VisionTransformer(config.model), state).eval()
        return Saved(model, config, _classes(about), *norm)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:  # foreign content
        raise ConfigError(f"{path} cannot be read ({error}); give a model of `cpvt train`") from None


def _from_checkpoint(path: Path) -> Saved | None:
    with suppress(Exception):  # foreign content can raise anything
        state = read_state(path)
        config = from_json(TrainConfig, state["config"])
        check_shapes(config.model, state["model"])
        model, classes = VisionTransformer(config.model), tuple(state.get("classes", ()))
        freeze(model, config.run.freeze)  # of what is trained there is an average
        with warnings.catch_warnings(action="ignore"):
            load_weights(model, state)
        note = f"the {'average of the ' if state['ema'] else ''}weights after step {state['step']}"
        return Saved(model.eval(), config, classes, note=note)
    return None


def _named(name: str, weights: str | Path) -> Saved:
    """A model of the zoo, of the size and number of classes that the weights have; data as in DeiT's recipe."""
    model = MODELS[name]
    state = read_weights(weights, VisionTransformer(model))
    shapes = {key: value.shape for key, value in state.items() if isinstance(value, torch.Tensor)}
    if bias := shapes.get("head.bias"):
        model = replace(model, num_classes=bias[0])
    if len(table := shapes.get("pos_embed", ())) == 3:
        side = math.isqrt(max(table[1] - model.prefix_tokens, 1)) * model.patch_size
        model = replace(model, image_size=(side, side))
    config = TrainConfig(model=model, data=replace(deit(name).data, image_size=model.image_size))
    loaded = load_weights(VisionTransformer(model), state).eval()
    return Saved(loaded, config, _classes(_metadata(Path(weights))))


def start_from(model: VisionTransformer, path: str | Path, classes: tuple[str, ...]) -> str:
    """Loads the weights that a run begins with -> what became of the head; nothing where it is the file's, of the
    same classes. A head for another number of classes, or for others by name, stays as it was drawn. Raises
    UserError where the rest does not fit."""
    if saved := _own(Path(path)):
        state, names, grid = saved.model.state_dict(), saved.classes, saved.config.model.grid
    else:
        state, names, grid = read_weights(path, model), (), True
    own = {name: value for name, value in model.state_dict().items() if name.startswith("head")}
    bias, count = state.get("head.bias"), len(classes)
    there = len(bias) if isinstance(bias, torch.Tensor) else 0
    apart = first_difference(names, classes) if there == count else f"{there} classes there, {count} here"
    if apart:
        state = {name: value for name, value in state.items() if not str(name).startswith("head")} | own
    load_weights(model, state, resample=grid)
    kept = "" if names else "the head is kept; the names of its classes are not known"
    became = f"a new head is drawn ({apart})" if apart else kept
    return became and f"run.init={str(path)!r}: {became}"


def first_difference(there: Sequence[str], here: Sequence[str]) -> str:
    """The first class that has another name, in words; nothing where there is none, or names are not known."""
    pairs = enumerate(zip(there, here, strict=False))
    apart = ((i, a, b) for i, (a, b) in pairs if normalize("NFC", a) != normalize("NFC", b))
    return next((f"class {i} is {a!r} there, {b!r} here" for i, a, b in apart), "")


def _classes(about: dict[str, str]) -> tuple[str, ...]:
    return tuple(json.loads(about.get("classes", "[]")))


def _metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors; nothing for other files. Raises ConfigError."""
    if path.suffix != ".safetensors":
        return {}
    try:
        # safetensors calls what may not be read, missing.
        with path.open("rb"), safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give a model of `cpvt train`") from None


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
        with replacing(self._path(step)) as aside:
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
        return read_state(self._path(step))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}.pt"

    def _found(self) -> list[Path]:
        """The newest first."""
        return sorted(self.folder.glob("step-*.pt"), reverse=True)


def read_state(path: Path) -> dict | None:
    """A checkpoint -> what was saved; None where it is not there, or not whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # the checksums, which torch.save writes and torch.load ignores
                return None
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a byte in the wrong place can raise anything
        return None


def changed(one: TrainConfig, other: TrainConfig) -> dict[str, tuple]:
    """{"optim.lr": (its value in one, in the other)} and so on, for every option that differs."""
    a, b = (dataclasses.asdict(config) for config in (one, other))
    pairs = {f"{group}.{name}": (a[group][name], b[group][name]) for group in a for name in a[group]}
    return {name: (value, there) for name, (value, there) in pairs.items() if value != there}


def differences(own: TrainConfig, saved: TrainConfig, fingerprint: str = "") -> list[str]:
    """The options, as text, in which a saved run is another run than `own`: what changes no step may differ."""
    free = {"out", "log_every", "save_every", "keep_checkpoints", "evaluate_every", "device"}
    free |= {"compile", "workers", "decode", "root", "micro_batch_size", "skip_limit", "init", "weights"}
    free |= set() if fingerprint == "drawn" else {"name"}  # wherever images lie: their fingerprint says which
    apart = {name: pair for name, pair in changed(own, saved).items() if name.split(".")[1] not in free}
    return [f"{name}: {there!r} there, {here!r} here" for name, (here, there) in apart.items()]


def other_run(own: dict, saved: dict) -> list[str]:
    """In what the run of a saved state is another one than that of `own`, as text."""
    configs = (from_json(TrainConfig, state["config"]) for state in (own, saved))
    found = differences(*configs, own["fingerprint"])
    if saved["fingerprint"] != own["fingerprint"]:
        found.append("data: other training images there than here")
    if saved.get("teacher", own["teacher"]) != own["teacher"]:
        found.append("distill: other weights of the teacher there than here")
    return found


def check_state(saved: dict, own: dict, optimizer: Optimizer, average: Sequence[Tensor]) -> None:
    """Raises an error, of whatever kind, unless this is a state of the run that it says to be. `average`: of the
    weights, where this run keeps one."""
    check_shapes(from_json(TrainConfig, saved["config"]).model, saved["model"])
    if other_run(own, saved):
        return  # for which it is refused
    there, groups = saved["optimizer"], optimizer.param_groups
    sizes = [p.shape for group in groups for p in group["params"]]
    fits = [type(saved["step"]) is int, saved["losses"].ndim == 1, saved["skips"].shape == (2,)]
    fits += [type(entry["step"]) is int for entry in saved["log"]]
    fits += [sizes[i] == m["exp_avg"].shape == m["exp_avg_sq"].shape for i, m in there["state"].items()]
    lengths = [[len(group["params"]) for group in each] for each in (there["param_groups"], groups)]
    averages = [[a.shape for a in each] for each in (saved["ema"], average)]
    if not all(fits) or lengths[0] != lengths[1] or averages[0] != averages[1]:
        raise ValueError
