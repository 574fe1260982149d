"""Conditional positional encodings for vision transformers: the models, their training, the measurements."""

from cpvt.config import ModelConfig
from cpvt.model.zoo import attach_peg, create_model, model_names  # registers the names with timm

__all__ = ["ModelConfig", "attach_peg", "create_model", "model_names"]
