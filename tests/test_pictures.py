"""The book's photographs are there, square, and of any size."""

import pytest

from cpvt.errors import ConfigError
from cpvt.lab.pictures import PHOTOGRAPHS, class_names, photograph


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("side", [8, 224, 600])
def test_photographs_are_squares_of_colour(name, side):
    image = photograph(name, side)
    assert image.shape == (3, side, side) and 0 <= image.min() < 0.2 < 0.6 < image.max() <= 1
    assert (image[0] - image[2]).abs().mean() > 0.01


def test_small_ones_are_means_of_areas_and_unknown_ones_are_refused():
    assert (photograph("coffee", 4).mean((1, 2)) - photograph("coffee", 100).mean((1, 2))).abs().max() < 1e-5
    with pytest.raises(ConfigError, match="chelsea"):
        photograph("chelsae")


def test_classes_have_one_name_each():
    assert len(set(class_names())) == 100 and {"tabby", "lion", "beacon", "goldfish"} <= set(class_names())
