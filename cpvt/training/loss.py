"""What is minimised: cross entropy with hard, smoothed or mixed labels, and a teacher's answers.

Letters: B images, C classes.
"""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpvt.config import DistillConfig, ModelConfig
from cpvt.errors import ConfigError
from cpvt.model.zoo import load_weights


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """(B, C) and labels (B,) or mixed labels (B, C), which carry their smoothing already -> the mean."""
    if targets.ndim == 2:
        return F.cross_entropy(logits, targets.to(logits.dtype))
    return F.cross_entropy(logits, targets, label_smoothing=smoothing)


class Criterion:
    """The loss of a model's logits; with a teacher, the second head learns its answers (Touvron et al.).

    teacher  (B, 3, S, S) -> (B, C), kept in evaluation mode, or None
    """

    def __init__(
        self,
        smoothing: float = 0.0,
        distill: DistillConfig = DistillConfig(),
        teacher: nn.Module | None = None,
    ):
        self.smoothing, self.distill, self.teacher = smoothing, distill, teacher

    def __call__(self, logits: Tensor | tuple[Tensor, Tensor], images: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, C), or those of the two heads; -> a scalar in the logits' precision, fp32 at least."""
        heads = [
            head if head.dtype == torch.float64 else head.float()
            for head in (logits if isinstance(logits, tuple) else (logits,))
        ]
        if self.teacher is None:  # two heads and no teacher: both learn from the labels
            return sum(cross_entropy(head, targets, self.smoothing) for head in heads) / len(heads)
        with torch.no_grad():
            answers = self.teacher(images).to(heads[1].dtype)
        own = cross_entropy(heads[0], targets, self.smoothing)
        return (1 - self.distill.alpha) * own + self.distill.alpha * self.taught(heads[1], answers)

    def taught(self, logits: Tensor, answers: Tensor) -> Tensor:
        """The teacher's term: its best guess as a label (hard), or its distribution (soft)."""
        if self.distill.kind == "hard":
            return F.cross_entropy(logits, answers.argmax(-1))
        tau = self.distill.tau
        own, its = ((x / tau).log_softmax(-1) for x in (logits, answers))
        divergence = F.kl_div(own, its, reduction="sum", log_target=True) * tau**2
        return divergence / len(logits)


def load_teacher(distill: DistillConfig, model: ModelConfig, device: str) -> nn.Module | None:
    """The teacher that is asked for, from a file or timm's download, ready to answer; None for none.

    Raises ConfigError where the model has no head for it, or the teacher cannot be had.
    """
    if not distill.teacher:
        return None
    if not model.distilled:
        raise ConfigError(
            f"distill.teacher={distill.teacher!r}: the model has no distillation token; use one named _distilled"
        )
    if not timm.is_model(distill.teacher):
        raise ConfigError(
            f"distill.teacher={distill.teacher!r}: timm has no such model; regnety_160 is DeiT's"
        )
    try:
        teacher = timm.create_model(
            distill.teacher, pretrained=not distill.weights, num_classes=model.num_classes
        )
        if distill.weights:
            load_weights(teacher, distill.weights)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"distill.teacher={distill.teacher!r} cannot be loaded ({reason}); give its weights as a file, "
            "--distill.weights PATH"
        ) from None
    return teacher.requires_grad_(False).eval().to(device)
