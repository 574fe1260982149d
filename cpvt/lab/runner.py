"""Trains and scores a job; does what is missing of a list of jobs, one after the other."""

import dataclasses
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cpvt.config import DataConfig, TrainConfig, from_json, replace, to_json
from cpvt.data.loader import make_loader
from cpvt.errors import ResultsError, TrainingError
from cpvt.lab import results
from cpvt.lab.kept_models import keep_model
from cpvt.lab.results import AlreadyMeasured, Result, describe
from cpvt.lab.timing import deadline, until
from cpvt.training.checkpoint import differences
from cpvt.training.distributed import Stopped, pick_device
from cpvt.training.evaluate import accuracy, autocast
from cpvt.training.loss import cross_entropy
from cpvt.training.optim import learning_rate, param_groups, resolve
from cpvt.training.train import TrainingRun, train

TEACHER = "resnet10t"  # timm's: 5 million weights, a mean over the last map, no idea of the grid's size
TEACHER_EPOCHS = 3  # times those of its students
RUNNING = ".running"  # folder beside the results: a lock for each row that a process is at


@dataclass(frozen=True)
class Job:
    """One row to come: its columns and the configuration to train; what scores it, and what gives its batches.

    score    trained run, cache of decoded images -> metrics, the name of the data, and the SHA-256 of what was
             evaluated on
    arrays   the same -> small arrays that are kept beside the row, or nothing

    A teacher that the configuration names is trained first, where it has no weights.
    """

    experiment: str
    columns: dict[str, Any]
    scale: str
    config: TrainConfig
    score: Callable[[TrainingRun, dict], tuple[dict[str, float], str, str]]
    make_loader: Callable = make_loader
    arrays: Callable[[TrainingRun, dict], dict[str, Tensor]] = lambda run, cache: {}
    keep_weights: bool = False  # in models/ beside the results

    @property
    def key(self) -> tuple:
        """As `Result.key`."""
        return self.experiment, self.scale, tuple(self.columns.items()), self.config.run.seed

    @property
    def label(self) -> str:
        return describe(self.columns, seed=self.config.run.seed)


def run_job(job: Job, version: str, cache: dict) -> tuple[Result, dict[str, Tensor], TrainingRun]:
    """Trains and scores a job -> its result, the arrays that are kept beside it, and the run.

    `version`: the commit of the code that runs. `cache` keeps decoded images from job to job.
    Raises Stopped where a signal came in between.
    """
    started = time.perf_counter()
    config, teacher_top1 = with_teacher(job.config, cache, job.make_loader)
    run = train(config, make_loader=partial(job.make_loader, cache=cache))
    if run.interrupted:
        raise Stopped(f"{job.label}: stopped by {run.interrupted}")
    for module in run.model.modules():  # scored as written: hooks are set, and sizes asked for once
        module._compiled_call_impl = None
    metrics, dataset, digest = job.score(run, cache)
    metrics |= teacher_top1 | {"steps": run.steps, "loss": run.history[-1]["loss"]}
    metrics["parameters"] = sum(p.numel() for p in run.model.parameters())
    anywhere = replace(job.config.data, root=DataConfig.root)  # wherever the images lay
    result = Result(
        experiment=job.experiment,
        columns=job.columns,
        scale=job.scale,
        dataset=dataset,
        dataset_sha256=digest,
        seed=job.config.run.seed,
        config=dataclasses.asdict(replace(job.config, data=anywhere)),
        metrics=metrics,
        seconds=round(time.perf_counter() - started, 1),
        device=results.device_name(next(run.model.parameters()).device),
        cpvt_commit=version,
    )
    return result, job.arrays(run, cache), run


def run_missing(
    jobs: Iterable[Job],
    folder: str | Path | None = None,
    budget_minutes: float = 0.0,
    report: Callable[[Result, int], None] = lambda result, left: None,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Runs the jobs that the folder's results lack, in their order; -> how many are still missing.

    One is run at least; another begins where the budget holds as long as the longest so far took (0: no limit).
    Every result is on disk before the next job starts, and Ctrl-C, or a signal in training, ends it between two of
    them. A job that fails (its loss is not finite) is passed over, and named in the end. `report` gets each result
    and how many are left.
    Raises ResultsError for a row that stands there with another configuration, for a folder that cannot be
    written to, and for what was passed over.
    """
    folder, end = results.results_folder(folder), deadline(budget_minutes, clock)
    version = results.commit()  # asked now: files may change while this code trains
    results.check_writable(folder)
    (folder / RUNNING).mkdir(parents=True, exist_ok=True)
    missing, failed, cache = _missing(list(jobs), folder), [], {}
    left = len(missing)
    with suppress(Stopped, KeyboardInterrupt):
        for job in until(end, missing, clock):
            with _alone(job, folder) as mine:
                if not mine or not _missing([job], folder):  # another process has it, or has done it
                    left -= 1
                    continue
                try:
                    result, arrays, run = run_job(job, version, cache)
                except (TrainingError, ResultsError) as error:
                    failed.append(f"{job.label}: {error}")
                else:
                    with suppress(AlreadyMeasured):
                        results.append(result, folder, arrays=arrays)
                        if job.keep_weights:
                            keep_model(result, run, folder)
                    report(result, left - 1)
                left -= 1
    if failed:
        raise ResultsError("not measured: " + "; ".join(failed))
    return left


@contextmanager
def _alone(job: Job, folder: Path) -> Iterator[bool]:
    """Whether no other process runs this job; none begins it as long as this lasts, however it ends."""
    path = folder / RUNNING / hashlib.sha256(repr(job.key).encode()).hexdigest()[:16]
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except BlockingIOError:
            mine = False
        yield mine


def _missing(jobs: list[Job], folder: Path) -> list[Job]:
    """Raises ResultsError where the row of a job was recorded with another configuration."""
    stored: dict[tuple, Result] = {}
    for experiment in {job.experiment for job in jobs}:
        if (folder / f"{experiment}.jsonl").exists():
            stored |= {result.key: result for result in results.recorded(experiment, folder)}
    for job in jobs:
        if result := stored.get(job.key):
            if apart := differences(job.config, from_json(TrainConfig, json.dumps(result.config))):
                raise ResultsError(
                    f"{job.experiment}, {job.label}, is there with another configuration: {'; '.join(apart)}; "
                    f"use another folder, or remove the row from {folder}"
                )
    return [job for job in jobs if job.key not in stored]


# --------------------------------------------------------------------------- teachers


def train_teacher(
    student: TrainConfig, cache: dict | None = None, make_loader: Callable = make_loader
) -> tuple[nn.Module, float]:
    """Trains timm's model `distill.teacher` from nothing, on the student's images, TEACHER_EPOCHS times as long,
    with seed 0, which students of all seeds share.

    -> the model in evaluation mode, and its top-1 in percent on the held-out images.
    """
    import timm  # here: it takes a second to import

    device, optim = pick_device(student.run.device), student.optim
    optim = replace(optim, epochs=TEACHER_EPOCHS * optim.epochs) if optim.epochs else optim
    images = {"augment": student.augment, "global_batch_size": optim.global_batch_size}
    images |= {"label_smoothing": optim.label_smoothing, "cache": cache}
    loader = make_loader(student.data, seed=0, device=device, **images)
    optim = resolve(replace(student, optim=optim), loader.sampler.steps_per_epoch).optim
    torch.manual_seed(0)
    model = timm.create_model(student.distill.teacher, num_classes=loader.num_classes).to(device)
    optimiser = torch.optim.AdamW(param_groups(model, optim.weight_decay), lr=optim.lr)
    with closing(loader.train_batches()) as batches:
        for step, batch in enumerate(islice(batches, optim.steps)):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, optim)
            optimiser.zero_grad()
            with autocast(device, student.run.precision):
                logits = model(batch.images)
            cross_entropy(logits.float(), batch.targets, optim.label_smoothing).backward()
            optimiser.step()
    return model.eval(), accuracy(model, loader.eval_batches())["top1"]


def with_teacher(
    student: TrainConfig, cache: dict | None = None, make_loader: Callable = make_loader
) -> tuple[TrainConfig, dict[str, float]]:
    """-> the configuration with the weights of its teacher, and {"teacher_top1": percent} as a metric.

    A teacher of this data, augmentation and length is taken from `data.root`/teachers, or trained and laid there;
    other processes wait for it. A configuration without a teacher, or with its weights, stays as it is.
    """
    if not student.distill.teacher or student.distill.weights:
        return student, {}
    parts = (replace(student.data, root=DataConfig.root), student.augment, student.optim)
    about = " ".join([*map(to_json, parts), student.distill.teacher, str(TEACHER_EPOCHS)])
    name = f"{student.distill.teacher}-{hashlib.sha256(about.encode()).hexdigest()[:12]}.safetensors"
    path = Path(student.data.root) / "teachers" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            model, top1 = train_teacher(student, cache, make_loader)
            beside = path.with_name(f".{name}.{os.getpid()}")
            save_file(model.state_dict(), beside, metadata={"top1": f"{top1:.2f}"})
            os.replace(beside, path)
    with safe_open(path, "pt") as file:
        top1 = float(file.metadata()["top1"])
    return replace(student, distill=replace(student.distill, weights=str(path))), {"teacher_top1": top1}
