"""Random numbers as a pure function of what they are for: (seed, epoch, position, stream).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorised over the positions.
There is no state to save or to share: any rank, worker or resumed run asks for a sample's numbers and gets the same.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_SEED = 2**64 - 1


class Stream(IntEnum):
    """What numbers are drawn for. A stream has room for 65 536 substreams (`stream + crop`)."""

    CROP = 1 << 16  # + crop: the box of a crop and its flip
    PHOTOMETRY = 2 << 16  # + crop
    TRANSFORMATION = 3 << 16
    PREPARE = 4 << 16  # + photograph
    PROBE = 5 << 16  # + probe: initial weights, order of the pairs
    MASK = 6 << 16  # + view
    DROP_PATH = 7 << 16
    ORDER = 8 << 16


_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox(counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox4x32-10: four 32-bit words per counter. The four counter words broadcast; the result is `(..., 4)`."""
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint64) for word in counter))
    k0, k1 = key
    for _ in range(10):
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # both factors are below 2**32: no overflow
        c0, c1, c2, c3 = (right >> _HALF) ^ c1 ^ np.uint64(k0), right & _LOW, (left >> _HALF) ^ c3 ^ np.uint64(k1), left & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def words(seed: int, epoch: int, positions: ArrayLike, stream: int, n: int) -> NDArray[np.uint32]:
    """`(b, n)` random 32-bit words for `b` positions; the first words do not depend on `n`."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"the seed is {seed}; it must be between 0 and 2**64 - 1")
    where = np.atleast_1d(np.asarray(positions, dtype=np.int64))
    assert where.ndim == 1
    assert where.size == 0 or 0 <= where.min() <= where.max() < 2**32
    assert 0 <= epoch < 2**32
    assert 0 <= stream < 2**32
    blocks = np.arange(-(-n // 4))
    counter = (where[:, None], epoch, blocks[None, :], int(stream))
    return philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(len(where), -1)[:, :n]


def uniform(seed: int, epoch: int, positions: ArrayLike, stream: int, n: int) -> NDArray[np.float64]:
    """`(b, n)` numbers uniform in the open interval (0, 1), in steps of 2**-32."""
    return (words(seed, epoch, positions, stream, n).astype(np.float64) + 0.5) * 2.0**-32


def permutation(n: int, seed: int, epoch: int, stream: int = 0) -> NDArray[np.int64]:
    """A permutation of `range(n)` by sorting random 64-bit words of numpy's Philox, whose bit stream numpy keeps stable."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"the seed is {seed}; it must be between 0 and 2**64 - 1")
    bits = np.random.Philox(key=np.array([seed, (int(stream) << 32) | epoch], dtype=np.uint64))
    return np.argsort(bits.random_raw(n), kind="stable")
