"""The stream of batches: permutations, position by position, and what the pixels become."""

import numpy as np
import pytest
import torch

from cm_runtime import noise
from cm_runtime.training.batches import Stream
from cm_runtime.training.data.image_set import ImageSet

CPU = torch.device("cpu")


def numbered(count: int) -> ImageSet:
    """Image i holds the pixel value i, its label is i mod 5."""
    images = np.arange(count, dtype=np.float32).reshape(-1, 1, 1, 1)
    return ImageSet(images, np.arange(count, dtype=np.int64) % 5, 5, "numbered")


def stream(data: ImageSet, seed: int = 0, classes: bool = True, flip: bool = False) -> Stream:
    return Stream(data, seed=seed, classes=classes, flip=flip, device=CPU)


def indices(found: Stream, first: int, count: int) -> list[int]:
    return found.batch(first, count).x.flatten().int().tolist()


@pytest.mark.parametrize("size", [1, 3, 7, 255])
def test_every_epoch_is_a_permutation(size: int) -> None:
    found = stream(numbered(size))
    epochs = [indices(found, epoch * size, size) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 3:
        assert len({tuple(epoch) for epoch in epochs}) == 4
        assert epochs[0] != list(range(size))


@pytest.mark.parametrize("count", [1, 3, 7, 10, 11, 64])
def test_batches_of_any_size_walk_the_same_sequence(count: int) -> None:
    whole = indices(stream(numbered(10)), 0, 128)
    found = stream(numbered(10))
    pieces = [indices(found, first, count) for first in range(0, 128 - count + 1, count)]
    assert [i for piece in pieces for i in piece] == whole[: len(pieces) * count]


def test_a_batch_is_a_function_of_seed_and_position_in_whatever_order_they_are_asked_for() -> None:
    data = numbered(10)
    positions = [(95, 8), (0, 4), (9, 2), (9, 2), (1_000_003, 25), (4, 30)]
    one = stream(data)
    before = [indices(one, *position) for position in positions]
    assert before == [indices(stream(data), *position) for position in positions]
    assert before != [indices(stream(data, seed=1), *position) for position in positions]


def test_the_largest_seed_and_a_far_position_work() -> None:
    assert sorted(indices(stream(numbered(7), seed=(1 << 63) - 1), 7 * 10**12, 7)) == list(range(7))


def test_permutations_are_fair() -> None:
    found = stream(numbered(4))
    first = np.bincount([indices(found, 4 * epoch, 1)[0] for epoch in range(2000)], minlength=4)
    assert (np.abs(first - 500) < 5 * np.sqrt(2000 * 0.25 * 0.75)).all()


def test_labels_stay_with_their_images() -> None:
    batch = stream(numbered(255)).batch(100, 300)
    x, label = batch.x, batch.label
    assert label is not None and label.dtype == torch.int64
    assert torch.equal(label, x.flatten().long() % 5)


def test_there_are_no_labels_where_none_are_wanted_or_given() -> None:
    assert stream(numbered(7), classes=False).batch(0, 3).label is None
    assert stream(ImageSet(np.zeros((7, 1, 2, 2), np.uint8), None, 0, "bare")).batch(0, 3).label is None


def test_bytes_become_minus_one_to_one_exactly_at_the_ends() -> None:
    data = ImageSet(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16), None, 0, "bytes")
    x = stream(data).batch(0, 1).x
    assert x.shape == (1, 1, 16, 16) and x.dtype == torch.float32
    assert (x.min().item(), x.max().item()) == (-1.0, 1.0)
    exact = (2 * np.arange(256) - 255) / 255
    np.testing.assert_allclose(x.numpy().ravel(), exact, rtol=0, atol=1.2e-7)
    # and back, as sampling makes bytes
    assert (np.rint((x.numpy().ravel().astype(np.float64) + 1) * 127.5) == np.arange(256)).all()


def test_floats_pass_unchanged_and_unclipped() -> None:
    images = np.random.default_rng(0).standard_normal((3, 2, 7, 7)).astype(np.float32) * 3
    x = stream(ImageSet(images, None, 0, "floats")).batch(0, 3).x
    order = [int(np.flatnonzero((images == one.numpy()).all((1, 2, 3)))[0]) for one in x]
    assert sorted(order) == [0, 1, 2]


def test_images_may_lie_in_memory_in_any_order() -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3)).astype(np.uint8)
    data = ImageSet(np.moveaxis(images, -1, 1), None, 0, "channels last")
    x = stream(data).batch(0, 4).x
    found = {tuple(one.ravel()) for one in np.rint((x.numpy() + 1) * 127.5).astype(int)}
    assert found == {tuple(one.transpose(2, 0, 1).ravel().astype(int)) for one in images}


def test_flip_mirrors_half_of_the_images_left_to_right_and_nothing_else() -> None:
    images = np.arange(12, dtype=np.float32).reshape(1, 2, 2, 3)
    data = ImageSet(images, None, 0, "one")
    x = stream(data, flip=True).batch(0, 4000).x
    straight = (x == torch.from_numpy(images)).all(3).all(2).all(1)
    mirrored = (x == torch.from_numpy(images[..., ::-1].copy())).all(3).all(2).all(1)
    assert (straight ^ mirrored).all()
    assert abs(mirrored.sum().item() - 2000) < 5 * np.sqrt(1000)
    # the draw of a place decides, by the words of cm_runtime.noise
    words = noise.words(0, np.arange(4000), 0xFFFF0002, 1)[:, 0, 0]
    assert (mirrored.numpy() == (words < 1 << 31)).all()
    assert not torch.equal(x, stream(data, seed=1, flip=True).batch(0, 4000).x)


def test_a_place_is_mirrored_or_not_whatever_batch_it_is_in() -> None:
    images = np.arange(70, dtype=np.float32).reshape(5, 1, 2, 7)
    whole = stream(ImageSet(images, None, 0, "five"), flip=True).batch(0, 60).x
    one = stream(ImageSet(images, None, 0, "five"), flip=True)
    for first, count in ((57, 3), (0, 1), (7, 20)):
        assert torch.equal(one.batch(first, count).x, whole[first : first + count])


def test_without_flip_nothing_is_mirrored_and_torchs_generator_is_left_alone() -> None:
    images = np.arange(12, dtype=np.float32).reshape(1, 2, 2, 3)
    torch.manual_seed(0)
    for flip in (False, True):
        x = stream(ImageSet(images, None, 0, "one"), flip=flip).batch(0, 100).x
        assert flip or (x == torch.from_numpy(images)).all()
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


def test_a_batch_carries_the_draws_of_its_places() -> None:
    draws = stream(numbered(7), seed=3).batch(5, 4).draws
    assert draws.seed == 3 and draws.place.tolist() == [5, 6, 7, 8]


def test_batches_come_in_the_type_and_layout_asked_for() -> None:
    data = ImageSet(np.arange(96, dtype=np.uint8).reshape(2, 3, 4, 4), None, 0, "bytes")
    x = stream(data).batch(0, 2, torch.float64, torch.channels_last).x
    assert x.dtype == torch.float64 and x.is_contiguous(memory_format=torch.channels_last)
    order = (stream(numbered(2)).batch(0, 2).x.flatten()).long().numpy()  # the same permutation
    np.testing.assert_array_equal(x.numpy(), data.images[order] / 127.5 - 1)


def test_rms_is_that_of_all_pixels_in_units_of_the_network() -> None:
    rng = np.random.default_rng(0)
    many, few = rng.integers(0, 256, (1500, 1, 2, 3)).astype(np.uint8), rng.standard_normal((7, 2, 3, 3), np.float32)
    for images in (many, few):
        x = images.astype(np.float64) / 127.5 - 1 if images.dtype == np.uint8 else images.astype(np.float64)
        assert stream(ImageSet(images, None, 0, "any")).rms() == pytest.approx(np.sqrt((x**2).mean()), rel=1e-12)
