"""A trained model on disk: one safetensors file that carries its configuration, written aside and renamed."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cpvt.config import ConfigError, TrainConfig, from_json, to_json
from cpvt.model.vit import VisionTransformer


def save_model(path: str | Path, model: VisionTransformer, config: TrainConfig) -> Path:
    """Writes weights and configuration; a kill half-way leaves whatever stood there before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        state = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
        save_file(state, aside, metadata={"config": to_json(config)})
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def load_model(path: str | Path) -> tuple[VisionTransformer, TrainConfig]:
    """-> the model as it was saved, and its configuration. Raises ConfigError for a file that is not one."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata, state = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a model saved by `cpvt train`") from None
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path}: not a safetensors file ({error}); expected one saved by `cpvt train`"
        ) from None
    if "config" not in metadata:
        raise ConfigError(f"{path}: carries no configuration; expected a model saved by `cpvt train`")
    config = from_json(TrainConfig, metadata["config"])
    model = VisionTransformer(config.model)
    model.load_state_dict(state, strict=True)
    return model.eval(), config
