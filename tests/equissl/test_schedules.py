from __future__ import annotations

import math

import pytest

from equissl.schedules import cosine, linear, warmup_cosine


def test_cosine() -> None:
    assert [cosine(step, 10, 1.0, 3.0) for step in (0, 5, 10, 11)] == pytest.approx([1, 2, 3, 3])
    assert cosine(2, 10, 1.0, 0.0) == pytest.approx((1 + math.cos(math.pi / 5)) / 2)
    assert cosine(0, 0, 1.0, 3.0) == 3


def test_linear() -> None:
    assert [linear(step, 4, 0.04, 0.08) for step in (0, 1, 4, 9)] == pytest.approx([0.04, 0.05, 0.08, 0.08])
    assert linear(0, 0, 0.04, 0.08) == 0.08


def test_warmup_then_cosine() -> None:
    rates = [warmup_cosine(step, 10, 4, 8.0, 1.0) for step in range(10)]
    assert rates[:5] == pytest.approx([2, 4, 6, 8, 8])
    assert rates[7] == pytest.approx(4.5)
    assert sorted(rates[4:], reverse=True) == rates[4:]
    assert 1 < rates[9] < 2
    assert warmup_cosine(10, 10, 4, 8.0, 1.0) == 1
    assert warmup_cosine(0, 10, 0, 8.0, 1.0) == 8
    assert warmup_cosine(0, 10, 0.5, 8.0, 1.0) == 8
    assert max(warmup_cosine(step, 10, 100, 8.0, 1.0) for step in range(10)) == pytest.approx(0.8)
