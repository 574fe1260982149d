"""Photographs with a free licence, out of scikit-image's wheel: what the book's chapters look at.

| name | what | by whom, licence |
| --- | --- | --- |
| chelsea | a cat: the book's running example | Stefan van der Walt, CC0 |
| coffee | a cup of coffee | Rachel Michetti (by courtesy of Pikolo Espresso Bar), CC0 |
| astronaut | Eileen Collins | NASA, public domain |
| rocket | launch of a Falcon 9 | SpaceX, CC0 |
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cpvt.errors import check_name

PHOTOGRAPHS = {  # name -> top, left, side of the square that is shown, in pixels
    "chelsea": (0, 85, 300),
    "coffee": (0, 100, 400),
    "astronaut": (0, 60, 380),
    "rocket": (0, 106, 427),
}


def photograph(name: str = "chelsea", side: int = 224) -> Tensor:
    """-> (3, side, side) float32 in [0, 1]: a square of a photograph, each pixel the mean of the area under it."""
    check_name("photograph", name, PHOTOGRAPHS)
    from skimage import data  # not above: it takes a moment

    top, left, cut = PHOTOGRAPHS[name]
    pixels = torch.from_numpy(getattr(data, name)()[..., :3].copy()).permute(2, 0, 1) / 255
    square = pixels[:, top : top + cut, left : left + cut]
    return F.adaptive_avg_pool2d(square, side) if side < cut else F.interpolate(square[None], side)[0]
