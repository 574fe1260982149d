"""Photographs: prepared once, by area averaging; models and batches that pairs of rows share; baselines."""

from itertools import combinations
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from encoded import refusal
from helpers import draw_images, make_result

from cpvt.config import DataConfig, replace
from cpvt.data.transforms import area_resize
from cpvt.lab import photographs
from cpvt.lab.experiments import jobs, photograph_config, photograph_loader
from cpvt.lab.photographs import check_images, nearest_neighbour, open_photographs, softmax_regression
from cpvt.lab.results import append, complete
from cpvt.model.vit import VisionTransformer


@pytest.fixture
def few(tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "CLASSES", 2)
    monkeypatch.setattr(photographs, "COUNTS", {"train": 8, "val": 4})
    draw_images(tmp_path / "tiny-imagenet-200", train=8, val=4, classes=2, sides=(64, 65))
    return tmp_path


def test_a_new_pixel_is_the_mean_of_what_it_covers():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    for size in (32, 16):
        exact = F.adaptive_avg_pool2d(images.double(), size)
        found = area_resize(images, torch.tensor((0, 0, 64, 64)), (size, size))
        assert (found.double() - exact).abs().max() <= 0.501
    assert torch.equal(area_resize(images, torch.tensor((0, 0, 64, 64)), (64, 64)), images)
    boxes = torch.tensor([[0, 0, 48, 48], [8, 8, 48, 48], [16, 0, 48, 48]])  # each image has its own
    found = area_resize(images, boxes, (24, 24))
    for image, (top, left, high, wide), one in zip(images, boxes.tolist(), found, strict=True):
        exact = F.avg_pool2d(image[:, top : top + high, left : left + wide].double(), 2)
        assert (one.double() - exact).abs().max() <= 0.501
    # Fractions: the mean over a box is the mean of what it covers, whatever the size.
    box = torch.tensor((0.0, 64 * 12 / 56, 64.0, 64 * 32 / 56))
    ramp = torch.arange(64, dtype=torch.uint8).expand(1, 3, 64, 64)
    found = area_resize(ramp, box, (56, 32)).double()
    assert found.shape == (1, 3, 56, 32) and abs(found.mean().item() - (64 * 28 / 56 - 0.5)) < 0.5
    assert (found.diff(dim=3) >= 0).all() and (found.diff(dim=2).abs() <= 1).all()


def test_prepared_once_and_the_same_from_the_published_archive(few, tmp_path_factory):
    """The archive has its held-out images in one folder, with a list in another order."""
    data = replace(photograph_config(encoding="none").data, root=str(few))
    train, val = (open_photographs(data, split) for split in ("train", "val"))
    assert train.images.shape == (16, 3, 64, 64) and val.labels.tolist() == [0] * 4 + [1] * 4
    written = (few / photographs.FILE).stat().st_mtime_ns
    assert open_photographs(data, "val", cache={}).images.shape[0] == 8
    assert (few / photographs.FILE).stat().st_mtime_ns == written
    other = tmp_path_factory.mktemp("published") / "tiny-imagenet-200"
    lines = []
    for folder in sorted((few / "tiny-imagenet-200").glob("*/*")):
        for file in sorted(folder.iterdir(), reverse=True):
            inside = "val/images" if folder.parent.name == "val" else f"train/{folder.name}/images"
            name = f"{folder.name}-{file.name}" if "val" in inside else file.name
            (other / inside).mkdir(parents=True, exist_ok=True)
            (other / inside / name).write_bytes(file.read_bytes())
            lines += [f"{name}\t{folder.name}\t0\t0"] if "val" in inside else []
    (other / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    again = photographs.sha256_of_files(str(other.parent))
    assert again == photographs.sha256_of_files(str(few))


def test_half_an_archive_other_images_and_none_are_refused_by_name(few, tmp_path):
    data = replace(DataConfig(), root=str(few))
    missing = sorted((few / "tiny-imagenet-200" / "train").glob("*/*"))[-1]
    kept = missing.read_bytes()
    missing.unlink()
    words = refusal(open_photographs, data, "train")
    assert missing.parent.name in words and "7 images; expected 8" in words
    missing.write_bytes(kept)
    photographs.CLASSES = 3  # put back by the fixture
    assert "2 classes; expected the 3 or 200" in refusal(photographs.whole_split, few, "val")
    photographs.CLASSES = 2
    assert not list(few.glob("*.safetensors")), "nothing half-written"
    row = make_result("photographs", columns=complete("photographs", {"encoding": "peg"}))
    append(row, tmp_path / "rows")
    check_images(few, tmp_path / "none")  # no rows: any images will do
    assert "other images" in refusal(check_images, few, tmp_path / "rows")


def test_rows_share_the_weights_that_they_share_by_name():
    """Whatever else a model has: a layer of one name and shape starts equal at equal seed, and another seed
    changes what is random in it."""
    first = {}
    for job in jobs("photographs"):
        if job.config.run.seed < 2:
            model = VisionTransformer(job.config.model)
            model.draw(job.config.run.seed)
            shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
            layer = {
                name: shapes.get(name.replace(".bias", ".weight")) for name in shapes
            }  # decides a bias, too
            own = {(name, shapes[name], layer[name]): p for name, p in model.named_parameters()}
            first[tuple(job.columns.items()), job.config.run.seed] = own
    rows = [row for row, seed in first if seed == 0]
    assert len(rows) > 35
    for one, other in combinations(rows, 2):
        a, b = first[one, 0], first[other, 0]
        assert len(a.keys() & b.keys()) >= 0.8 * min(len(a), len(b)) or "frozen" in str((one, other))
        assert all(torch.equal(a[name], b[name]) for name in a.keys() & b.keys()), (one, other)
    for row, seed in first:
        if seed == 1:
            same = [name for name, p in first[row, 1].items() if torch.equal(p, first[row, 0][name])]
            assert all(first[row, 1][name].unique().numel() == 1 for name in same)  # zeros and ones


def test_a_draw_leaves_the_distribution_of_each_layer():
    """The same deviations as PyTorch's and DeiT's first weights, in a model of every kind of layer."""
    kinds = "learned + relative + peg + peg(positions=(1,), init='twins')"
    config = photograph_config(encoding=kinds, stem="conv").model
    torch.manual_seed(0)
    fresh, drawn = VisionTransformer(config), VisionTransformer(config)
    state = torch.random.get_rng_state()
    drawn.draw(0)
    assert torch.equal(torch.random.get_rng_state(), state)
    for (name, a), b in zip(fresh.named_parameters(), drawn.parameters(), strict=True):
        if a.std() == 0 or a.numel() == 1:
            assert torch.equal(a, b), name
        else:
            assert not torch.equal(a, b) and 0.6 < (b.std() / a.std()).item() < 1.6, name


def test_rows_see_the_same_images_squares_and_mirrors_at_equal_seed(few):
    batches = {}
    for job in jobs("photographs", root=str(few)):
        row = (*job.columns.items(),)
        if job.config.run.seed == 0 and row not in batches:
            options = dict(seed=0, global_batch_size=4, augment=job.config.augment, label_smoothing=0.1)
            batches[row] = photograph_loader(job.config.data, **options).batch(5), job.columns["shifted"]
    plain = [batch for batch, shifted in batches.values() if not shifted]
    moved = [batch for batch, shifted in batches.values() if shifted]
    assert len(plain) > 30 and len(moved) == 4
    for group in (plain, moved):
        assert all(torch.equal(a, b) for one in group for a, b in zip(one, group[0], strict=True))
    assert torch.equal(plain[0][1], moved[0][1]) and not torch.equal(plain[0][0], moved[0][0])


def test_baselines_find_what_they_can():
    torch.manual_seed(0)
    labels = torch.randint(100, (3000,))
    centres = torch.randn(100, 40)
    x = centres[labels] + 0.3 * torch.randn(3000, 40)
    train, test = slice(0, 2500), slice(2500, None)
    for found in (
        softmax_regression(x[train], labels[train], x[test], 1e-2, 0.01),
        nearest_neighbour(x[train], labels[train], x[test]),
    ):
        assert (found == labels[test]).double().mean() > 0.9
    brute = torch.cdist(x[test], x[train]).argmin(1)
    assert torch.equal(nearest_neighbour(x[train], labels[train], x[test]), labels[train][brute])


def test_baselines_that_are_measured_are_not_measured_again(few, tmp_path, monkeypatch):
    never = mock.Mock(side_effect=AssertionError("measured again"))
    seen, rows = [], tmp_path / "rows"
    monkeypatch.setattr(photographs, "LINEAR_GRID", [(1e-3, 0.1)])
    monkeypatch.setattr(photographs, "softmax_regression", lambda x, y, test, *_: y[:1].expand(len(test)))
    photographs.measure_baselines(str(few), rows, lambda result, left: seen.append((result.columns, left)))
    assert [left for _, left in seen] == [5, 4, 3, 2, 1, 0] and seen[0][0] == dict(baseline="chance", grid=8)
    monkeypatch.setattr(photographs, "BASELINES", dict.fromkeys(photographs.BASELINES, never))
    photographs.measure_baselines(str(few), rows)
