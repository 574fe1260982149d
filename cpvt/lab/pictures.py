"""Photographs with a free licence, out of scikit-image's wheel: what the book's chapters look at.

| name | what | by whom, licence |
| --- | --- | --- |
| chelsea | a cat: the book's running example | Stefan van der Walt, CC0 |
| coffee | a cup of coffee | Rachel Michetti (by courtesy of Pikolo Espresso Bar), CC0 |
| astronaut | Eileen Collins | NASA, public domain |
| rocket | launch of a Falcon 9 | SpaceX, CC0 |
"""

from functools import cache

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

# The hundred classes that the kept models answer with: WordNet's numbers, as Tiny-ImageNet names its folders.
_CLASSES = """
01443537 01629819 01641577 01644900 01698640 01742172 01768244 01770393 01774384 01774750 01784675
01855672 01882714 01910747 01917289 01944390 01945685 01950731 01983481 01984695 02002724 02056570
02058221 02074367 02085620 02094433 02099601 02099712 02106662 02113799 02123045 02123394 02124075
02125311 02129165 02132136 02165456 02190166 02206856 02226429 02231487 02233338 02236044 02268443
02279972 02281406 02321529 02364673 02395406 02403003 02410509 02415577 02423022 02437312 02480495
02481823 02486410 02504458 02509815 02666196 02669723 02699494 02730930 02769748 02788148 02791270
02793495 02795169 02802426 02808440 02814533 02814860 02815834 02823428 02837789 02841315 02843684
02883205 02892201 02906734 02909870 02917067 02927161 02948072 02950826 02963159 02977058 02988304
02999410 03014705 03026506 03042490 03085013 03089624 03100240 03126707 03160309 03179701 03201208
03250847
"""


@cache
def class_names() -> tuple[str, ...]:
    """Of the models of `load_kept("photographs")`: "tabby", "lion", ... in the order of their logits."""
    from timm.data import ImageNetInfo  # not above: it takes a moment

    names = ImageNetInfo()
    return tuple(names.label_name_to_description(f"n{n}").split(",")[0] for n in _CLASSES.split())


def photograph(name: str = "chelsea", side: int = 224) -> Tensor:
    """-> (3, side, side) float32 in [0, 1]: a square of a photograph, each pixel the mean of the area under it."""
    check_name("photograph", name, PHOTOGRAPHS)
    from skimage import data  # not above: it takes a moment

    top, left, cut = PHOTOGRAPHS[name]
    pixels = torch.from_numpy(getattr(data, name)()[..., :3].copy()).permute(2, 0, 1) / 255
    square = pixels[:, top : top + cut, left : left + cut]
    return F.adaptive_avg_pool2d(square, side) if side < cut else F.interpolate(square[None], side)[0]
