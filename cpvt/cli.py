"""The command line: cpvt train | evaluate | pack | export | experiments.

Options are the fields of the configurations in `cpvt.config`; wrong input gives one line and exit status 2.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm

from cpvt.config import TrainConfig, to_json
from cpvt.data.loader import open_batches
from cpvt.data.pack import Expected, pack
from cpvt.errors import ConfigError, DataError, ResultsError, nearest
from cpvt.lab.benchmark import Benchmark
from cpvt.lab.costs import cost_config, cost_rows, measure_costs
from cpvt.lab.experiments import EXPERIMENTS, jobs
from cpvt.lab.results import Result, describe, results_folder
from cpvt.lab.runner import run_missing
from cpvt.training.checkpoint import load_model
from cpvt.training.distributed import World
from cpvt.training.evaluate import accuracy
from cpvt.training.recipes import RECIPES
from cpvt.training.setup import PRECISIONS, pick_device
from cpvt.training.train import train

INTERRUPTED = 75  # exit status of a run that was stopped and can go on: the sysexits' "try again"


def _train(arguments: list[str]) -> None:
    """Train a model: --model NAME --data NAME_OR_FOLDER --recipe NAME; everything else has a default."""
    model, arguments = _take("--model", arguments, "cpvt_tiny")
    data, arguments = _take("--data", arguments, TrainConfig().data.name)
    recipe, arguments = _take("--recipe", arguments, "plain")
    if recipe not in RECIPES:
        raise ConfigError(f"no recipe {recipe!r}; {nearest(recipe, RECIPES)}")
    default = RECIPES[recipe](model)
    default = replace(default, data=replace(default.data, name=data))
    config = _parse(
        TrainConfig,
        arguments,
        "cpvt train",
        default=default,
        description=_about_training(),
    )
    run = train(config, report=_print_entry, announce=print)
    if os.environ.get("RANK", "0") != "0":
        return
    where = f"; log, checkpoints and model in {config.run.out}" if config.run.out else "; nothing kept"
    if run.interrupted:
        go_on = "the same command goes on from there" if config.run.out else "give --run.out to keep a run"
        print(f"stopped by {run.interrupted} after step {run.steps}{where}; {go_on}")
        raise SystemExit(INTERRUPTED)
    faults = f", {run.faults} unusable images (faults.jsonl)" if run.faults else ""
    scores = "  ".join(f"{name} {value:g}" for name, value in run.metrics.items())
    print(f"done: {run.steps} steps in {run.seconds:.0f} s  {scores}{faults}{where}")


def _about_training() -> str:
    """What `cpvt train --help` begins with."""
    recipes = [
        f"  {name:15} {(build.__doc__ or '').strip().splitlines()[0]}" for name, build in RECIPES.items()
    ]
    return "\n".join(
        [
            "Train a model.",
            "",
            "--model NAME    deit_ or cpvt_, then tiny, small or base, then _5peg, _gap or _distilled if wanted",
            "--data NAME     where, arrangement, what (drawn); tiny-imagenet, cifar10, fashion-mnist; a folder,",
            "                with FOLDER/train/CLASS/*.JPEG and FOLDER/val/..., or what `cpvt pack` made of it",
            "--recipe NAME   what the options below are by default:",
            *recipes,
            "",
            "With a folder for its results (--run.out), the same command goes on where it was stopped or killed.",
            "",
            "One GPU:             cpvt train ...",
            "All GPUs of a node:  torchrun --nproc-per-node gpu -m cpvt train ...",
        ]
    )


def _print_entry(entry: dict) -> None:
    words = (
        f"{name} {value}" if type(value) is not float else f"{name} {value:.5g}"
        for name, value in entry.items()
    )
    tqdm.write("  ".join(words), file=sys.stdout)
    sys.stdout.flush()


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a trained model on held-out images, at any number of sizes."""

    checkpoint: Annotated[Path, tyro.conf.Positional]  # model.safetensors, as `cpvt train` wrote it
    sizes: tuple[int, ...] = ()  # image sides in pixels (diagnostics: tokens); none: the trained one
    data: str = ""  # other data than it was trained on
    root: str = "data/images"  # where real images lie
    device: str = "auto"
    allow_upsampling: bool = False  # also where shards were shrunk below what a size needs

    def __call__(self) -> None:
        model, config = load_model(self.checkpoint)
        device = pick_device(self.device)
        model.to(device)
        own = config.data
        data = replace(own, name=self.data or own.name, root=self.root, limit=0)
        for size in self.sizes or (None,):
            here = data if size is None else replace(data, image_size=size, grid=(size, size))
            batches = open_batches(here, 1, config.run.seed, device, train=False)
            if batches.num_classes != model.num_classes:
                raise ConfigError(
                    f"{here.name} has {batches.num_classes} classes and the model {model.num_classes}: "
                    "evaluate it on data with the classes that it was trained on"
                )
            share = batches.upsampled(self.allow_upsampling)
            scores = accuracy(model, batches.test(), World(device=device), PRECISIONS[config.run.precision])
            height, width = batches.image_size
            print(
                f"{here.name} {height}x{width}  " + "  ".join(f"{n} {v:g}" for n, v in scores.items()), end=""
            )
            print(f"  enlarged {100 * share:.1f} % of the images" if share else "", end="")
            print(f"  {len(batches.unread)} unreadable images counted as wrong" if batches.unread else "")


@dataclass(frozen=True)
class Pack:
    """Prepare images for training: check every one, write shards. Originals, or shrunk with --short-side."""

    # a folder: with train/ and val/, with ILSVRC2012's archives, or with Kaggle's ILSVRC/
    source: Annotated[Path, tyro.conf.Positional]
    out: Annotated[Path, tyro.conf.Positional]  # gets OUT/train and OUT/val; then: cpvt train --data OUT
    split: Literal["both", "train", "val"] = "both"  # both: first val, then train
    short_side: int = 0  # shrink larger training images to this short side in pixels; 0: keep the originals
    quality: int = 92  # of the JPEG of a shrunk image, 1 to 95
    shard_mb: int = 1000  # size of a shard in millions of bytes
    expect: Expected = "auto"  # imagenet: exactly its images and classes, or nothing is kept
    workers: int = 0  # processes that decode; 0: one a core
    # where ILSVRC2012's archives are unpacked (default: beside OUT), into a folder that is deleted at the end;
    # they need their own size (train 138 GB, val 6.7 GB) once more on this disk
    unpack: str = ""

    def __call__(self) -> None:
        splits = ("val", "train") if self.split == "both" else (self.split,)
        pack(
            self.source,
            self.out,
            splits,
            short_side=self.short_side,
            quality=self.quality,
            shard_mb=self.shard_mb,
            expect=self.expect,
            workers=self.workers,
            unpack=self.unpack,
            report=lambda text: print(text, flush=True),
        )


@dataclass(frozen=True)
class Experiments:
    """Measure what is missing of an experiment, a row at a time."""

    name: Annotated[str, tyro.conf.Positional] = ""  # see --list; default: synthetic
    scale: Literal["", "tiny-imagenet", "fashion-mnist"] = (
        ""  # tiny-imagenet: the paper's tables at 1:8, the experiment tables; fashion-mnist: fashion, for a CPU
    )
    root: str = ""  # folder that holds the images (default: data/images)
    out: Path | None = None  # folder of NAME.jsonl (default: the repository's data/results)
    table: str = ""  # of the experiment tables: encodings, placement, parameters, padding, resolution, ...
    budget_minutes: float = 0.0  # start no row that would not be done by then, after a first one; 0: run all
    device: str = "auto"  # costs: cpu, cuda
    list: bool = False  # only say what the experiment consists of; without a name: what experiments there are

    def __call__(self) -> None:
        at_scale = {"tiny-imagenet": "tables", "fashion-mnist": "fashion"}.get(self.scale, "synthetic")
        name = self.name or at_scale
        if self.scale and name != at_scale:
            raise ConfigError(
                f"--scale {self.scale} is the experiment {at_scale!r}, and {name!r} was given too: leave one out"
            )
        if self.list and not (self.name or self.scale):
            for known, plan in {**EXPERIMENTS, "costs": measure_costs}.items():
                print(f"{known:16}{(plan.__doc__ or '').strip().splitlines()[0]}")
            return
        if self.device != "auto" and name != "costs":
            raise ConfigError(f"--device is for the experiment costs, not {name!r}: leave it out")
        if name == "costs":
            return self._costs()
        if name not in EXPERIMENTS:
            raise ConfigError(f"no experiment {name!r}; {nearest(name, [*EXPERIMENTS, 'costs'])}")
        given = {"root": self.root, "table": self.table}
        options = {name: value for name, value in given.items() if value}
        if self.list:
            for job in jobs(name, **options):
                print(job.label, to_json(job.config), sep="\t")
            return
        self._say(name, run_missing(jobs(name, **options), self.out, self.budget_minutes, self._reporter()))

    def _costs(self) -> None:
        """Nothing is trained to an end: steps of every model are timed beside those of one without encoding."""
        for name in ("root", "table"):
            if getattr(self, name):
                raise ConfigError(f"the experiment 'costs' has no {name}: leave it out")
        if self.list:
            print(*(f"{describe(row)}\t{to_json(cost_config(row))}" for row in cost_rows()), sep="\n")
            return
        device = pick_device(self.device)
        self._say("costs", measure_costs(self.out, device, self.budget_minutes, self._reporter()))

    def _say(self, name: str, left: int) -> None:
        path = results_folder(self.out) / f"{name}.jsonl"
        print(f"{path}: {left} rows missing" if left else "nothing is missing")

    def _reporter(self) -> Callable[[Result, int], None]:
        """Prints each row, and what the others will take if they take as long as those so far."""
        took: list[float] = []

        def report(result: Result, left: int) -> None:
            took.append(result.seconds)
            minutes = left * sum(took) / len(took) / 60
            rest = f"{left} to go, about {minutes:.0f} minutes" if left else "the last"
            print(f"{result.label}: {result.seconds} s, {rest}", flush=True)

        return report


COMMANDS: dict[str, Callable | type] = {
    "train": _train,
    "evaluate": Evaluate,
    "pack": Pack,
    "benchmark": Benchmark,
    "experiments": Experiments,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command. Exit status 0, or 2 after one line on stderr that says what was wrong."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("-h", "--help"):
        print("usage: cpvt COMMAND [options]   (cpvt COMMAND --help says more)\n")
        for command, what in COMMANDS.items():
            print(f"  {command:12} {(what.__doc__ or '').strip().splitlines()[0]}")
        return
    try:
        if name not in COMMANDS:
            raise ConfigError(f"no command {name!r}; {nearest(name, COMMANDS)}")
        if name == "train":
            _train(rest)
        else:
            _parse(COMMANDS[name], rest, f"cpvt {name}")()
    except (ConfigError, DataError, ResultsError, ValueError, FileNotFoundError, FloatingPointError) as error:
        raise _refused(name, str(error)) from None
    except torch.OutOfMemoryError:
        raise _refused(
            name, "the GPU's memory is full: take fewer images at once, --optim.micro-batch"
        ) from None
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        raise _refused(
            name, f"{error.filename or 'writing'}: {error.strerror}; see to the disk or give another path"
        ) from None


def _refused(name: str, reason: str) -> SystemExit:
    """One line on stderr, by one process of many, and exit status 2."""
    if os.environ.get("RANK", "0") == "0":
        print(f"cpvt {name}: {' '.join(reason.split())}", file=sys.stderr)
    return SystemExit(2)


def _parse(cls: type, arguments: list[str], prog: str, **options):
    """tyro's parser, its drawn error boxes folded into the one line that this command line promises."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(cls, args=arguments, prog=prog, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        words = re.sub(r"[\u2500-\u257f]+|-{3,}|\x1b\[[0-9;]*m", " ", said.getvalue())
        words = re.sub(r"^\s*(Value error|Parsing error|Unrecognized options|Missing options?)\s", " ", words)
        words = re.sub(rf"For full helptext, (see|run:?)\s+{prog} --help", "", words)
        raise ConfigError(f"{' '.join(words.split())} (see {prog} --help)") from None


def _take(flag: str, arguments: list[str], default: str) -> tuple[str, list[str]]:
    """Takes `flag VALUE` or `flag=VALUE` out of the arguments."""
    value, rest, words = default, [], iter(arguments)
    for word in words:
        if word == flag:
            value = next(words, None)
            if value is None:
                raise ConfigError(f"{flag} needs a name behind it")
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return value, rest
