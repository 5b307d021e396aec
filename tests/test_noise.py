"""cm_runtime/noise.py against published words, a Philox in Python integers, and the normal distribution."""

import math

import numpy as np
import pytest
import scipy.stats

from cm_runtime import noise
from cm_runtime.errors import RequestError

LAST = 2**64 - 1
# Either side of every place where a word of the address carries or a signed reading would go wrong.
EDGES = [0, 1, 17, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1, 2**63, LAST - 1, LAST]
AWKWARD = [(1,), (3,), (7,), (255,), (1, 3, 7), (3, 7, 1), (1, 1, 1), (3, 5, 17), (2, 2), ()]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's own test vectors for philox4x32-10
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, LAST, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words, reference_philox):
    assert reference_philox(counter, (key & 0xFFFFFFFF, key >> 32)) == words
    found = noise.philox(np.array(counter, np.uint64)[:, None], key)
    assert tuple(found[:, 0].tolist()) == words


@pytest.mark.parametrize(
    ("seed", "sample", "draw", "words", "normals"),
    [
        (0, 17, 0, "704c9333 4d352ee4 1fa81629 806a2a3c", (1.2168909, -0.4089001, -0.0208107, -2.044512)),
        (1, 0, 1, "833ff8dc 225c963c 232b88b3 0b334b07", (0.8633363, 0.7686346, 0.540856, 1.9176652)),
    ],
)
def test_known_answers_of_the_layout(seed, sample, draw, words, normals):
    found = noise.words(seed, [sample], draw, 1)
    assert found.shape == (1, 1, 4)
    assert " ".join(f"{word:08x}" for word in found.ravel().tolist()) == words
    z = noise.normal(seed, [sample], draw, (4,))
    assert z.dtype == np.float32
    np.testing.assert_allclose(z[0], normals, atol=6e-8)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63, LAST])
def test_words_at_the_edges_are_those_of_the_reference(seed, reference_words):
    for draw in (0, 1, 2**31, 0xFFFFFFFF):
        found = noise.words(seed, np.array(EDGES, np.uint64), draw, 3)
        expected = [[reference_words(seed, i, draw, block) for block in range(3)] for i in EDGES]
        assert found.tolist() == [[list(four) for four in sample] for sample in expected]


def test_words_stay_below_32_bits_and_use_them_all():
    found = noise.words(LAST, np.arange(LAST - 1023, LAST, dtype=np.uint64), 0xFFFFFFFF, 7)
    assert found.dtype == np.uint64 and found.max() < 2**32
    for bit in range(32):
        share = ((found >> np.uint64(bit)) & np.uint64(1)).mean()
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(found.size)


@pytest.mark.parametrize("shape", [(1,), (1, 3, 7), (255,), (3, 64, 64)])
@pytest.mark.parametrize("draws", [1, 2, 7])
def test_all_draws_at_once_are_the_draws_one_by_one(draws, shape):
    samples = np.array([0, 17, LAST], np.uint64)
    found = noise.normals(LAST - 3, samples, draws, shape)
    assert found.shape == (draws, 3, *shape)
    assert (found == np.stack([noise.normal(LAST - 3, samples, k, shape) for k in range(draws)])).all()


def box_muller(words: tuple[int, ...]) -> list[float]:
    """The design's formula, a scalar at a time."""
    z = []
    for first, second in (words[:2], words[2:]):
        u, v = (first + 0.5) / 2**32, (second + 0.5) / 2**32
        r = math.sqrt(-2 * math.log(u))
        z += [r * math.sin(2 * math.pi * v), r * math.cos(2 * math.pi * v)]
    return z


@pytest.mark.parametrize("shape", AWKWARD, ids=str)
def test_normals_fill_any_shape_in_flat_order(shape, reference_words):
    size = math.prod(shape)
    samples = [3, 2**40 + 1, LAST]
    z = noise.normal(7, np.array(samples, np.uint64), 2, shape)
    assert z.shape == (3, *shape) and z.flags.c_contiguous
    for row, sample in zip(z.reshape(3, -1), samples, strict=True):
        blocks = [box_muller(reference_words(7, sample, 2, block)) for block in range(-(-size // 4))]
        expected = np.ravel(blocks)[:size]
        half_ulp = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64) / 2
        assert (np.abs(row - expected) <= half_ulp * 1.00001 + 1e-15).all()


def test_no_samples_and_no_elements_give_empty_arrays():
    assert noise.normal(0, [], 0, (3, 5)).shape == (0, 3, 5)
    assert noise.normal(0, [1, 2], 0, (0, 5)).shape == (2, 0, 5)
    assert noise.random_labels(0, [], 10).shape == (0,)


@pytest.mark.parametrize("shape", [(1, 3, 7), (3, 32, 32), (255,), (3, 105, 105)], ids=str)
def test_every_sample_is_the_same_in_any_company(shape, rng):
    """(3, 105, 105) is larger than what is worked on at a time; of (1, 3, 7) thousands go together."""
    count = {(1, 3, 7): 3000, (3, 32, 32): 40}.get(shape, 9)
    pool = np.concatenate([np.array(EDGES, np.uint64), rng.integers(0, LAST, count, np.uint64, endpoint=True)])
    together = noise.normal(5, pool, 1, shape)
    order = rng.permutation(len(pool))
    np.testing.assert_array_equal(noise.normal(5, pool[order], 1, shape), together[order])
    for size in (1, 3, 7, 255):
        picked = rng.choice(len(pool), min(size, len(pool)))
        np.testing.assert_array_equal(noise.normal(5, pool[picked], 1, shape), together[picked])
    alone = [noise.normal(5, [int(i)], 1, shape)[0] for i in pool[:15]]
    np.testing.assert_array_equal(np.stack(alone), together[:15])


def test_a_larger_shape_begins_with_the_smaller():
    """An element's address does not know the shape: only the flat index counts."""
    long = noise.normal(1, [9], 0, (255,))[0]
    np.testing.assert_array_equal(noise.normal(1, [9], 0, (7, 3))[0].ravel(), long[:21])


def test_each_part_of_the_address_changes_the_noise():
    base = noise.normal(3, [5], 1, (255,))
    for other in (
        noise.normal(4, [5], 1, (255,)),
        noise.normal(3 + 2**32, [5], 1, (255,)),
        noise.normal(3, [6], 1, (255,)),
        noise.normal(3, [5 + 2**32], 1, (255,)),
        noise.normal(3, [5], 2, (255,)),
    ):
        assert abs(np.corrcoef(base[0], other[0])[0, 1]) < 5 / math.sqrt(255)
        assert not (base == other).any()


@pytest.fixture(scope="module")
def million():
    return noise.normal(2, np.arange(1000) + 2**32 - 500, 0, (1000,))


@pytest.mark.process
def test_a_million_draws_are_standard_normal(million):
    z = million.ravel().astype(np.float64)
    n = z.size
    assert np.isfinite(z).all() and np.abs(z).max() <= math.sqrt(2 * 33 * math.log(2))
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)
    for place in range(4):  # sine and cosine of either pair
        assert scipy.stats.kstest(z[place::4], "norm").pvalue > 1e-3


def test_neighbours_in_the_million_do_not_know_each_other(million):
    for left, right in (
        (million[:, :-1], million[:, 1:]),
        (million[:, :-2], million[:, 2:]),
        (million[:-1], million[1:]),
        (million[:, :-1] ** 2, million[:, 1:] ** 2),  # the two of a pair share their radius
    ):
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 4.5 / math.sqrt(left.size)


@pytest.mark.parametrize("classes", [1, 3, 10, 1000])
def test_random_labels_are_in_range_and_uniform(classes, reference_words):
    count = 100 * classes + 7
    labels = noise.random_labels(11, np.arange(count), classes)
    assert labels.dtype == np.int64 and labels.shape == (count,)
    counts = np.bincount(labels, minlength=classes)
    assert len(counts) == classes
    assert classes == 1 or scipy.stats.chisquare(counts).pvalue > 1e-3
    for i in (0, 1, 6, count - 1):
        assert labels[i] == reference_words(11, i, 0xFFFFFFFF, 0)[0] * classes // 2**32


def test_a_random_label_is_a_function_of_seed_and_sample_alone(reference_words):
    labels = noise.random_labels(LAST, np.array(EDGES, np.uint64), 1000)
    assert labels.tolist() == [reference_words(LAST, i, 0xFFFFFFFF, 0)[0] * 1000 >> 32 for i in EDGES]
    np.testing.assert_array_equal(noise.random_labels(LAST, np.array(EDGES[::-1], np.uint64), 1000), labels[::-1])


@pytest.mark.parametrize("samples", [[-1], [0.5], [1.0], [2**64], [0, -(2**70)], [True], "17", ["1"], [None], None])
def test_sample_numbers_that_are_none_are_refused(samples):
    with pytest.raises(RequestError, match=r"integers from 0 to 2\^64-1"):
        noise.normal(0, samples, 0, (3,))


def test_a_fraction_among_objects_is_refused_not_rounded():
    with pytest.raises(RequestError, match=r"integers from 0 to 2\^64-1"):
        noise.sample_index(np.array([1.5], object))


@pytest.mark.parametrize("samples", [[0, LAST], [LAST, 1, 2**63], [2**63, LAST], (2**63 - 1, 2**63)])
def test_python_integers_of_the_whole_range_may_stand_together(samples):
    assert noise.sample_index(samples).tolist() == list(samples)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64])
def test_any_integer_type_addresses_the_same_sample(kind):
    expected = noise.normal(5, [3, 100], 1, (7,))
    np.testing.assert_array_equal(noise.normal(5, np.array([3, 100], kind), 1, (7,)), expected)
    np.testing.assert_array_equal(noise.normal(5, [kind(3), kind(100)], 1, (7,)), expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [np.int32, np.uint32, np.int64, np.uint64])
def test_any_integer_type_is_a_seed_and_a_draw(kind):
    expected = noise.normal(123456789, [3], 1, (7,))
    np.testing.assert_array_equal(noise.normal(kind(123456789), [3], kind(1), (7,)), expected)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, 3.0, float("nan"), "7", None])
def test_seeds_that_are_none_are_refused(seed):
    with pytest.raises(RequestError, match="seed must be"):
        noise.normal(seed, [0], 0, (3,))


@pytest.mark.parametrize("draw", [-1, 2**32, 0.5, 1.0])
def test_draws_that_are_none_are_refused(draw):
    with pytest.raises(RequestError, match="draw must be"):
        noise.normal(0, [0], draw, (3,))
