"""Rotation about the centre, then translation, as one warp: the rigid motions of the plane."""

from __future__ import annotations

from equissl.transforms.warp import Rigid


class SE2(Rigid):
    names = ("rotation", "translation_x", "translation_y")


TRANSFORM = SE2
