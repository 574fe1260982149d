"""Every row of every table is a configuration that trains; the same name is the same run."""

import dataclasses

import numpy
import pytest
import torch
from PIL import Image

from cpvt.config import TrainConfig, from_json, replace, to_json
from cpvt.data.loader import normalise, open_batches
from cpvt.data.transforms import crop_boxes
from cpvt.errors import ConfigError
from cpvt.lab.experiments import EXPERIMENTS, planned_rows, run_missing, tables
from cpvt.lab.metrics import spread_images
from cpvt.lab.results import read_rows
from cpvt.lab.tables import PIXELS, SEEDS, SIZES, TABLES, changed, rows, scale_model, score_scale
from cpvt.lab.teacher import teach
from cpvt.training.optim import resolved
from cpvt.training.train import train

ROWS = {row.name: row for row in rows()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Tiny-ImageNet in miniature: two classes, eight and four images of 64 pixels."""
    root = tmp_path_factory.mktemp("images")
    rng = numpy.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for label in range(2):
            folder = root / "tiny-imagenet-200" / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (64, 64, 3)).astype("uint8")
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def short(config: TrainConfig, root) -> TrainConfig:
    """Two steps on a CPU, at a sixth of the width; everything that makes the row stays."""
    config = changed(
        config,
        {
            "model": {"width": 32, "heads": 2},
            "data": {"root": str(root)},
            "optim": {"global_batch_size": 4, "epochs": 0, "steps": 2, "warmup_steps": 1, "warmup_epochs": 0},
            "run": {"device": "cpu", "precision": "fp32", "compile_blocks": False},
        },
    )
    return replace(config, data=replace(config.data, limit=min(config.data.limit, 8)))


def test_a_name_is_one_configuration():
    for row in rows():
        assert row.config() == ROWS[row.name].config(), row.name
        assert row.rank in SEEDS
    assert len({row.config() for row in ROWS.values()}) == len(ROWS)
    assert len({(row.table, row.name) for row in rows()}) == len(list(rows()))
    for row in rows():  # a row that a claim rests on is not measured less often for another table
        assert ROWS[row.name].rank == row.rank, row.name


def test_the_grids_are_those_of_the_paper():
    assert [size // PIXELS for size in SIZES] == [160 // 16, 224 // 16, 384 // 16, 448 // 16, 512 // 16]
    assert scale_model("peg").model.grid == (14, 14)
    assert set(TABLES) == {
        "encodings",
        "placement",
        "parameters",
        "padding",
        "resolution",
        "global_pool",
        "length",
    }


@pytest.mark.parametrize("name", ROWS)
def test_every_row_trains_and_is_scored(name, root):
    run = train(teach(short(ROWS[name].config(), root)))
    assert run.steps == 2 and numpy.isfinite(run.history[-1]["loss"]) and run.metrics["images"] == 8
    metrics, _, _ = score_scale(run, images=4)
    assert {"top1@10", "top1@32", "top1@14x28", "same_class/shift4", "position_r2/images"} <= metrics.keys()
    assert all(numpy.isfinite(value) for value in metrics.values())
    # Without padding the map is smaller, and has no counterpart under a shift.
    assert ("shift_error/window/border" in metrics) == (name != "no padding")
    blocks = run.model.config.depth - run.model.config.mlp_only_blocks
    seen = [key for key in metrics if key.startswith("attention_distance")]
    assert len(seen) == (1 if name == "no padding" else blocks)


def test_parts_of_the_images_keep_the_number_of_steps():
    whole = ROWS["learned"].config()
    for images in (5_000, 15_000):
        part = ROWS[f"learned, {images:,} images"].config()
        assert part.data.limit == images
        both = resolved(whole, 50_000 // 1024).optim, resolved(part, images // 1024).optim
        assert both[0].steps == both[1].steps and both[0].warmup_steps == both[1].warmup_steps


@pytest.mark.parametrize("name", ["sine", "rotary", "five PEGs", "learned"])
def test_scores_of_a_row(name, root):
    run = train(short(ROWS[name].config(), root))
    metrics, dataset, digest = score_scale(run, images=8)
    assert dataset == "tiny-imagenet" and len(digest) == 64
    sizes = {f"top1@{tokens}" for tokens in (10, 14, 24, 28, 32)}
    assert sizes <= metrics.keys() and metrics["top1@14"] == run.metrics["top1"]
    shifts = {f"shift{pixels}" for pixels in (0, 1, 2, 4, 6)}
    others = {key.partition("/")[2] for key in metrics if key.startswith("top1@") and "/" in key}
    rules = {"sine": {"resample", "rescale"}, "rotary": {"rescale"}}.get(name, set())
    assert others - shifts == rules | {"logn"} and "top1@14/logn" not in metrics  # there the factor is 1
    assert {"position_r2/images", "position_r2/noise/interior", "shift_error/window"} <= metrics.keys()
    assert shifts <= others and {"top1@14x28", "attention_distance/block5"} <= metrics.keys()
    assert all(value <= 1 + 1e-9 for key, value in metrics.items() if key.startswith("position_r2"))


def test_larger_tests_show_detail_and_not_blur(root):
    """A picture of 64 pixels is shown whole at 64: the very pixels that lie on the disk."""
    config = short(ROWS["none"].config(), root)
    batches = open_batches(replace(config.data, image_size=64), 1, 0)
    images, _ = next(iter(batches.test()))
    assert torch.equal(images, normalise(batches.held_out.images.float() / 255))


def test_rows_are_plain_data():
    for row in ROWS.values():
        assert from_json(TrainConfig, to_json(row.config())) == row.config()


def test_log_n_attention_trains_as_the_plain_model_does(root):
    """At the trained size its factor is 1: so it is a test of the trained weights, and no row of its own."""
    plain = short(ROWS["one PEG"].config(), root)
    found = [train(changed(plain, {"model": {"logn_scale": on}})).model for on in (False, True)]
    for one, other in zip(*(model.parameters() for model in found), strict=True):
        assert torch.equal(one, other)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(found[0](images), found[1](images))


def test_rows_without_scale_jitter_still_see_pictures_moved():
    augment = ROWS["none, without scale jitter"].config().augment
    sides = torch.full((64,), 64)
    boxes = crop_boxes(augment, 0, 0, torch.arange(64), sides, sides)
    assert (boxes[:, 2:] == 56).all() and boxes[:, 0].unique().tolist() == boxes[:, 1].unique().tolist()
    assert set(boxes[:, 0].tolist()) == set(range(9))


def test_a_table_alone():
    wanted = {row.name for row in rows() if row.table == "padding"}
    assert {plan.row for plan in planned_rows("tables", table="padding")} == wanted
    with pytest.raises(ConfigError, match="no table 'pading'; did you mean padding"):
        list(planned_rows("tables", table="pading"))


def test_every_class_has_a_part_in_what_is_scored(root):
    """Held-out images stand class by class; the first of them would be of one class."""
    batches = open_batches(short(ROWS["none"].config(), root).data, 1, 0, train=False)
    assert batches.held_out.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    images, labels = spread_images(batches, 4)
    assert labels.tolist() == [0, 0, 1, 1] and images.shape == (4, 3, 28, 28)
    everything, _ = next(iter(batches.test()))
    assert torch.equal(images, everything[[0, 2, 4, 7]])


def test_the_rows_behind_claims_come_first_and_each_run_once():
    planned = list(tables())
    assert len({(p.row, p.config.run.seed) for p in planned}) == len(planned)
    ranks = [ROWS[p.row].rank for p in planned]
    assert ranks == sorted(ranks, key=list(SEEDS).index)
    claims = [p.config.run.seed for p in planned if ROWS[p.row].rank == "claim"]
    assert claims == sorted(claims) and set(claims) == set(range(5))


def test_rows_are_measured_in_order_and_resumed(root, tmp_path, monkeypatch):
    few = [dataclasses.replace(p, config=short(p.config, root)) for p in list(tables())[:2]]
    monkeypatch.setitem(EXPERIMENTS, "tables", lambda root: iter(few))
    assert run_missing("tables", tmp_path, budget_minutes=1e-9, root="") == 1
    assert run_missing("tables", tmp_path, root="") == 0
    found = read_rows("tables", tmp_path)
    assert [row.row for row in found] == [p.row for p in few] and found[0].device == "cpu"
    assert found[0].config["model"]["width"] == 32 and "top1@32" in found[0].metrics
