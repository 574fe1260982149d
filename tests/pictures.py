"""Old names of helpers.py, until no test file imports them."""

from helpers import EVERYTHING as EVERYTHING
from helpers import draw_images as draw_pictures  # noqa: F401
from helpers import small_run as small_run
