"""What is decayed, and how large a step is: pure functions of the model and of the step."""

from __future__ import annotations

import math

from torch import nn

from cpvt.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two AdamW groups: matrices and kernels are decayed; biases, norms, tokens and position tables are not."""
    tables = {name for name, _ in model.named_parameters() if name.endswith("_token")}
    for path, module in model.named_modules():  # tables are the parameters that no layer of torch.nn holds
        if path.startswith("encoding") and not isinstance(module, nn.Conv2d):
            tables |= {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and name not in tables].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def learning_rate(step: int, optim: OptimConfig) -> float:
    """Linear from 0 to the peak over the warm-up, then a cosine to the final rate, counted from step 0."""
    if step < optim.warmup_steps:
        return optim.rate * (step + 1) / optim.warmup_steps
    share = min(step / max(optim.steps, 1), 1.0)
    return optim.final_rate + (optim.rate - optim.final_rate) * (1 + math.cos(math.pi * share)) / 2
