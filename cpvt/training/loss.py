"""What is minimised: cross entropy with hard, smoothed or mixed labels, and a teacher's answers.

Letters: B images, C classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpvt.config import DistillConfig, ModelConfig
from cpvt.errors import ConfigError
from cpvt.model.zoo import load_weights


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
    teacher: nn.Module | None = None  # (B, 3, S, S) -> (B, C), in evaluation mode

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


def load_teacher(distill: DistillConfig, model: ModelConfig, device: str) -> nn.Module | None:
    """The teacher that is asked for, from a file or timm's download; None for none. Raises ConfigError."""
    if not distill.teacher:
        return None
    import timm

    name = f"distill.teacher={distill.teacher!r}"
    if not model.distilled:
        raise ConfigError(f"{name}: the model has no distillation token; use one named _distilled")
    options = {"pretrained": not distill.weights, "num_classes": model.num_classes}
    try:
        teacher = timm.create_model(distill.teacher, **options)
        if distill.weights:
            load_weights(teacher, distill.weights)
    except (OSError, RuntimeError, ValueError) as error:  # timm's for a name it does not know, too
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{name} cannot be had ({reason}): give a file, --distill.weights") from None
    return teacher.requires_grad_(False).eval().to(device)
