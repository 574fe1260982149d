"""What becomes of a trained model: other classes, other sizes, a part of it trained; scores; predictions."""

import shutil
from pathlib import Path

import numpy
import pytest
import torch
from encoded import put
from helpers import draw_images, run_cli, small_run
from models import assert_refused
from PIL import Image
from safetensors.torch import load_file, save_file

from cpvt import attach_peg, create_model
from cpvt.config import DataConfig, Peg, TrainConfig, parse_encoding, replace, to_json
from cpvt.data.datasets import open_dataset
from cpvt.data.loader import make_loader
from cpvt.data.pack import pack
from cpvt.data.transforms import normalise
from cpvt.errors import UserError
from cpvt.model.encodings import PEG
from cpvt.model.zoo import load_weights
from cpvt.training.checkpoint import Checkpoints, first_difference, load_saved, save_model
from cpvt.training.distributed import World
from cpvt.training.evaluate import accuracy
from cpvt.training.predict import as_evaluated, predict
from cpvt.training.train import Trainer, train

NAMES = ("n00000000", "n00000001", "n00000002")


def configured(root: Path, out="", **changes) -> TrainConfig:
    config = small_run(root, str(out), **{"steps": 2, **changes})
    return replace(config, model=replace(config.model, encoding="learned + peg(positions=(-1, 0))"))


@pytest.fixture(scope="module")
def trained(image_folder, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train(configured(image_folder, out))
    return out


@pytest.fixture(scope="module")
def others(image_folder, tmp_path_factory) -> dict[int, Path]:
    """Folders of images: two classes; three with other names than those of `image_folder`."""
    root = tmp_path_factory.mktemp("others")
    draw_images(root / "two", train=8, val=4, classes=2)
    shutil.copytree(image_folder, root / "three")
    for split in ("train", "val"):
        (root / "three" / split / NAMES[1]).rename(root / "three" / split / "n00000001b")
    return {2: root / "two", 3: root / "three"}


def test_other_classes_get_a_new_head_and_the_body_stays(trained, others, image_folder, tmp_path):
    file = trained / "model.safetensors"
    kept = load_file(file)
    save_file(kept, nameless := tmp_path / "nameless.safetensors")
    headless = {name: value for name, value in kept.items() if not name.startswith("head")}
    torch.save({"state_dict": headless}, tmp_path / "headless.pth")
    for root, source, words, new in (
        (image_folder, file, "", False),
        (others[2], file, "a new head is drawn (3 classes there, 2 here)", True),
        (others[3], file, "a new head is drawn (class 1 is 'n00000001' there, 'n00000001b' here)", True),
        (others[3], nameless, "the names of its classes are not known", False),
        (image_folder, tmp_path / "headless.pth", "a new head is drawn (0 classes there, 3 here)", True),
    ):
        said = []
        config = configured(root, init=str(source))
        config = replace(config, augment=replace(config.augment, repeated_aug=1))
        trainer = Trainer(config, World(), announce=said.append)
        assert words in said[0] and (" head " in said[0]) == bool(words), said
        state = trainer.model.state_dict()
        for name, value in kept.items():
            same = state[name].shape == value.shape and torch.equal(state[name], value)
            assert same != (new and name.startswith("head")), (words, name)
    config = configured(image_folder, init=str(file))
    body = replace(config, model=replace(config.model, width=24))
    assert_refused(["do not fit", "pos_embed has 1x17x16, expected 1x17x24"], train, body)


TRAINS = {
    0: "pos_embed cls_token patch_embed encoding.peg.-1 encoding.peg.0 blocks.0",
    1: "blocks.1 norm head",
}
TRAINS |= {-1: "head"}


@pytest.mark.parametrize("blocks", TRAINS)
def test_what_is_frozen_stays_bit_for_bit_and_the_rest_learns(trained, image_folder, tmp_path, blocks):
    """Weights and average; and a run that is cut and goes on ends as one that is not."""
    kept, trains = load_file(trained / "model.safetensors"), TRAINS[blocks].split()
    options = {"freeze": blocks, "lr": 1e-2, "warmup_steps": 0, "steps": 4, "save_every": 2}
    options |= {"init": str(trained / "model.safetensors")}
    runs = [configured(image_folder, tmp_path / name, **options) for name in ("whole", "cut")]
    run = train(runs[0])
    changed = {name for name, value in run.model.state_dict().items() if not torch.equal(value, kept[name])}
    assert {n for n in trains if not any(name.startswith(n) for name in changed)} == set()
    if blocks:
        assert all(name.startswith(tuple(trains)) for name in changed), changed
        assert {name for name, p in run.model.named_parameters() if p.requires_grad} == changed
    average = load_file(tmp_path / "whole" / "model_ema.safetensors")
    assert {name for name, value in average.items() if not torch.equal(value, kept[name])} == changed
    last = load_saved(tmp_path / "whole" / "checkpoints" / "step-000000004.pt").model.state_dict()
    torch.testing.assert_close(last, average, rtol=0, atol=0)
    (tmp_path / "cut" / "checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "whole" / "checkpoints" / "step-000000002.pt", tmp_path / "cut" / "checkpoints")
    assert train(runs[1]).metrics == run.metrics
    one, two = (Checkpoints(Path(c.run.out) / "checkpoints").read(4) for c in runs)
    for part in ("model", "ema"):
        torch.testing.assert_close(one[part], two[part], rtol=0, atol=0)
    assert_refused(["run.freeze=3", "model.depth=2"], replace, runs[0], run=replace(runs[0].run, freeze=3))


@pytest.mark.parametrize("store", ["files", "memory"])
def test_images_that_are_no_squares(image_folder, tmp_path, store):
    """With every part of the recipe, in training and in evaluation; the JSON tells both sides."""
    config = configured(image_folder, tmp_path, store=store)
    config = replace(config, data=replace(config.data, image_size=(16, 24)))
    run = train(config)
    assert run.model.config.image_size == (16, 24) and run.metrics["images"] == 21
    assert '"image_size": [16, 24], "store"' in to_json(config)
    loader = make_loader(config.data, seed=0, global_batch_size=8, augment=config.augment)
    assert loader.batch(0)[0].shape == (8, 3, 16, 24)
    file = tmp_path / "model.safetensors"
    scores = accuracy(load_saved(file).model, loader.eval_batches())
    assert scores == {name: run.metrics[name] for name in scores}
    turned = replace(config, data=replace(config.data, image_size=(24, 16)), run=replace(config.run, out=""))
    model = Trainer(replace(turned, run=replace(turned.run, init=str(file))), World()).model
    assert model.pos_embed.shape[1] == 25 and not torch.equal(model.pos_embed, run.model.pos_embed)


def test_evaluation_of_whatever_holds_a_model(trained, others, image_folder, tmp_path, capsys):
    """A model, its average, a checkpoint in mid-run, a file without names, a name with weights."""
    kept = load_file(trained / "model.safetensors")
    _, config, *_ = load_saved(trained / "model.safetensors")
    save_file(kept, old := tmp_path / "old.safetensors", metadata={"config": to_json(config)})
    model, average = (trained / f"{name}.safetensors" for name in ("model", "model_ema"))
    checkpoint, scores = trained / "checkpoints" / "step-000000002.pt", {}
    for file in (model, average, checkpoint, old):
        status, out, err = run_cli(capsys, "evaluate", file, "--sizes", 16, "16x24", "--device", "cpu")
        assert not status and [line.split()[1] for line in out.splitlines()[-2:]] == ["16x16", "16x24"], err
        scores[file] = out.splitlines()[-2:]
        assert ("the average of the weights after step 2" in out) == (file == checkpoint)
    assert scores[model] == scores[old] and scores[average] == scores[checkpoint]
    given = load_saved(checkpoint)
    torch.testing.assert_close(given.model.state_dict(), load_file(average), rtol=0, atol=0)
    assert given.classes == load_saved(model).classes == NAMES
    refused = [
        (model, ["--data", others[3]], "class 1 is 'n00000001' there, 'n00000001b' here"),
        (model, ["--data", others[2]], "has 2 classes, the model 3"),
        (model, ["--data", "where"], "trained on"),
        (model, ["--sizes", "16y24"], "'16y24'"),
        (model, ["--sizes", "17"], "multiples of 4"),
        (model, ["--weights", old], "has its own"),
        (model, ["--root", tmp_path], "data.root="),
        (trained / "log.jsonl", [], "model.safetensors or a step-*.pt"),
        ("deit_tny", [], "did you mean deit_tiny"),
        ("deit_tiny", ["--data", image_folder], "--weights"),
        ("deit_tiny", ["--weights", old], "give --data"),
    ]
    for source, options, words in refused:
        status, out, err = run_cli(capsys, "evaluate", source, *options, "--device", "cpu")
        assert status == 2 and words in err and err.count("\n") == 1, (words, err)
    # At the size that the table of positions is for, unless another is given.
    state = create_model("deit_tiny", num_classes=3, image_size=64).state_dict()
    torch.save({"model": state}, tmp_path / "w.pth")
    named = ("deit_tiny", "--weights", tmp_path / "w.pth", "--data", image_folder, "--device", "cpu")
    for sizes, words in ((), "folder 64x64  top1"), (("--sizes", "32x48"), "folder 32x48  top1"):
        status, out, err = run_cli(capsys, "evaluate", *named, *sizes)
        assert not status and words in out and "images 21" in out, err


def test_a_class_is_the_same_however_its_accents_are_spelt():
    assert (
        first_difference(("caf\u00e9", "th\u00e9"), ("cafe\u0301", "the"))
        == "class 1 is 'th\u00e9' there, 'the' here"
    )


def test_prediction_by_name_and_what_was_looked_at(trained, image_folder, tmp_path, capsys):
    file, images = trained / "model.safetensors", sorted(image_folder.rglob("val/*1/*.jpg"))[:2]
    put(tmp_path / "broken.png", b"no image")
    options = ("--model", file, "--attention", tmp_path / "seen.png", "--device", "cpu")
    status, out, err = run_cli(capsys, "predict", images[0], tmp_path / "broken.png", images[1], *options)
    assert status == 2 and err.count("\n") == 1 and "broken.png cannot be read" in err
    lines, saved = out.splitlines(), load_saved(file)
    loader = make_loader(saved.config.data, seed=0, train=False)
    shown = next(loader.eval_batches())[0][7:9]  # of class 1
    with torch.no_grad():
        expected = saved.model(shown).softmax(-1)
    for path, line, probabilities in zip(images, lines, expected, strict=False):
        order = probabilities.argsort(descending=True)
        assert line == f"{path}  " + ", ".join(f"{NAMES[i]} {probabilities[i]:.1%}" for i in order)
        pixels = as_evaluated(saved, path)
        torch.testing.assert_close(normalise(pixels[None].float() / 255)[0], shown[images.index(path)])
        guesses = predict(saved, pixels)[0]
        saved.model.train()
        assert predict(saved, pixels)[0] == guesses and saved.model.train()
        assert_refused(["float32", "uint8"], predict, saved, pixels / 255)
        assert float(predict(saved, pixels)[1].sum()) < 1  # the class token reads from itself, too
    seen = numpy.array(Image.open(tmp_path / "seen.png"))
    assert seen.shape[:2] == (32, 32)
    assert seen[:16, :16].tolist() == as_evaluated(saved, images[0]).permute(1, 2, 0).tolist()
    odd = shutil.copy(images[0], tmp_path / "one\ntwo.jpg")
    status, out, err = run_cli(capsys, "predict", odd, "--model", file, "--device", "cpu")
    assert not status and "one\\ntwo.jpg  n0" in out and out.count("\n") == 1
    missing, seen = tmp_path / "no" / "seen.png", (*images, "--model", file, "--attention")
    for words, arguments in {
        "cannot be read": (*images, "--model", image_folder),
        "is the name of a model": (*images, "--model", "deit_tiny"),
        "--top 0; expected 1": (*images, "--model", file, "--top", 0),
        "seen; expected NAME.png": (*seen, "seen"),
        "in a folder that is there": (*seen, missing),
        "one image": ("--model", file),
        "a\\nb\\x1b[2J cannot": ("a\nb\x1b[2J", "--model", file),
    }.items():
        status, out, err = run_cli(capsys, "predict", *arguments, "--device", "cpu")
        assert status == 2 and words in err and not out, (words, err)


MODEL = create_model("cpvt_tiny", depth=1, width=24, image_size=32, num_classes=3).eval()
IMAGES, LABELS = torch.rand(2, 3, 32, 32), torch.tensor([0, 2])
WRONG = {  # what is asked for in a wrong way: a call, and what its one line says
    "pixels as bytes": (lambda: MODEL((255 * IMAGES).byte()), "torch.uint8; expected floating point"),
    "no batch": (lambda: MODEL(IMAGES[0]), "(3, 32, 32); expected (B, 3, height, width)"),
    "channels last": (lambda: MODEL(IMAGES.permute(0, 2, 3, 1)), "(2, 32, 32, 3); expected (B, 3"),
    "no pixels": (lambda: MODEL(IMAGES[:, :, :0]), "0x32 pixels; expected multiples of 16"),
    "a class too many": (lambda: accuracy(MODEL, [(IMAGES, LABELS + 1)]), "expected 0 to 2"),
    "a label too many": (
        lambda: accuracy(MODEL, [(IMAGES, LABELS.repeat(2))]),
        "2 images, labels of shape (4,)",
    ),
    "bytes to score": (lambda: accuracy(MODEL, [((255 * IMAGES).byte(), LABELS)]), "torch.uint8"),
    "no model to score": (
        lambda: accuracy("deit_tiny", [(IMAGES, LABELS)]),
        "model='deit_tiny', of type str",
    ),
    "no name": (lambda: create_model(3), "model=3, of type int; expected str or ModelConfig"),
    "a size in letters": (lambda: create_model("cpvt_tiny", image_size="224"), "image_size='224'"),
    "weights by number": (lambda: load_weights(MODEL, 3), "weights=3, of type int"),
    "weights of a model": (
        lambda: load_weights(MODEL, MODEL),
        "of type VisionTransformer; expected str or Path",
    ),
    "a PEG by name": (lambda: PEG("24"), "width='24'"),
    "a PEG of images": (lambda: PEG(8)(torch.rand(2, 8, 4, 4), (4, 4)), "pass grid=(H, W)"),
    "a PEG of another width": (lambda: PEG(8)(torch.rand(2, 16, 4), (4, 4)), "expected (B, N, 8)"),
    "a PEG with a side": (lambda: PEG(8)(torch.rand(2, 16, 8), 4), "grid=4"),
    "PEGs for a name": (lambda: attach_peg("deit_tiny"), "expected Module"),
    "a recipe's name": (lambda: train("plain"), "config='plain', of type str; expected TrainConfig"),
    "a folder's name": (
        lambda: make_loader("folder", seed=0),
        "data='folder', of type str; expected DataConfig",
    ),
    "no images a step": (lambda: make_loader(DataConfig(), seed=0, global_batch_size=0), "an image or more"),
    "a process too many": (lambda: make_loader(DataConfig(), seed=0, rank=2, world_size=2), "process 2 of 2"),
    "data by number": (lambda: open_dataset(3), "name_or_path=3"),
    "no split": (lambda: open_dataset("folder", None), "split=None"),
    "a file by number": (lambda: load_saved(3), "source=3"),
    "nothing to save": (
        lambda: save_model("x.safetensors", "m", TrainConfig()),
        "expected VisionTransformer",
    ),
    "to be packed by number": (lambda: pack(3, "packed"), "source=3"),
    "an encoding's object": (lambda: parse_encoding(Peg()), "text=Peg("),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_call_is_told_at_the_door(what):
    call, words = WRONG[what]
    with pytest.raises((UserError, TypeError, ValueError)) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value)
