"""What moves along with a picture: against a direct computation on small models, and what theory says is exact."""

import pytest
import torch

from cpvt.config import ModelConfig
from cpvt.data.transforms import normalise
from cpvt.lab import shifting
from cpvt.lab.pictures import photograph
from cpvt.lab.plots import show_change
from cpvt.lab.styles import figure
from cpvt.model.vit import VisionTransformer

SIZES = dict(image_size=(32, 32), patch_size=4, num_classes=5, width=16, depth=3, heads=2, init_std=0.1)
IMAGE = photograph("chelsea", 32)
CIRCULAR = "peg(padding='circular')"


def model_with(encoding: str) -> VisionTransformer:
    torch.manual_seed(0)
    return shifting.exact_copy(VisionTransformer(ModelConfig(encoding=encoding, **SIZES)))


@pytest.mark.parametrize("encoding", ["none", "learned", "peg", CIRCULAR])
def test_maps_and_answers_are_the_models_own(encoding):
    model = model_with(encoding)
    maps = shifting.token_maps(model, IMAGE)
    x = normalise(IMAGE.double())[None]
    with torch.no_grad():
        found = model.forward_intermediates(x, intermediates_only=True)
        wanted = model(x).softmax(-1)
        patches = model.patch_embed(x)[0].transpose(1, 2).unflatten(2, (8, 8))[0]
    for one, other in zip(maps[1:], found, strict=True):
        assert torch.allclose(one, other[0])
    assert torch.allclose(shifting.probabilities(model, [IMAGE, IMAGE]), wanted.expand(2, -1))
    added = shifting.added_map(model, IMAGE)
    if encoding in ("none", "learned"):
        assert torch.allclose(added, maps[0] - patches)
    else:
        with torch.no_grad():
            x, grid = model.embed(x)
            x = model.blocks[0](x, model.encoding, 0, grid)[0, 1:].T.unflatten(1, (8, 8))
        assert torch.allclose(added, maps[1] - x)


@pytest.mark.parametrize(
    "encoding, pixels, exact",
    [("none", 8, (64, 64, 64)), (CIRCULAR, 8, (64, 64, 64)), ("learned", 8, (0, 0, 0))]
    + [("peg", 8, (64, 32, 0)), ("peg", 4, (64, 40, 0)), ("none", 2, (0, 0, 0)), (CIRCULAR, 2, (0, 0, 0))],
)
def test_exact_tokens_on_the_ring(encoding, pixels, exact):
    moved = shifting.slide_on_ring(IMAGE, pixels)
    for block, count in zip((-1, 0, 1), exact, strict=True):
        view = shifting.shifted_view(model_with(encoding), IMAGE, moved, pixels, block)
        assert int((view.change == 0).sum()) == count


def test_the_change_is_relative_to_a_token_and_new_content_is_not_compared():
    before = torch.randn(6, 8, 8, dtype=torch.float64)
    after = before.roll(2, -1)
    after[:, 3, 4] += 1
    change = shifting.shift_change(before, after, pixels=8, patch=4)
    size = before.square().sum(0).mean().sqrt()
    assert change[3, 4] == pytest.approx(float(6**0.5 / size)) and (change != 0).sum() == 1
    assert torch.equal(change, shifting.shift_change(before, after, pixels=7, patch=4))  # the nearer one
    for pixels, columns in ((8, [0, 1]), (-8, [6, 7])):
        new = shifting.shift_change(before, after, pixels, 4, wrap=False).isnan().all(0)
        assert new.nonzero().flatten().tolist() == columns


def test_pictures_move_to_the_right():
    assert torch.equal(shifting.slide_on_ring(IMAGE, 4)[..., 4:], IMAGE[..., :-4])
    scene = photograph("rocket", 48)
    still, moved = (shifting.slide_window(scene, pixels, 32) for pixels in (0, 4))
    assert torch.equal(still, scene[:, 8:40, 8:40]) and torch.equal(moved[..., 4:], still[..., :-4])
    ground, subject = torch.zeros(3, 32, 32), torch.ones(3, 8, 8)
    placed = shifting.place_on(ground, subject, left=4)
    assert placed[:, 12:20, 4:12].eq(1).all() and placed.sum() == 3 * 64 and not ground.any()


def test_exact_tokens_are_drawn_as_such():
    change = torch.full((8, 8), 0.5)
    change[:, 3] = 0
    with figure(2) as fig:
        axes = fig.subplots()
        assert show_change(axes, change) == 8
    assert len(axes.patches) == 8


def test_pictures_and_maps_move_down_as_well():
    moved = shifting.slide_on_ring(IMAGE, 4, down=8)
    assert torch.equal(moved[:, 8:, 4:], IMAGE[:, :-8, :-4])
    scene = photograph("rocket", 48)
    still, moved = (shifting.slide_window(scene, *shift) for shift in ((0, 32), (4, 32, 8)))
    assert torch.equal(moved[:, 8:, 4:], still[:, :-8, :-4])
    before = torch.randn(6, 8, 8, dtype=torch.float64)
    after = before.roll((2, -1), (-2, -1))
    assert not shifting.shift_change(before, after, pixels=-3, patch=4, down=7).any()
    assert shifting.shift_change(before, after, pixels=-3, patch=4, down=0).all()
    new = shifting.shift_change(before, after, pixels=-4, patch=4, wrap=False, down=8).isnan()
    assert new[:2].all() and new[:, 7:].all() and not new[2:, :7].any()
    view = shifting.shifted_view(model_with("peg"), IMAGE, shifting.slide_on_ring(IMAGE, 4, 4), 4, 0, down=4)
    assert (
        int((view.change == 0).sum()) == 25
    )  # 5 x 5: on each axis three lie at the border now or did before
