"""What a model can be asked to draw or edit, checked, and how images are shared out and labelled.

Image ``i`` of a seed depends on (model, seed, i) alone: its noise and its label are addressed by those numbers, so
micro-batches may be of any size and come in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cm_runtime import noise
from cm_runtime.errors import RequestError
from cm_runtime.errors.wording import quantity
from cm_runtime.manifest import Manifest
from cm_runtime.projections import Edit
from cm_runtime.schedule import level_text, same_levels

Labels = int | Sequence[int] | NDArray[np.integer] | Mapping[int, int] | Literal["all", "random"] | None
Checked = tuple[int, ...] | Literal["all", "random"] | None
Output = Literal["uint8", "float32"]
MICRO_BATCH_LIMIT = 1 << 16
MOST_COUNTED = 1 << 20  # images that a mapping of classes to counts asks for


@dataclass(frozen=True)
class Request:
    """Images ``start`` to ``start + count - 1`` of a seed, edited or drawn, as `sampling_request` checked them.

    labels: "all", "random", or a list in turn: image i has entry i mod its length.
    """

    count: int
    sigmas: tuple[float, ...]
    seed: int
    start: int
    labels: Checked
    micro_batch: int
    output: Output
    clip: bool
    edit: Edit | None = None


def sampling_request(
    manifest: Manifest,
    count: int,
    steps: int | None = None,
    *,
    sigmas: Sequence[float] | None = None,
    seed: int = 0,
    start: int = 0,
    labels: Labels = None,
    micro_batch: int,
    output: Output = "uint8",
    clip: bool = True,
) -> Request:
    """A request that the model can serve, or a RequestError that says why not.

    steps (default 2) and sigmas exclude each other. labels: all classes in turn where there are classes, "random", one
    label, a list in turn, or a mapping of classes to counts, which add up to ``count``: in its order, from ``start``.
    """
    if manifest.is_teacher:
        raise RequestError("this model is an EDM teacher, which a few steps cannot sample; make it consistent first")
    steps = None if steps is None else _whole("steps", steps)
    if manifest.graph == "sampler":
        levels = _own_levels(manifest, steps, sigmas, output, clip)
    elif sigmas is not None:
        if steps is not None:
            raise RequestError("give steps or sigmas, not both")
        levels = manifest.noise_range.check(sigmas)
    else:
        chosen = 2 if steps is None else steps
        levels = manifest.noise_range.levels(chosen, manifest.sigmas)
    return _request(manifest, count, levels, seed, start, labels, micro_batch, output, clip)


def _own_levels(
    manifest: Manifest, steps: int | None, sigmas: Sequence[float] | None, output: Output, clip: bool
) -> tuple[float, ...]:
    """The exact levels of a sampler graph, where nothing else is asked of it than they as printed, or their number.

    Raises RequestError.
    """
    (levels,) = manifest.sigmas.values()
    if steps not in (None, len(levels)) or (sigmas is not None and not same_levels(sigmas, levels)):
        asked = quantity(steps or 0, "step") if sigmas is None else f"at {level_text(sigmas)}"
        raise RequestError(
            f"this sampler file draws in {quantity(len(levels), 'step')}, at {level_text(levels)}, not {asked};"
            " a denoiser file draws in any"
        )
    if output != "uint8" or not clip:
        raise RequestError("a sampler file makes uint8 images, clamped at each step; a denoiser file makes others too")
    return levels


def teacher_request(
    manifest: Manifest,
    count: int,
    steps: int = 18,
    *,
    seed: int = 0,
    start: int = 0,
    labels: Labels = None,
    micro_batch: int,
) -> Request:
    """A request for `teacher_batches`: the Karras grid of ``steps`` ODE steps. Raises RequestError."""
    if not manifest.is_teacher:
        raise RequestError("this model is no EDM teacher; a few steps sample it")
    if not 2 <= steps <= 1000:
        raise RequestError(f"an EDM teacher takes from 2 to 1000 ODE steps, not {steps}")
    levels = tuple(float(s) for s in manifest.noise_range.karras(steps))
    return _request(manifest, count, levels, seed, start, labels, micro_batch, "uint8", True)


def edit_request(
    manifest: Manifest,
    edit: Edit,
    sigmas: Sequence[float],
    *,
    seed: int = 0,
    start: int = 0,
    micro_batch: int,
    output: Output = "uint8",
    clip: bool = True,
) -> Request:
    """A request for the answers to an edit, image n with noise number ``start + n``. Raises RequestError.

    sigmas: as of a sampler, but the first may be any from above sigma_min to sigma_max.
    """
    m = manifest
    if m.is_teacher:
        raise RequestError("this model is an EDM teacher, which a few steps cannot edit with; make it consistent first")
    if m.graph == "sampler":
        raise RequestError("a sampler file draws by itself and cannot edit; export the model with --graph denoiser")
    inputs, answers = len(edit.start), edit.answers
    if not inputs or edit.start.shape[1:] != m.image_shape or edit.start.dtype != np.float32:
        shape = ", ".join(map(str, m.image_shape))
        raise RequestError(f"images to edit must be (N, {shape}) float32, not {edit.start.shape} {edit.start.dtype}")
    if not np.isfinite(edit.start).all():
        raise RequestError("images to edit must be finite")
    if edit.project is not None:
        edit.project.check(edit.start.shape)
    if answers < 1:
        raise RequestError(f"there must be at least 1 answer to each image, not {answers}")
    if m.num_classes and edit.label is None:
        raise no_label(m.num_classes)
    _checked_labels(edit.label, m.num_classes)
    if edit.label is not None and edit.label.shape != (inputs,):
        raise RequestError(f"{quantity(inputs, 'image')} to edit need one label each, not {edit.label.size}")
    first = float(sigmas[0]) if len(sigmas) else m.sigma_max
    levels = replace(m.noise_range, sigma_max=min(first, m.sigma_max)).check(sigmas)
    checked = _request(m, edit.count, levels, seed, start, None, micro_batch, output, clip)
    return replace(checked, labels=None, edit=edit)


def _request(
    manifest: Manifest,
    count: int,
    levels: tuple[float, ...],
    seed: int,
    start: int,
    labels: Labels,
    micro_batch: int,
    output: Output,
    clip: bool,
) -> Request:
    count, seed, start = _whole("count", count), _whole("seed", seed), _whole("start", start)
    if count < 1:
        raise RequestError(f"count must be at least 1, not {count}")
    micro_batch = min(_whole("micro_batch", micro_batch), count)
    if not 1 <= micro_batch <= MICRO_BATCH_LIMIT:
        raise RequestError(f"micro-batch must be from 1 to {MICRO_BATCH_LIMIT}, not {micro_batch}")
    if not 0 <= seed < 1 << 64:
        raise RequestError(f"seed must be from 0 to 2^64-1, not {seed}")
    if not 0 <= start <= (1 << 64) - count:
        raise RequestError(f"image indices must be from 0 to 2^64-1; {quantity(count, 'image')} from {start} are not")
    if output not in ("uint8", "float32"):
        raise RequestError(f"output must be uint8 or float32, not {output!r}")
    checked = _checked_labels(labels, manifest.num_classes)
    if isinstance(labels, Mapping):
        total = count_images(labels, None, 0)
        if total != count:
            raise RequestError(f"the labels are for {quantity(total, 'image')}, but {count} are asked for")
        checked = _in_turn(labels, start)
    return Request(count, levels, seed, start, checked, micro_batch, output, clip)


def no_label(num_classes: int) -> RequestError:
    """An edit of images whose class nobody said."""
    classes = quantity(num_classes, "class")
    return RequestError(
        f"this model has {classes}: give the images' own, from 0 to {num_classes - 1}, as label (--label)"
    )


def even_micro_batch(count: int, most: int) -> int:
    """The size of micro-batches that splits ``count`` images evenly with at most ``most`` in each."""
    return -(-count // -(-count // most))


def split(chosen: Request, batch: int) -> Iterator[Request]:
    """The same images as requests of ``batch`` each, the last one shorter."""
    for first in range(0, chosen.count, batch):
        count = min(batch, chosen.count - first)
        edit = chosen.edit and chosen.edit.part(first, count)
        yield replace(chosen, start=chosen.start + first, count=count, edit=edit)


def labels_of(chosen: Request, index: NDArray[np.uint64], num_classes: int) -> NDArray[np.int64] | None:
    """The label of each image, a function of (seed, index): (n,) int64, or None without classes; an edit's."""
    if chosen.edit is not None:
        return chosen.edit.labels(int(index[0]) - chosen.start, index.size)
    if chosen.labels is None:
        return None
    if chosen.labels == "random":
        return noise.random_labels(chosen.seed, index, num_classes)
    if chosen.labels == "all":
        return (index % np.uint64(num_classes)).astype(np.int64)
    listed = np.atleast_1d(np.asarray(chosen.labels, np.int64))
    picked: NDArray[np.int64] = listed[(index % np.uint64(listed.size)).astype(np.intp)]
    return picked


def count_images(labels: Labels, count: int | None, default: int) -> int:
    """The number of images: ``count``; or else the sum of a mapping of classes to counts; or ``default``.

    Raises RequestError for a mapping that counts no images, or too many.
    """
    if count is not None or not isinstance(labels, Mapping):
        return default if count is None else count
    for each in labels.values():
        if not _is_whole(each) or each < 1:
            raise RequestError(f"labels of a mapping are for 1 image or more each, not {each!r}")
    total = sum(map(int, labels.values()))
    if not 1 <= total <= MOST_COUNTED:
        raise RequestError(f"a mapping of labels is for 1 to {MOST_COUNTED} images, not {total}")
    return total


def _in_turn(counts: Mapping[int, int], start: int) -> tuple[int, ...]:
    """The list that gives images from ``start`` on the classes of ``counts``, as often as it says, in its order."""
    listed = np.repeat([int(label) for label in counts], [int(each) for each in counts.values()])
    turned: list[int] = np.roll(listed, start % listed.size).tolist()
    return tuple(turned) if len(counts) > 1 else (turned[0],)


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _whole(name: str, value: Any) -> int:
    """``value`` as an int. Raises RequestError for what is no whole number, booleans too."""
    if not _is_whole(value):
        raise RequestError(f"{name} must be a whole number, not {value!r}")
    return int(value)


def _checked_labels(labels: Labels, num_classes: int) -> Checked:
    if not num_classes:
        if labels is not None:
            raise RequestError("this model has no classes; leave the labels out")
        return None
    if labels is None:
        return "all"
    if isinstance(labels, str):
        if labels not in ("all", "random"):
            raise RequestError(f"labels must be all, random or numbers from 0 to {num_classes - 1}, not {labels!r}")
        return labels
    given: Any = np.atleast_1d(labels).tolist() if isinstance(labels, np.ndarray) else labels
    listed = [given] if _is_whole(given) else given
    if not isinstance(listed, Sequence | Mapping) or isinstance(listed, bytes | bytearray | memoryview):
        raise RequestError(
            f"labels must be all, random, a number from 0 to {num_classes - 1}, a list of such, or a mapping of such to"
            f" counts, not {labels!r}"
        )
    if not listed:
        raise RequestError("the list of labels is empty")
    for label in listed:
        if not _is_whole(label):
            raise RequestError(f"labels must be whole numbers from 0 to {num_classes - 1}, not {label!r}")
        if not 0 <= label < num_classes:
            raise RequestError(f"labels must be from 0 to {num_classes - 1}, not {label}")
    return tuple(int(label) for label in listed)
