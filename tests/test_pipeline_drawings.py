"""The drawings of training say what the code does, and can be read on a phone."""

import re

import pytest
from test_figures import texts

from cpvt.data.sampler import Share, Stream
from cpvt.lab.pipeline_drawings import FLOAT, STAGES, UINT8, pipeline_picture, places_picture
from cpvt.training.recipes import deit

STREAM = Stream(images=1000, batch=48, seed=3, group=12, repeated_aug=3)
DRAWN = {
    "pipeline": pipeline_picture,
    "places": lambda: places_picture(STREAM, world=2, micro=12),
    "one process": lambda: places_picture(STREAM),
}


@pytest.fixture(params=DRAWN)
def drawn(request):
    return DRAWN[request.param]()


def test_texts_are_large_enough_whole_and_apart(drawn):
    found = texts(drawn)
    assert found and min(text.get_fontsize() for text in found) >= 11
    boxes = [text.get_window_extent() for text in found]
    for i, box in enumerate(boxes):
        assert 0 <= box.x0 and box.x1 <= drawn.bbox.width and 0 <= box.y0 and box.y1 <= drawn.bbox.height
        assert not any(box.overlaps(other) for other in boxes[:i]), found[i].get_text()


def test_the_numbers_in_the_squares_are_the_streams():
    numbers = [int(t.get_text()) for t in texts(places_picture(STREAM)) if t.get_text().isdigit()]
    assert numbers == (STREAM.places(0)[1] // STREAM.repeated_aug).tolist()
    rows = [numbers[i : i + STREAM.group] for i in range(0, STREAM.batch, STREAM.group)]
    assert all(len(set(row)) == len(row) for row in rows)  # no group has two copies of an image


def test_frames_enclose_whole_groups():
    names = [t.get_text() for t in texts(places_picture(STREAM, world=2, micro=12))]
    assert [name for name in names if name.startswith("process")] == ["process 0", "process 1"]
    assert [name for name in names if name.startswith("group")] == [f"group {i}" for i in range(4)]
    assert len(Share(0, 2, 12).parts(STREAM.batch, STREAM.group)) == 2


def test_the_stages_have_the_recipes_sizes_and_their_colours_say_the_type():
    config = deit("cpvt_tiny")
    stages = [stage for steps in STAGES.values() for stage in steps]
    said = " ".join(result for _, result, _ in stages)
    size, classes = config.data.image_size, config.model.num_classes
    assert set(re.findall(r"\(B, 3, (\d+), (\d+)\)", said)) == {(str(size), str(size))}
    assert set(re.findall(r"\(B, (\d+)\)", said)) == {str(classes)} and config.run.precision == "bf16"
    for _, result, colour in stages:
        assert ("uint8" in result) == (colour == UINT8) and ("float32" not in result or colour == FLOAT)
