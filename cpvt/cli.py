"""The command line: cpvt train | evaluate | predict | pack | experiments | benchmark.

Options are fields of dataclasses, most of them of `cpvt.config`. What a command needs is imported when it runs:
help is there at once.
"""

import errno
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cpvt.errors import ConfigError, TrainingError, UserError, check_name

INTERRUPTED = 75  # exit status of a run that was stopped and can go on: the sysexits' "try again"
ABOUT_TRAINING = """Train a model.

--model NAME    deit_SIZE, cpvt_SIZE or cpvt_SIZE_5peg, SIZE tiny, small or base; then _gap or _distilled if wanted
--data NAME     where, arrangement, what (drawn); tiny-imagenet; a folder,
                with FOLDER/train/CLASS/*.JPEG and FOLDER/val/..., or what `cpvt pack` made of it
--recipe NAME   what the options below are by default:
{recipes}

With a folder for its results (--run.out), the same command goes on where it was stopped or killed.

Fine-tuning: --run.init FILE, a model of this command or a checkpoint of timm's or DeiT's; other classes get a new
head, and --run.freeze -1 trains the head alone.

All GPUs of a machine: torchrun --nproc-per-node gpu -m cpvt train ..."""


@dataclass(frozen=True)
class Start:
    """What the defaults of all other options of `cpvt train` follow from."""

    model: str = "cpvt_tiny"
    data: str = ""
    recipe: str = "plain"


def _train(arguments: list[str]) -> None:
    """Train a model: --model NAME --data NAME_OR_FOLDER --recipe NAME; everything else has a default."""
    import torch

    from cpvt.config import TrainConfig, replace
    from cpvt.training.distributed import Stopped, say
    from cpvt.training.recipes import RECIPES
    from cpvt.training.train import train

    start, rest = _parse(Start, arguments, "train", return_unknown_args=True, add_help=False)
    check_name("recipe", start.recipe, RECIPES)
    default = RECIPES[start.recipe](start.model)
    default = replace(default, data=replace(default.data, name=start.data or default.data.name))
    recipes = "\n".join(f"  {name:15} {build.__doc__.splitlines()[0]}" for name, build in RECIPES.items())
    about = ABOUT_TRAINING.format(recipes=recipes)
    config = _parse(TrainConfig, rest, "train", default=default, description=about)
    given = {arg.removeprefix("--").split("=")[0].replace("-", "_") for arg in rest if arg.startswith("--")}
    go_on = "the same command goes on from there" if config.run.out else "give --run.out to keep a run"
    try:
        run = train(config, report=_print_entry, announce=partial(say, name="stdout"), given=given)
    except Stopped as stop:
        if _is_main():
            say(f"stopped by {stop}; {go_on}", "stdout")
        raise SystemExit(INTERRUPTED) from None
    except (MemoryError, RuntimeError) as error:
        full = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not full:
            raise
        words = "give a smaller --optim.micro-batch-size, smaller images or a smaller model"
        raise TrainingError(f"the memory is full: {words}") from None
    if not _is_main():
        return
    where = f"; log, checkpoints and model in {config.run.out}" if config.run.out else "; nothing kept"
    if run.interrupted:
        say(f"stopped by {run.interrupted} after step {run.steps}{where}; {go_on}", "stdout")
        raise SystemExit(INTERRUPTED)
    faults = f", {run.faults} unusable images (faults.jsonl)" if run.faults else ""
    say(f"done: {run.steps} steps in {run.seconds:.0f} s{faults}{where}", "stdout")


def _print_entry(entry: dict) -> None:
    from cpvt.training.distributed import say

    say("  ".join(f"{k} {v:.5g}" if type(v) is float else f"{k} {v}" for k, v in entry.items()), "stdout")


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a trained model on held-out images, at any number of sizes."""

    checkpoint: Annotated[str, tyro.conf.Positional]  # model.safetensors, step-*.pt, or a model's name
    weights: str = ""  # with a model's name: file of weights, also timm's or DeiT's
    sizes: tuple[str, ...] = ()  # pixels (synthetic tasks: tokens), as 224 or 224x320; none: the trained one
    data: str = ""  # other data than it was trained on; of a model's name: the images
    root: str = ""  # folder of data sets known by name (default: that of its training)
    device: str = "auto"

    def __call__(self) -> None:
        from cpvt.config import DataConfig, replace
        from cpvt.data.loader import make_loader
        from cpvt.data.synthetic import CLASSES
        from cpvt.data.transforms import renormalise
        from cpvt.training.checkpoint import first_difference, load_saved
        from cpvt.training.distributed import pick_device
        from cpvt.training.evaluate import accuracy

        sizes, device = [_size(text) for text in self.sizes], pick_device(self.device)
        if self.weights and not (self.data or Path(self.checkpoint).exists()):
            raise ConfigError(f"{self.checkpoint}: its data is not known: give --data")
        saved = load_saved(self.checkpoint, self.weights)
        model, config, data = saved.model.to(device), saved.config, saved.config.data
        if self.data and not self.weights and (self.data in CLASSES) != (data.name in CLASSES):
            raise ConfigError(f"--data {self.data}: the model was trained on {data.name}: give such data")
        root = self.root or (DataConfig.root if self.data else data.root)
        data = replace(data, name=self.data or data.name, root=root, limit=0)
        if saved.note:
            print(saved.note)
        for size in sizes or (None,):
            change = {"grid" if data.name in CLASSES else "image_size": size} if size else {}
            loader = make_loader(replace(data, **change), seed=config.run.seed, device=device, train=False)
            if loader.num_classes != model.num_classes:
                words = f"{data.name} has {loader.num_classes} classes, the model {model.num_classes}"
                raise ConfigError(f"{words}: give --data with the classes of its training")
            if apart := first_difference(saved.classes, loader.classes):
                raise ConfigError(f"{data.name} has other classes: {apart}; give --data with the model's own")
            batches = ((renormalise(x, saved.mean, saved.std), labels) for x, labels in loader.eval_batches())
            scores = accuracy(model, batches, precision=config.run.precision)
            words = [f"{data.name} {loader.image_size[0]}x{loader.image_size[1]}"]
            words += [f"{name} {value:g}" for name, value in scores.items()]
            words += [f"{len(loader.unread)} unreadable images counted as wrong"] if loader.unread else []
            words += [f"every {data.hold_out}th training image"] if data.hold_out else []
            print("  ".join(words))


def _one_line(text: Any) -> str:
    """With what a name may hold and a terminal would obey, such as a new line, as it is written in Python."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: ascii(found[0])[1:-1], str(text))


def _size(text: str) -> tuple[int, int]:
    """ "224" or "224x320" -> (height, width)."""
    if not (found := re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)):
        raise ConfigError(f"--sizes {text!r}; expected one side, or height x width, as 224 or 224x320")
    return int(found[1]), int(found[2] or found[1])


@dataclass(frozen=True)
class Predict:
    """Say what is on single images: the best classes, by name and probability."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    model: str  # model.safetensors, or a run's step-*.pt
    top: int = 5  # classes an image
    attention: Path | None = None  # PNG to write: images, and what was attended to in the last block
    device: str = "auto"

    def __call__(self) -> None:
        from cpvt.errors import DataError
        from cpvt.training.checkpoint import load_saved
        from cpvt.training.distributed import pick_device
        from cpvt.training.predict import as_evaluated, draw_attention, predict

        if not self.images:
            raise ConfigError("no images; expected one image or more")
        if self.top < 1:
            raise ConfigError(f"--top {self.top}; expected 1 or more")
        if self.attention and (self.attention.suffix != ".png" or not self.attention.parent.is_dir()):
            raise ConfigError(f"--attention {self.attention}; expected NAME.png in a folder that is there")
        saved, shown, unread = load_saved(self.model), [], 0
        saved.model.to(pick_device(self.device))
        for path in self.images:
            try:
                pixels = as_evaluated(saved, path)
            except DataError as error:
                print(f"cpvt predict: {_one_line(error)}", file=sys.stderr)
                unread += 1
                continue
            guesses, attended = predict(saved, pixels, self.top)
            print(_one_line(f"{path}  {', '.join(f'{name} {p:.1%}' for name, p in guesses)}"))
            shown += [(pixels, attended)] if self.attention else []  # of many images, much memory
        if shown:
            draw_attention(self.attention, shown)
            token = saved.model.num_prefix_tokens
            words = "" if token else "; no class token, so bright is what the patches attend to on average"
            print(f"{self.attention}{words}")
        if unread:
            raise SystemExit(2)


@dataclass(frozen=True)
class Pack:
    """Prepare images for training: check every one, write shards of the originals."""

    source: Annotated[Path, tyro.conf.Positional]  # folder with train/ and val/, or ILSVRC2012's archives
    out: Annotated[Path, tyro.conf.Positional]  # gets OUT/train and OUT/val; then: cpvt train --data OUT
    splits: tuple[Literal["train", "val"], ...] = ("val", "train")  # one after the other
    partial: bool = False  # accept a part of ImageNet; else its thousand classes must have all their images
    workers: int = 0  # processes that decode; 0: one a core

    def __call__(self) -> None:
        from cpvt.data.pack import pack

        pack(**vars(self), report=lambda text: print(text, flush=True))


@dataclass(frozen=True)
class Experiments:
    """Measure what is missing of an experiment, a row at a time; without a name, list them."""

    name: Annotated[str, tyro.conf.Positional] = ""
    root: str = ""  # folder that holds the images (default: data/images)
    out: Path | None = None  # folder of NAME.jsonl (default: the repository's data/results)
    only: str = ""  # photographs: one of its tables: core, encodings, placement, ...
    grid: int = 0  # photographs: 8 (the default) or 14 tokens a side
    budget_minutes: float = 0.0  # start no row that would not be done by then, after a first one; 0: run all
    device: str = "auto"  # costs: cpu, cuda
    list: bool = False  # only say which rows the experiment has

    def __call__(self) -> None:
        from cpvt.lab.costs import cost_rows, measure_costs
        from cpvt.lab.experiments import EXPERIMENTS, jobs
        from cpvt.lab.photographs import TRAINED_ON, check_images, measure_baselines, one_thread
        from cpvt.lab.results import describe, results_folder
        from cpvt.lab.runner import run_missing
        from cpvt.training.distributed import pick_device

        known = {**EXPERIMENTS, "baselines": measure_baselines, "costs": measure_costs}
        if self.name:
            check_name("experiment", self.name, known)
        costs, which, how = self.name == "costs", ("root", "only", "grid"), ("out", "budget_minutes")
        given = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
        acting = {"": (), "baselines": ("root", "out"), "costs": (*how, "device")}
        acting = acting.get(self.name, (*which, *how))
        if self.list and self.name != "baselines":
            acting = "list", *(name for name in acting if name in which)
        if unfit := [name for name in given if name not in ("name", *acting)]:
            where = f"the experiment {self.name!r}" if self.name else "the list of experiments"
            where += ", listed," if self.list and self.name else ""
            raise ConfigError(f"{where} has no {', '.join(unfit)}: leave it out")
        given = {name: value for name, value in given.items() if name in which}
        if not self.name:
            return _list(known)
        if self.name == "baselines":
            return measure_baselines(self.root, self.out, _print_row)
        rows = cost_rows() if costs else jobs(self.name, **given)
        if self.list:
            return print(*(describe(row) if costs else row.label for row in rows), sep="\n")
        if self.name in TRAINED_ON:
            check_images(self.root, self.out)
            one_thread()
        if costs:
            left = measure_costs(self.out, pick_device(self.device), self.budget_minutes, _print_row)
        else:
            left = run_missing(rows, self.out, self.budget_minutes, _print_row)
        path = results_folder(self.out) / f"{self.name}.jsonl"
        print(f"{path}: {left} rows missing" if left else "nothing is missing")


def _list(known: dict[str, Any]) -> None:
    for name, work in known.items():
        print(f"  {name:15} {work.__doc__.splitlines()[0]}")


def _print_row(row, left: int) -> None:
    minutes = left * row.seconds / 60
    print(f"{row.label}: {row.seconds} s, {left} to go, about {minutes:.0f} minutes", flush=True)


def _benchmark(arguments: list[str]) -> None:
    """Measure training step and data pipeline beside timm's, in one run."""
    from cpvt.lab.benchmark import Benchmark

    _parse(Benchmark, arguments, "benchmark")()


COMMANDS = {"train": _train, "evaluate": Evaluate, "predict": Predict, "pack": Pack}
COMMANDS |= {"experiments": Experiments, "benchmark": _benchmark}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command. Exit status 0; 2 for wrong input, after a line on stderr that says what was wrong.

    What cannot be printed fails a command whose result is what it prints; training, and what the reader of a pipe
    (such as `head`) no longer wants, it does not.
    """
    for number, stream in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, stream) is None:  # closed: its number would go to the next file that is opened
            os.open(os.devnull, os.O_RDONLY)  # whoever prints fails, as if it were still closed
            setattr(sys, stream, open(number, "w" if number else "r", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every file's name is text
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        try:
            with _ended_by_signals():
                _run(name, rest)
        finally:
            if name == "train":
                _mute()
            sys.stdout.flush()
    except UserError as error:
        raise _refused(name, str(error)) from None
    except KeyboardInterrupt as stop:
        raise _refused(name, "interrupted", 128 + (stop.args or (signal.SIGINT,))[0]) from None
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        pass
    except OSError as error:
        unprinted = error.errno in (errno.ENOSPC, errno.EIO, errno.EBADF)
        if not (error.filename or unprinted):  # neither a path of the user's nor the output
            raise
        raise _refused(name, f"{error.filename or 'writing'}: {error.strerror}; give another path") from None
    finally:
        _mute()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does: what is half written is taken away again."""

    def end(number: int, _) -> None:
        raise KeyboardInterrupt(number)

    ours = threading.current_thread() is threading.main_thread()
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if ours and signal.getsignal(n) == signal.SIG_DFL]
    before = {n: signal.signal(n, end) for n in numbers}  # SIGHUP is another's under nohup
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def _run(name: str, rest: list[str]) -> None:
    if name in ("-h", "--help"):
        print("usage: cpvt COMMAND [options]   (cpvt COMMAND --help says more)\n")
        return _list(COMMANDS)
    check_name("command", name, COMMANDS)
    run, home = COMMANDS[name], os.path.expanduser("~")
    rest = [re.sub(r"^(--[^=]+=)?~(?=/|$)", rf"\g<1>{home}", word) for word in rest]  # a shell leaves --x=~
    _parse(run, rest, name)() if isinstance(run, type) else run(rest)


def _mute() -> None:
    """Drops what cannot be printed, which Python would try again at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _refused(name: str, reason: str, status: int = 2) -> SystemExit:
    """One line on stderr, by one process of many, and an exit status."""
    if _is_main():
        with suppress(OSError):
            print(f"cpvt {name}: {_one_line(' '.join(reason.split()))}", file=sys.stderr)
    return SystemExit(status)


def _is_main() -> bool:
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))  # set by torchrun, or nonsense
    return not (rank.isdecimal() and size.isdecimal() and 0 < int(rank) < int(size))


def _parse(cls: type, arguments: list[str], name: str, **options) -> Any:
    """The arguments as a `cls`. A configuration says itself what is wrong with its values; of all else tyro does,
    and leaves with status 2."""
    call = partial(tyro.cli, cls, args=arguments, prog=f"cpvt {name}", **options)
    try:
        with redirect_stderr(io.StringIO()):
            return call(console_outputs=False)
    except SystemExit as stop:
        cause = stop
        while cause := cause.__context__:
            if isinstance(cause, UserError):
                raise cause from None
    return call(console_outputs=_is_main())
