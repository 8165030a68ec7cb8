"""Rotation about the centre."""

from __future__ import annotations

from equissl.transforms.warp import Rigid


class Rotation(Rigid):
    names = ("rotation",)


TRANSFORM = Rotation
