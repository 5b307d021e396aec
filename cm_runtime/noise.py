"""Addressable noise: every normal is a function of (seed, sample, draw, element), and of nothing else.

The words are Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with

    key = (seed low 32, seed high 32)    counter = (block, draw, sample low 32, sample high 32)

where block = element // 4 over the flat CHW index. Four words (a, b, c, e) give four normals by Box-Muller on
the pairs (a, b) and (c, e), computed in float64 and rounded once to float32. Batch size, order, worker count
and machine therefore never change which image sample 17 of seed 0 is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cm_runtime.errors import RequestError

LABEL_DRAW = 0xFFFFFFFF
_LIMIT = 1 << 64
_MASK = np.uint64(0xFFFFFFFF)
# Philox4x32-10's constants.
MULTIPLIERS, WEYL, ROUNDS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 10
_MULTIPLIERS = np.array(MULTIPLIERS, np.uint64)[:, None]
_WEYLS = np.arange(ROUNDS, dtype=np.uint64)[:, None] * np.array(WEYL, np.uint64)  # (rounds, 2)
_32 = np.uint64(32)
# Blocks turned into normals at a time: what they need stays in a core's second-level cache.
_CHUNK = 1 << 13


def philox(counter: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Philox4x32-10 of ``counter`` (4, n), each entry a 32-bit word: (4, n) words, uint64 below 2^32.

    seed: 0..2^64-1, the key. The words are 64 bits wide because the rounds multiply 32 x 32 -> 64.
    """
    keys = (np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint64) + _WEYLS) & _MASK
    even, odd = counter[0::2], counter[1::2]  # words 0 and 2, 1 and 3: few calls count where n is small
    for key in keys[:, :, None]:
        product = even * _MULTIPLIERS
        even = product[::-1] >> _32
        even ^= odd
        even ^= key
        product &= _MASK
        odd = product[::-1]
    return np.stack((even[0], odd[0], even[1], odd[1]))


def words(seed: int, samples: ArrayLike, draw: int, blocks: int) -> NDArray[np.uint64]:
    """Random words of ``draw`` for each sample (Philox4x32-10).

    Args:
        seed: 0..2^64-1, the key.
        samples: (n,) integers 0..2^64-1.
        draw: 0..2^32-1.
        blocks: of four words each.

    Returns:
        (n, blocks, 4) uint64 below 2^32.

    Raises:
        RequestError: a number is out of range.

    Example:
        >>> noise.words(0, [17], 0, 1).shape
        (1, 1, 4)
    """
    return _words(seed, sample_index(samples), _whole(draw, 1 << 32, "draw"), blocks)


def _words(seed: int, index: NDArray[np.uint64], draw: int | NDArray[np.uint64], blocks: int) -> NDArray[np.uint64]:
    """`words` of checked samples; ``draw`` may be (n, 1), one for each of them."""
    seed, n = _whole(seed, _LIMIT, "seed"), index.size
    counter = np.empty((4, n, blocks), np.uint64)
    counter[0] = np.arange(blocks, dtype=np.uint64)
    counter[1] = draw
    counter[2] = (index & _MASK)[:, None]
    counter[3] = (index >> _32)[:, None]
    return np.moveaxis(philox(counter.reshape(4, -1), seed).reshape(4, n, blocks), 0, -1)


def normal(seed: int, samples: ArrayLike, draw: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Standard normals of ``draw`` for each sample.

    Args:
        seed: 0..2^64-1.
        samples: (n,) integers 0..2^64-1: indices of images.
        draw: 0 is the first noise, k the k-th renoise; below 2^32.
        shape: (C, H, W) of an image.

    Returns:
        (n, *shape) float32.

    Raises:
        RequestError: a number is out of range.

    Example:
        >>> noise.normal(0, [17, 18], 0, (3, 32, 32)).shape
        (2, 3, 32, 32)
    """
    return _normal(seed, sample_index(samples), _whole(draw, 1 << 32, "draw"), shape)


def normals(seed: int, samples: ArrayLike, draws: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Standard normals of draws 0 to ``draws`` - 1, in one call.

    Args:
        seed: 0..2^64-1.
        samples: (n,) integers 0..2^64-1.
        draws: how many.
        shape: (C, H, W) of an image.

    Returns:
        (draws, n, *shape) float32, each draw as `normal` gives it.

    Raises:
        RequestError: a number is out of range.

    Example:
        >>> noise.normals(0, range(4), 2, (1, 28, 28)).shape
        (2, 4, 1, 28, 28)
    """
    index = sample_index(samples)
    each = np.repeat(np.arange(draws, dtype=np.uint64), index.size)[:, None]
    return _normal(seed, np.tile(index, draws), each, shape).reshape(draws, index.size, *shape)


def _normal(
    seed: int, index: NDArray[np.uint64], draw: int | NDArray[np.uint64], shape: Sequence[int]
) -> NDArray[np.float32]:
    size = math.prod(shape)
    blocks = -(-size // 4)
    z = np.empty((index.size, blocks * 4), np.float32)
    per_chunk = max(_CHUNK // max(blocks, 1), 1)
    for first in range(0, index.size if blocks else 0, per_chunk):
        chunk = slice(first, first + per_chunk)
        part = draw if isinstance(draw, int) else draw[chunk]
        z[chunk] = _box_muller(_words(seed, index[chunk], part, blocks)).reshape(-1, blocks * 4)
    return np.ascontiguousarray(z[:, :size]).reshape(index.size, *shape)


def random_labels(seed: int, samples: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """Uniform labels: floor(word0 * num_classes / 2^32) of each sample.

    Args:
        seed: 0..2^64-1.
        samples: (n,) integers 0..2^64-1.
        num_classes: of the model.

    Returns:
        (n,) int64.

    Raises:
        RequestError: a number is out of range.

    Example:
        >>> noise.random_labels(0, range(3), 10).shape
        (3,)
    """
    word = words(seed, samples, LABEL_DRAW, 1)[:, 0, 0]
    return ((word * np.uint64(num_classes)) >> _32).astype(np.int64)


def sample_index(samples: ArrayLike) -> NDArray[np.uint64]:
    """Sample numbers as (n,) uint64; raises RequestError unless they are integers 0..2^64-1."""
    try:
        numbers = np.asarray(samples)
        if not isinstance(samples, np.ndarray) and numbers.dtype.kind == "f":
            numbers = np.asarray(samples, object)  # NumPy makes floats of integers on either side of 2^63
        if numbers.dtype == object:
            numbers = np.asarray([_whole(i, _LIMIT, "sample") for i in numbers.ravel()], np.uint64)
    except (OverflowError, TypeError, ValueError) as error:
        raise RequestError("sample numbers must be integers from 0 to 2^64-1") from error
    if numbers.size and numbers.dtype.kind not in "ui":
        raise RequestError(f"sample numbers must be integers from 0 to 2^64-1, not {numbers.dtype}")
    if numbers.dtype.kind == "i" and numbers.size and numbers.min() < 0:
        raise RequestError(f"sample numbers must be integers from 0 to 2^64-1, not {numbers.min()}")
    return numbers.astype(np.uint64).ravel()


def _box_muller(four: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Normals of (..., 4) words: (..., 4) float32, in the order r sin, r cos of each pair."""
    u = four[..., 0::2] * 2.0**-32 + 2.0**-33
    angle = (four[..., 1::2] * 2.0**-32 + 2.0**-33) * (2 * np.pi)
    r = np.sqrt(-2 * np.log(u))
    z = np.empty(four.shape, np.float32)
    z[..., 0::2] = r * np.sin(angle)
    z[..., 1::2] = r * np.cos(angle)
    return z


def _whole(number: int, limit: int, name: str) -> int:
    """``number`` as a Python integer: a NumPy one would overflow in the key schedule."""
    try:
        whole = operator.index(number)
    except TypeError as error:
        raise RequestError(f"{name} must be an integer, not {number!r}") from error
    if not 0 <= whole < limit:
        raise RequestError(f"{name} must be from 0 to {limit - 1}, not {number}")
    return whole
