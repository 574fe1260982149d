"""A convolutional teacher trained on the student's own data, for rows with distillation at small scale."""

from __future__ import annotations

import hashlib
import os
from contextlib import closing
from itertools import islice
from pathlib import Path

import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from cpvt.config import TrainConfig, replace, to_json
from cpvt.data.loader import open_batches
from cpvt.training.evaluate import accuracy
from cpvt.training.loss import cross_entropy
from cpvt.training.optim import learning_rate, parameter_groups, resolved
from cpvt.training.setup import pick_device

TEACHER = "resnet10t"  # timm's: 5 million weights, a mean over the last map, no idea of the grid's size


def train_teacher(student: TrainConfig, name: str = TEACHER) -> tuple[nn.Module, float]:
    """Trains timm's model `name` from nothing, on the student's images and as long as the student.

    -> the model in evaluation mode, and its top-1 in percent on the held-out images.
    """
    device, seed = pick_device(student.run.device), student.run.seed
    smoothing = student.optim.label_smoothing
    batches = open_batches(
        student.data,
        student.optim.global_batch_size,
        seed,
        device,
        augment=student.augment,
        smoothing=smoothing,
    )
    optim = resolved(student, batches.stream.steps).optim
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=batches.num_classes).to(device)
    optimiser = torch.optim.AdamW(parameter_groups(model, optim.weight_decay), lr=optim.lr)
    with closing(batches.micro_batches()) as micro_batches:
        for step, batch in enumerate(islice(micro_batches, optim.steps)):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, optim)
            optimiser.zero_grad()
            cross_entropy(model(batch.images), batch.targets, smoothing).backward()
            optimiser.step()
    return model.eval(), accuracy(model, batches.test())["top1"]


def teacher_top1(student: TrainConfig) -> dict[str, float]:
    """{"teacher_top1": percent}, as noted beside the weights of a teacher that was trained here; else {}."""
    if not student.distill.weights:
        return {}
    with safe_open(student.distill.weights, "pt") as file:
        noted = (file.metadata() or {}).get("top1")
    return {"teacher_top1": float(noted)} if noted else {}


def teach(student: TrainConfig) -> TrainConfig:
    """The configuration with the weights of its teacher: one of this data, augmentation, length and seed is taken
    from `data.root`/teachers, or trained and laid there. Without a teacher in it, the configuration as it is."""
    if not student.distill.teacher or student.distill.weights:
        return student
    parts = (student.data, student.augment, student.optim)
    about = " ".join([*map(to_json, parts), str(student.run.seed), student.distill.teacher])
    name = f"{student.distill.teacher}-{hashlib.sha256(about.encode()).hexdigest()[:12]}.safetensors"
    path = Path(student.data.root) / "teachers" / name
    if not path.exists():
        model, top1 = train_teacher(student, student.distill.teacher)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")  # another process may be reading the older one
        save_file(model.state_dict(), beside, metadata={"top1": f"{top1:.2f}"})
        os.replace(beside, path)
    return replace(student, distill=replace(student.distill, weights=str(path)))
