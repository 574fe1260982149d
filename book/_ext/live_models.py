"""The trained models of data/models, as scripts for the live views of the pages (book/_static/live).

A page that was opened from the disk may load scripts and nothing else, so weights come as text. Rows of the large
matrices are rounded to 15 or 225 levels, four or two to a character; other numbers to 15 bits, one to a character.
The text is UTF-16, where a character has two bytes; a mark at its start says so to every browser.

What the rounding costs stands in data/results/live.jsonl. To measure it: python book/_ext/live_models.py FOLDER,
that of the images of `cpvt experiments photographs`.
"""

import base64
import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from cpvt.config import DataConfig, Peg, parse_encoding
from cpvt.data.synthetic import BACKGROUND, COLOUR_A
from cpvt.data.transforms import MEAN, STD
from cpvt.lab import photographs
from cpvt.lab.experiments import CIRCULAR
from cpvt.lab.kept_models import load_kept
from cpvt.lab.metrics import photographs_at
from cpvt.lab.pictures import PHOTOGRAPHS, class_names, photograph
from cpvt.lab.results import Result, append, commit, device_name, read
from cpvt.lab.stats import combination
from cpvt.model.vit import VisionTransformer
from cpvt.training.evaluate import accuracy

FILES = {  # encoding -> the end of the script's name; live.js has the words for it
    "none": "none",
    "learned": "learned-table",
    "peg": "one-peg",
    "peg(positions=(0, 1, 2))": "three-pegs",
    CIRCULAR: "circular-peg",
}
FIRST, CHARACTERS = 0x1000, 15**4  # characters from the first on: no quote, no line break, no half of a pair
LARGE, TABLE = (
    4096,
    1000,
)  # elements from which a matrix of a wide model, and of a small one, is rounded to levels
SIDE = 96  # pixels of the photographs
GRIDS = (6, 8, 12, 14, 16)  # tokens a side at which the rows have an accuracy
VIEWS = {"move": "move.js", "reach": "reach.js", "sizes": "sizes.js"}  # <div class="live" data-view="move">


# --------------------------------------------------------------------------- numbers as text


def fifteen_bits(values: Tensor) -> Tensor:
    """-> whole numbers below 2**15: half precision without its last bit."""
    return (values.half().view(torch.int16).to(torch.int64) & 0xFFFF) + 1 >> 1


def from_fifteen_bits(codes: Tensor) -> Tensor:
    return (codes << 1).to(torch.int32).to(torch.int16).view(torch.half).double()


def levels_of(value: Tensor) -> int:
    """15 or 225, the number of levels of a matrix's rows; 0 where each number is kept by itself."""
    if value.numel() < TABLE or value.squeeze(0).dim() < 2:
        return 0
    return 15 if value.numel() > LARGE and value.squeeze(0).dim() == 2 and value.shape[0] > 1 else 225


def encode(value: Tensor, levels: int) -> tuple[str, Tensor]:
    """A tensor -> its text, and what the page will read in it, in float64."""
    if not levels:
        codes = fifteen_bits(value.flatten())
        return _text(codes), from_fifteen_bits(codes).view_as(value)
    rows, top = value.squeeze(0).flatten(1).double(), (levels - 1) // 2
    largest, best = rows.abs().amax(1, keepdim=True).clamp(min=1e-4), None
    for share in torch.linspace(
        0.4, 1, 25
    ):  # a smaller step may fit most of a row better, and cut its extremes
        scale_codes = fifteen_bits(share * largest / top)
        scale = from_fifteen_bits(scale_codes)
        steps = (rows / scale).round().clamp(-top, top)
        error = (steps * scale - rows).square().sum(1, keepdim=True)
        found = error, scale_codes, scale, steps
        best = (
            found
            if best is None
            else tuple(torch.where(error < best[0], *p) for p in zip(found, best, strict=True))
        )
    _, scale_codes, scale, steps = best
    digits = (steps + top).long().flatten()
    group = round(math.log(CHARACTERS) / math.log(levels))
    digits = torch.nn.functional.pad(digits, (0, -len(digits) % group)).view(-1, group)
    codes = (digits * levels ** torch.arange(group)).sum(1)
    return _text(scale_codes.flatten()) + _text(codes), (steps * scale).view_as(value)


def _text(codes: Tensor) -> str:
    return "".join(map(chr, (codes + FIRST).tolist()))


# --------------------------------------------------------------------------- models as scripts


def page_config(model: VisionTransformer) -> dict:
    """What the page has to know. Raises ValueError for what book/_static/live/vit.js does not compute."""
    config, parts = model.config, []
    for part in parse_encoding(model.config.encoding):
        kind = type(part).__name__.lower()
        plain = kind in ("learned", "sine", "rotary", "peg")
        if isinstance(part, Peg):
            usual = dataclasses.replace(
                Peg(), positions=part.positions, kernel=part.kernel, padding=part.padding
            )
            plain = part == usual and part.padding in ("zero", "circular")
        elif plain:
            plain = getattr(part, "resize", "raw") != ("refuse" if kind == "learned" else "resample")
            plain = plain and not getattr(part, "antialias", False)
        if not plain:
            raise ValueError(f"{part}: the page has no such encoding; see book/_static/live/vit.js")
        parts.append({"kind": kind, **dataclasses.asdict(part)})
    if config.distilled or config.stem != "patch" or config.mlp_only_blocks:
        raise ValueError("the page has no distilled models, other stems or blocks without attention")
    names = "patch_size", "width", "depth", "heads", "global_pool", "num_classes"
    numbers = {name: getattr(config, name) for name in names}
    return numbers | {"grid": config.grid, "encoding": parts, "mean": MEAN, "std": STD}


def model_script(name: str, model: VisionTransformer) -> tuple[str, dict[str, Tensor]]:
    """-> the script that hands the page this model, and the weights that the page then has, in float64."""
    tensors, text, weights = [], [], {}
    for key, value in model.state_dict().items():
        levels = levels_of(value)
        characters, weights[key] = encode(value, levels)
        tensors.append([key, list(value.shape), levels])
        text.append(characters)
    return (
        f'live.model("{name}",{json.dumps(page_config(model))},{json.dumps(tensors)},"{"".join(text)}");\n',
        weights,
    )


def live_models() -> dict[str, VisionTransformer]:
    """Name of the script -> the model: of the photographs, and of the task *where*."""
    found = {}
    for encoding, name in FILES.items():
        found[f"photographs-{name}"] = load_kept("photographs", encoding=encoding)
        found[f"where-{name}"] = load_kept("pictures", task="where", encoding=encoding)
    return found


def rounded(model: VisionTransformer) -> VisionTransformer:
    """The model with the weights that its page has, in float64."""
    copy = VisionTransformer(model.config).double().eval()
    copy.load_state_dict(model_script("", model)[1])
    return copy


def shared_data() -> dict:
    """What all views need beside the models: photographs as bytes (3, SIDE, SIDE), words, recorded accuracies."""
    images = {name: (255 * photograph(name, SIDE)).round().byte() for name in PHOTOGRAPHS}
    rows, measured, live = read("photographs"), {}, read("live")
    for encoding, name in FILES.items():
        found = {g: combination(rows, (1, {"encoding": encoding}, f"top1@{g}")) for g in GRIDS}
        measured[name] = {
            g: [round(x, 1) for x in (f.mean, f.high - f.mean)] for g, f in found.items() if f.n > 1
        }
    return {
        "classes": class_names(),
        "side": SIDE,
        "photographs": {name: base64.b64encode(x.numpy().tobytes()).decode() for name, x in images.items()},
        "ground": BACKGROUND,
        "object": COLOUR_A,
        "accuracy": measured,
        "rounding": round(float((live["top1@8"] - live["top1@8/kept"]).abs().max()), 1),  # points, at most
    }


def write_scripts(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.js").write_text(f"live.data({json.dumps(shared_data())});\n", encoding="utf-8")
    for name, model in live_models().items():
        (folder / f"{name}.js").write_text("\ufeff" + model_script(name, model)[0], encoding="utf-16-le")


def measure(root: str) -> None:
    """A row for each model of the photographs: its accuracy as it is kept and as the page has it."""
    data = DataConfig(name=photographs.NAME, root=root, image_size=32)
    held, digest = photographs.open_photographs(data, "val"), photographs.sha256_of_files(root)
    for encoding, name in FILES.items():
        started, version = time.perf_counter(), commit()
        model = load_kept("photographs", encoding=encoding)
        both = {"top1@8/kept": model, "top1@8": rounded(model).float()}
        metrics = {key: accuracy(m, photographs_at(held, (32, 32)))["top1"] for key, m in both.items()}
        metrics["bytes"] = len(model_script(f"photographs-{name}", model)[0].encode("utf-16"))
        result = Result(
            experiment="live",
            columns={"encoding": encoding},
            scale="seconds",
            dataset=photographs.DATASET,
            dataset_sha256=digest,
            config=dataclasses.asdict(model.config),
            metrics=metrics,
            seconds=round(time.perf_counter() - started, 1),
            device=device_name("cpu"),
            cpvt_commit=version,
        )
        append(result)
        print(result.label, metrics)


# --------------------------------------------------------------------------- into the pages


def add_scripts(app, pagename, templatename, context, doctree) -> None:
    """A page with a live view gets its scripts; no other page loads them."""
    body = context.get("body", "")
    for view, script in VIEWS.items():
        if f'data-view="{view}"' in body:
            for name in ("vit.js", "live.js", script):
                app.add_js_file(f"live/{name}", loading_method="defer")
            app.add_css_file("live/live.css")


def write_models(app, error) -> None:
    if not error and app.builder.format == "html":
        write_scripts(Path(app.outdir) / "_static" / "live" / "models")


def setup(app) -> dict:
    app.connect("html-page-context", add_scripts)
    app.connect("build-finished", write_models)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    measure(sys.argv[1])
