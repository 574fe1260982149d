"""What is minimised: cross entropy with hard, smoothed or mixed labels, and a teacher's answers.

Letters: B images, C classes, (H, W) pixels.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpvt.config import DistillConfig, ModelConfig
from cpvt.data.transforms import renormalise
from cpvt.errors import ConfigError
from cpvt.model.zoo import load_weights, read_weights


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(B, C) and labels (B,) or mixed labels (B, C), which carry their smoothing already -> the mean."""
    if targets.ndim == 2:
        return F.cross_entropy(logits, targets.to(logits.dtype))
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


@dataclass
class TrainingLoss:
    """The loss of a model's logits; with a teacher, the second head learns its best guesses (Touvron et al.)."""

    label_smoothing: float = 0.0
    alpha: float = 0.5  # share of the teacher's term
    teacher: nn.Module | None = None  # (B, 3, H, W) -> (B, C), in evaluation mode

    @cached_property
    def sha256(self) -> str:
        """Of the teacher's weights, in hexadecimal: which one it is; nothing without one."""
        if not self.teacher:
            return ""
        digest = hashlib.sha256()
        for name, value in self.teacher.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def __call__(self, logits: Tensor | tuple[Tensor, Tensor], images: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, C), or those of the two heads; -> a scalar in the logits' precision, fp32 at least."""
        heads = logits if isinstance(logits, tuple) else (logits,)
        heads = [head if head.dtype == torch.float64 else head.float() for head in heads]
        labelled = [cross_entropy(head, targets, self.label_smoothing) for head in heads]
        if self.teacher is None:  # two heads and no teacher: both learn from the labels
            return sum(labelled) / len(heads)
        with torch.no_grad():
            guesses = self.teacher(images).argmax(-1)
        return (1 - self.alpha) * labelled[0] + self.alpha * F.cross_entropy(heads[1], guesses)


class Teacher(nn.Module):
    """(B, 3, H, W), normalised for the student -> (B, C): one of timm's models, with its own normalisation."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, cfg = model, model.pretrained_cfg
        self.mean, self.std = tuple(cfg["mean"]), tuple(cfg["std"])

    def forward(self, images: Tensor) -> Tensor:
        return self.model(renormalise(images, self.mean, self.std))


def load_teacher(distill: DistillConfig, model: ModelConfig, device: str) -> Teacher | None:
    """The teacher that is asked for, from a file or timm's download; None for none. Raises ConfigError, also where
    it knows another number of classes than the model, or needs images of another size."""
    if not distill.teacher:
        return None
    import timm

    name = f"distill.teacher={distill.teacher!r}"
    if not model.distilled:
        raise ConfigError(f"{name}: the model has no distillation token; use one named _distilled")
    try:
        teacher = timm.create_model(distill.teacher, pretrained=not distill.weights)
        if distill.weights:
            state, head = read_weights(distill.weights, teacher), teacher.pretrained_cfg["classifier"]
            bias = state.get(f"{head if isinstance(head, str) else head[0]}.bias")
            teacher.reset_classifier(model.num_classes if bias is None else len(bias))
            load_weights(teacher, state)
    except (OSError, RuntimeError, ValueError) as error:  # timm's for a name it does not know, too
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{name} cannot be had ({reason}): give a file, --distill.weights") from None
    if teacher.num_classes != model.num_classes:
        words = f"{name} knows {teacher.num_classes} classes, the data has {model.num_classes}"
        raise ConfigError(f"{words}: give a teacher of the same, with --distill.weights")
    size = tuple(teacher.pretrained_cfg["input_size"][1:])
    if teacher.pretrained_cfg.get("fixed_input_size") and size != model.image_size:
        words = f"{name} reads {size[0]}x{size[1]} pixels alone, the data has {model.image_size}"
        raise ConfigError(f"{words}: give --data.image-size {size[0]}, or another teacher")
    return Teacher(teacher).requires_grad_(False).eval().to(device)
