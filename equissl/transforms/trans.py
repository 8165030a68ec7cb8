"""Translation."""

from __future__ import annotations

from equissl.transforms.warp import Rigid


class Translation(Rigid):
    names = ("translation_x", "translation_y")


TRANSFORM = Translation
