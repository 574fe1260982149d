"""Configurations: what is written is read back exactly, and what makes no sense is refused in one line."""

import dataclasses
import json
from pathlib import Path

import numpy
import pytest
import torch
from models import ENCODINGS, assert_refused

from cpvt import ModelConfig, config, create_model
from cpvt.config import DataConfig, TrainConfig, from_json, parse_encoding, replace, to_json

SIZES = numpy.int64(32), torch.Size((32, 32)), (numpy.int32(32), 32)
# With those of the models' tests every option of every kind.
OTHERS = ["learned(resize='refuse')", "sine(temperature=100.0, resize='rescale')"]
OTHERS += [
    "rotary(theta=10000.0, resize='rescale')",
    "relative + peg(positions=(0, 1)) + rotary + learned + sine",
]


def test_texts_and_parts_mean_each_other():
    assert parse_encoding("none") == parse_encoding(" ") == ()
    assert parse_encoding("learned+peg( kernel = 5 )") == (config.Learned(), config.Peg(kernel=5))
    parts = config.Sine(temperature=10.0), config.Rotary(), config.Relative(clip=2)
    assert parse_encoding("sine(temperature=10) + rotary + relative(clip=2)") == parts
    texts = ENCODINGS + OTHERS
    assert [config.format_encoding(parse_encoding(text)) for text in texts] == texts
    parts = [part for text in texts for part in parse_encoding(text)]
    for kind in config.ENCODINGS.values():
        for field in dataclasses.fields(kind):
            values = {getattr(part, field.name) for part in parts if type(part) is kind}
            assert len(values) > 1, f"{kind.__name__}.{field.name} is never changed"


MODEL = ModelConfig(image_size=(160, 320), encoding="learned + peg(positions=(-1, 2))", drop_path=0.1)
DATA = DataConfig(name="arrangement", grid=(10, 12), pixels=2)
RUN = config.RunConfig(seed=3, precision="bf16", compile="model")
CONFIG = TrainConfig(MODEL, DATA, optim=config.OptimConfig(lr=0.1 + 0.2, steps=7), run=RUN)


def test_configurations_are_values_and_their_json_is_exact():
    text = to_json(CONFIG)
    assert from_json(TrainConfig, text) == CONFIG
    assert to_json(from_json(TrainConfig, text)) == text and "\n" not in text
    assert from_json(TrainConfig, "{}") == TrainConfig()
    assert DataConfig(image_size=(32, 32)) == DataConfig(image_size=32)  # one spelling; a square is a number
    assert '"image_size": 32,' in to_json(DataConfig(image_size=[32, 32]))
    wide = DataConfig(image_size=(32, 48))
    assert from_json(DataConfig, to_json(wide)) == wide and wide.shape == (32, 48)
    one, other = ModelConfig(encoding="peg(kernel=3)"), ModelConfig(encoding="peg")  # one spelling
    assert one == other and hash(one) == hash(other)
    assert replace(ModelConfig(), width=384, drop_path=0) == ModelConfig(width=384, drop_path=0.0)


def test_numbers_of_numpy_and_paths_are_pythons():
    run = config.RunConfig(seed=numpy.int64(3), out=Path("runs", "one"))
    assert run == config.RunConfig(seed=3, out="runs/one") and type(run.seed) is int
    sizes = [create_model("cpvt_tiny", depth=1, image_size=s).config.image_size for s in SIZES]
    assert sizes == [(32, 32)] * 3 and config.pair(numpy.int64(4)) == (4, 4)
    assert config.OptimConfig(lr=numpy.float64(0.5), steps=numpy.uint8(7)) == config.OptimConfig(
        lr=0.5, steps=7
    )
    assert_refused(["seed=0.5", "int"], config.RunConfig, seed=numpy.float32(0.5))
    assert replace(CONFIG, model=ModelConfig()).model == ModelConfig()
    assert_refused(["no option 'widht'; did you mean width"], replace, ModelConfig(), widht=384)
    assert_refused(["width='384'; expected int"], replace, ModelConfig(), width="384")


def test_wrong_models_are_refused_in_one_line():
    encodings = {
        "learnd": ["'learnd'", "learned"],
        "peg(kernel=4)": ["kernel=4", "odd"],
        "peg(positions=(0, 0))": ["positions=(0, 0)"],
        "peg(padding='none')": ["padding='none'", "skip=False"],
        "peg(padding='circular', compute='matrix')": ["compute='matrix'"],
        "peg(on='constant', convolution='dense')": ["on='constant'"],
        "sine(temperature=0)": ["temperature=0"],
        "sine(resize=raw)": ["plain values"],
        "peg +": ["cannot be read"],
        "peg(kernel=3, kernel=5)": ["NAME(option=value, ...)"],
        "__import__('os')": ["NAME(option=value, ...)"],
    }
    wrong = [({"image_size": (225, 224)}, ["(225, 224)", "multiples of the patch size"])]
    wrong += [
        ({"image_size": (224, 224, 3)}, ["2 whole numbers"]),
        ({"width": 100}, ["width=100", "heads=3"]),
    ]
    wrong += [({"distilled": True, "global_pool": "avg"}, ["distilled=True", "global_pool='avg'"])]
    wrong += [({"depth": 2.0}, ["depth=2.0", "int"]), *(({"encoding": e}, w) for e, w in encodings.items())]
    for values, words in wrong:
        assert_refused(words, ModelConfig, **values)
        assert_refused([], from_json, ModelConfig, json.dumps(values))


def test_wrong_json_is_refused_in_one_line():
    said = {"{": ["TrainConfig", "not JSON"], '{"run": {"precision": "fp8"}}': ["precision='fp8'", "'bf16'"]}
    said |= {'{"optim": {"rate": 0.1}}': ["TrainConfig: optim", "no option 'rate'"]}
    for text, words in (said | {'{"optim": {"steps": 1.5}}': ["optim: steps=1.5", "int"]}).items():
        assert_refused(words, from_json, TrainConfig, text)
    wrong = '{"optim": {"steps": ' + "9" * 5000 + "}}", '{"optim": {"lr": NaN}}'
    for text in ("[" * 100_000, *wrong, "[]", "3"):
        assert_refused(["TrainConfig"], from_json, TrainConfig, text)


NAN, HUGE, MANY = float("nan"), 10**5000, 10**9
TEXTS = [" + ".join(["peg"] * 10_000), "(" * 500 + "peg" + ")" * 400, "-" * 900 + "peg", "peg\0"]
TEXTS += [f"peg({option})" for option in (f"kernel={'-' * 900}3", f"kernel={'9' * 900}", "repeat=1000000")]
TEXTS += ["peg(positions={(): []}[0])"]
WRONG = {
    ModelConfig: {"mlp_ratio": [float("inf"), -1.0, 0.001], "init_std": [NAN, -1.0], "drop_path": [NAN]}
    | {"width": [HUGE, 3 * MANY], "depth": [MANY], "num_classes": [MANY], "image_size": [(16 * MANY,) * 2]}
    | {"patch_size": [2**20], "encoding": TEXTS},
    DataConfig: {"image_size": [(32, 32, 32), MANY, True], "name": [3], "grid": [(0, 4)]}
    | {"workers": [-2, 1000]},
    config.AugmentConfig: {"mixup": [NAN], "crop": [1]},
    config.OptimConfig: {"stop_loss": [NAN], "lr": [float("inf"), HUGE], "steps": ["many"]},
    config.DistillConfig: {"alpha": [NAN]},
    config.RunConfig: {"out": [None], "freeze": [-2]},
    config.Peg: {"kernel": [3.0]},
    config.Sine: {"temperature": [NAN]},
    TrainConfig: {"model": ["cpvt_tiny"]},
}
BESIDE = {"patch_size": {"image_size": (2**20,) * 2}, "alpha": {"teacher": "resnet10t"}}
BESIDE |= {"workers": {"store": "files"}}


@pytest.mark.parametrize("build", WRONG)
def test_what_makes_no_sense_is_refused_however_it_is_made(build):
    """In Python, by `replace`, and from JSON, where that can say it; in one line that can be read."""
    for name, value in ((name, value) for name, values in WRONG[build].items() for value in values):
        values = {name: value, **BESIDE.get(name, {})}
        assert len(assert_refused([], build, **values)) < 400
        assert_refused([], replace, build(), **values)
        if value != HUGE:
            assert_refused([], from_json, build, json.dumps(values))


@pytest.mark.parametrize(
    ("build", "values", "acting"),
    [
        (DataConfig, {"store": "files", "stored_size": 64}, {"store": "memory"}),
        (DataConfig, {"decode": "cpu"}, {"store": "files"}),
        (DataConfig, {"workers": 4}, {"store": "files"}),
        (config.AugmentConfig, {"crop_scale": (0.5, 1.0)}, {"crop": True}),
        (config.AugmentConfig, {"mixup": 0.8, "mixup_switch_prob": 0.3}, {"cutmix": 1.0}),
        (config.OptimConfig, {"warmup_steps": 3, "warmup_epochs": 1, "epochs": 2}, {"warmup_epochs": 0}),
        (config.DistillConfig, {"weights": "file.pth"}, {"teacher": "resnet10t"}),
        (config.DistillConfig, {"alpha": 0.3}, {"teacher": "resnet10t"}),
        (config.RunConfig, {"save_every": 5}, {"out": "runs/x"}),
        (config.RunConfig, {"keep_checkpoints": 5}, {"out": "runs/x"}),
    ],
)
def test_an_option_without_effect_is_refused_until_it_has_one(build, values, acting):
    assert_refused(["no effect", next(n for n in reversed(values) if n not in acting)], build, **values)
    build(**{**values, **acting})
