"""Randomness on the device against cm_runtime.noise, the NumPy reference, and published words."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cm_runtime import noise
from cm_runtime.training.noise import DROPOUT, FLIP, LEVEL, NOISE, Draws

SEEDS = [0, 1, 0xFFFFFFFF, 1 << 32, (1 << 63) - 1, (1 << 64) - 1]
PLACES = [0, 1, 17, (1 << 32) - 1, 1 << 32, (1 << 32) + 5, (1 << 40) + 3, (1 << 62) + 1]


def draws(seed: int, places: list[int]) -> Draws:
    return Draws(seed, torch.tensor(places))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("draw", [0, 1, 5, 0xFFFF0003, 0xFFFFFFFF])
def test_words_are_those_of_the_reference(seed: int, draw: int) -> None:
    found = draws(seed, PLACES).words(draw, 3)
    assert found.dtype == torch.int64
    assert (found.numpy().astype(np.uint64) == noise.words(seed, PLACES, draw, 3)).all()


@pytest.mark.parametrize(
    ("seed", "place", "draw", "words", "normals"),
    [
        (0, 17, 0, "704c9333 4d352ee4 1fa81629 806a2a3c", [1.2168909, -0.4089001, -0.0208107, -2.044512]),
        (1, 0, 1, "833ff8dc 225c963c 232b88b3 0b334b07", [0.8633363, 0.7686346, 0.540856, 1.9176652]),
    ],
)
def test_known_answers(seed: int, place: int, draw: int, words: str, normals: list[float]) -> None:
    one = draws(seed, [place])
    assert one.words(draw, 1).flatten().tolist() == [int(word, 16) for word in words.split()]
    assert one.normal(draw, (4,))[0].tolist() == pytest.approx(normals, abs=2e-7)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (7,), (255,), (1, 1, 1), (3, 5, 17), (1, 28, 28)])
def test_normals_are_those_of_the_reference(shape: tuple[int, ...]) -> None:
    found = draws(3, PLACES).normal(NOISE, shape)
    wanted = noise.normal(3, PLACES, NOISE, shape)
    assert found.shape == wanted.shape and found.dtype == torch.float32
    assert (np.abs(found.numpy() - wanted) <= 1e-6 * np.maximum(1, np.abs(wanted))).all()


def test_a_place_has_its_numbers_whatever_is_asked_beside_it() -> None:
    whole = draws(5, list(range(40)))
    for some in ([7], [39, 0, 12], list(range(9, 30))):
        part = draws(5, some)
        assert torch.equal(part.normal(NOISE, (3, 7)), whole.normal(NOISE, (3, 7))[some])
        assert torch.equal(part.uniform(LEVEL), whole.uniform(LEVEL)[some])
        assert torch.equal(part.keys(DROPOUT), whole.keys(DROPOUT)[some])
    # and a larger image begins as a smaller one does
    assert torch.equal(whole.normal(NOISE, (5,)), whole.normal(NOISE, (64,))[:, :5])


def test_uniforms_are_the_first_word_between_zero_and_one() -> None:
    found = Draws(0, torch.arange(20_000)).uniform(FLIP)
    words = noise.words(0, np.arange(20_000), FLIP, 1)[:, 0, 0].astype(np.float64)
    np.testing.assert_allclose(found.numpy(), (words + 0.5) / 2**32, rtol=0, atol=1e-15)
    assert found.dtype == torch.float64 and found.min() > 0 and found.max() < 1
    counts = np.histogram(found.numpy(), 16, (0, 1))[0]
    assert ((counts - 1250) ** 2 / 1250).sum() < 44  # chi-square of 15 degrees: beyond it once in 10^4


def test_keys_are_two_words_of_their_draw() -> None:
    found = draws(9, PLACES).keys(DROPOUT)
    assert found.dtype == torch.int64
    assert (found.numpy().astype(np.uint64) == noise.words(9, PLACES, DROPOUT, 1)[:, 0, :2]).all()


def test_draws_places_and_seeds_are_independent() -> None:
    normals = [Draws(seed, torch.arange(5000)).normal(draw) for seed in (0, 1) for draw in (NOISE, LEVEL, FLIP)]
    normals.append(Draws(0, torch.arange(1, 5001)).normal(NOISE))
    correlation = np.corrcoef(torch.stack(normals).numpy()) - np.eye(len(normals))
    assert np.abs(correlation).max() < 5 / np.sqrt(5000)
    assert len({NOISE, LEVEL, FLIP, DROPOUT, noise.LABEL_DRAW}) == 5
