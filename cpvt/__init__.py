"""Conditional positional encodings for vision transformers: the models, their training, the measurements."""

import importlib.abc
import importlib.util
import os
import sys

# Threads of OpenMP that spin while they wait take the cores from whatever else runs. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_HOMES = {
    "ModelConfig": "cpvt.config",
    "attach_peg": "cpvt.model.attach",
    "create_model": "cpvt.model.zoo",
    "model_names": "cpvt.model.zoo",
}
__all__ = [*_HOMES]


def __getattr__(name: str):
    """Loads what is asked for, and torch with it, when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'cpvt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


class _RegisterWithTimm(importlib.abc.MetaPathFinder):
    """Waits until somebody imports timm, which takes seconds and is seldom needed, then gives it our names."""

    def find_spec(self, name, path=None, target=None):
        if name != "timm":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec("timm")
        finally:  # it may be asked for again: many look whether timm is there before they import it
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module):
                load(module)
                importlib.import_module("cpvt.model.timm_registry")

            spec.loader.exec_module = load_and_register
        return spec


if "timm" in sys.modules:
    importlib.import_module("cpvt.model.timm_registry")
else:
    sys.meta_path.insert(0, _RegisterWithTimm())
