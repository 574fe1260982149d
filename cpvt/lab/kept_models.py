"""Trained models that are kept beside the rows, for pictures: small files, matrices in eight bits."""

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cpvt.config import TrainConfig, from_json, to_json
from cpvt.errors import ResultsError
from cpvt.lab.results import DATA, Result, complete, results_folder
from cpvt.model.vit import VisionTransformer
from cpvt.training.train import TrainingRun

SMALL = 4096  # numbers in a tensor up to which it is kept in half precision


def models_folder(folder: str | Path | None = None) -> Path:
    """The repository's data/models; beside results elsewhere, their models/."""
    folder = results_folder(folder)
    return (DATA if folder == DATA / "results" else folder) / "models"


def model_path(experiment: str, columns: dict, folder: str | Path | None = None) -> Path:
    """NAME.safetensors, where the name tells the experiment and which columns are not as usual."""
    usual = complete(experiment, {})
    told = [str(value) for name, value in columns.items() if value != usual.get(name)]
    name = re.sub(r"[^a-z0-9-]+", "-", "-".join([experiment, *told]).lower()).strip("-")
    return models_folder(folder) / f"{name}.safetensors"


def keep_model(result: Result, run: TrainingRun, folder: str | Path | None = None) -> None:
    """Writes the weights: matrices in steps of a 127th of the largest of each row, the rest in half precision."""
    parts: dict[str, Tensor] = {}
    for name, value in run.model.state_dict().items():
        if value.dim() > 1 and value.numel() > SMALL:
            scale = value.detach().cpu().flatten(1).abs().amax(1).clamp(min=1e-4) / 127
            steps = value.detach().cpu() / scale.half().float().view(-1, *[1] * (value.dim() - 1))
            parts |= {name: steps.round().clamp(-127, 127).to(torch.int8), f"{name}/scale": scale.half()}
        else:
            parts[name] = value.detach().cpu().half()
    path = model_path(result.experiment, result.columns, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"columns": json.dumps(result.columns), "seed": str(result.seed), "commit": result.cpvt_commit}
    save_file(parts, path, metadata={"config": to_json(run.config), **about})


def load_kept(experiment: str, folder: str | Path | None = None, **columns) -> VisionTransformer:
    """The trained model of a row, in evaluation, on the CPU. Raises ResultsError where none was kept."""
    path = model_path(experiment, complete(experiment, columns), folder)
    if not path.exists():
        names = ", ".join(sorted(p.stem for p in path.parent.glob("*.safetensors"))) or "none"
        raise ResultsError(f"no weights are kept of {path.stem}; there are those of {names}")
    with safe_open(path, "pt") as file:
        config = from_json(TrainConfig, file.metadata()["config"])
        held = {name: file.get_tensor(name) for name in file.keys()}
    state = {}
    for name, value in held.items():
        if not name.endswith("/scale"):
            scale = held.get(f"{name}/scale")
            value = value.float()
            state[name] = value if scale is None else value * scale.float().view(-1, *[1] * (value.dim() - 1))
    model = VisionTransformer(config.model)
    model.load_state_dict(state)
    return model.eval()
