"""Images that a caller asks for, `Draw`, checked against a model as a `Request`, and shared out.

Image ``i`` of a seed depends on (model, seed, i) alone: its noise and its label are addressed by those numbers, so
micro-batches may be of any size and come in any order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any, Literal, TypedDict, TypeVar, cast, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray

from cm_runtime.errors import RequestError
from cm_runtime.errors.wording import quantity
from cm_runtime.manifest import Manifest
from cm_runtime.projections import Edit
from cm_runtime.schedule import level_text, same_levels

Labels = int | Sequence[int] | NDArray[np.integer] | Mapping[int, int] | Literal["all", "random"] | None
CheckedLabels = tuple[int, ...] | Literal["all", "random"] | None
Output = Literal["uint8", "float32", "device"]
F = TypeVar("F", bound=Callable[..., Any])
INDICES = 1 << 64  # images that a seed has
MICRO_BATCH_LIMIT = 1 << 16
MOST_COUNTED = 1 << 20  # images that a mapping of classes to counts asks for
RENAMED = {"batch": "micro_batch", "label": "labels", "index": "start"}  # options by names that they once had


class ImageOptions(TypedDict, total=False):
    """`DrawOptions` but the output, which says what images are."""

    sigmas: Sequence[float] | None
    start: int
    labels: Labels
    micro_batch: int | None
    clip: bool


class DrawOptions(ImageOptions, total=False):
    """Fields of `Draw` as keywords of public functions; count, steps and seed have places of their own there."""

    output: Output


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Images to draw: ``start`` to ``start + count - 1`` of a seed, in a few steps.

    Args:
        count: how many; None is the sum of what ``labels`` counts, or the function's own default.
        steps: network evaluations of an image, default 2; excludes sigmas.
        sigmas: noise levels in place of steps, descending from the model's sigma_max.
        seed: image i of a seed is always the same.
        start: index of the first image.
        labels: "all" (image i has class i mod classes; the default), "random", one label, a list used in turn (image i
            has entry i mod its length), or a mapping of classes to counts: {3: 100, 7: 50} is 100 images of class 3 and
            then 50 of 7, from ``start`` on, of which ``count`` must be the sum.
        micro_batch: images that the engine sees at once; None is its own choice.
        output: uint8; float32 before quantisation; or, of `cm.sample` on a GPU alone, device: uint8 that stays in the
            GPU's memory, a `cuda.arrays.DeviceImages` with `__cuda_array_interface__`.
        clip: clamp every x0 to [-1, 1].

    Example:
        >>> Draw(count=256, steps=2, labels=[0, 3])
    """

    count: int | None = None
    steps: int | None = None
    sigmas: Sequence[float] | None = None
    seed: int = 0
    start: int = 0
    labels: Labels = None
    micro_batch: int | None = None
    output: Output = "uint8"
    clip: bool = True

    def total(self, default: int) -> int:
        """The number of images: ``count``; or else the sum of a mapping of classes to counts; or ``default``.

        Raises RequestError for a mapping that counts no images, or too many.
        """
        if self.count is not None or not isinstance(self.labels, Mapping):
            return default if self.count is None else self.count
        for each in self.labels.values():
            if not _is_whole(each) or each < 1:
                raise RequestError(f"labels of a mapping are for 1 image or more each, not {each!r}")
        total = sum(map(int, self.labels.values()))
        if not 1 <= total <= MOST_COUNTED:
            raise RequestError(f"a mapping of labels is for 1 to {MOST_COUNTED} images, not {total}")
        return total


@dataclass(frozen=True, kw_only=True)
class Request(Draw):
    """A `Draw` that `sampling_request` checked against a model and settled; or an edit, by `edit_request`.

    labels: "all", "random", or a tuple in turn: image i has entry i mod its length; an edit has its own.
    """

    count: int
    steps: int
    sigmas: tuple[float, ...]
    labels: CheckedLabels
    micro_batch: int
    edit: Edit | None = None


def sampling_request(manifest: Manifest, draw: Draw, most: int = MICRO_BATCH_LIMIT) -> Request:
    """Check a draw against a model.

    Args:
        manifest: of the model.
        draw: of 256 images where it has no count.
        most: images that the engine should see at once; micro-batches are even shares of at most so many where the
            draw names no size.

    Returns:
        The same images with every choice settled.

    Raises:
        RequestError: the model cannot serve it.

    Example:
        >>> request = sampling_request(model.manifest, Draw(count=8, steps=2), model.micro_batch)
    """
    if manifest.is_teacher:
        raise RequestError("this model is an EDM teacher, which a few steps cannot sample; make it consistent first")
    steps = None if draw.steps is None else whole_number("steps", draw.steps)
    if manifest.graph == "sampler":
        levels = _fixed_levels(manifest, draw, steps)
    elif draw.sigmas is not None:
        if steps is not None:
            raise RequestError("give steps or sigmas, not both")
        levels = manifest.noise_range.check(draw.sigmas)
    else:
        levels = manifest.noise_range.levels(2 if steps is None else steps, manifest.sigmas)
    return _request(manifest, draw, levels, most)


def _fixed_levels(manifest: Manifest, draw: Draw, steps: int | None) -> tuple[float, ...]:
    """The exact levels of a sampler graph, if the draw names them as printed, or their number, or neither.

    Raises RequestError.
    """
    (levels,) = manifest.sigmas.values()
    if steps not in (None, len(levels)) or (draw.sigmas is not None and not same_levels(draw.sigmas, levels)):
        other = quantity(steps or 0, "step") if draw.sigmas is None else f"at {level_text(draw.sigmas)}"
        raise RequestError(
            f"this sampler file draws in {quantity(len(levels), 'step')}, at {level_text(levels)}, not {other};"
            " a denoiser file draws in any"
        )
    if draw.output == "float32" or not draw.clip:
        raise RequestError("a sampler file makes uint8 images, clamped at each step; a denoiser file makes others too")
    return levels


def teacher_request(manifest: Manifest, draw: Draw, most: int = MICRO_BATCH_LIMIT) -> Request:
    """Check a draw for `sampling.teacher_batches`: the Karras grid of ``steps`` ODE steps, default 18.

    Raises RequestError.
    """
    if not manifest.is_teacher:
        raise RequestError("this model is no EDM teacher; a few steps sample it")
    steps = 18 if draw.steps is None else draw.steps
    if not 2 <= steps <= 1000:
        raise RequestError(f"an EDM teacher takes from 2 to 1000 ODE steps, not {steps}")
    levels = tuple(float(s) for s in manifest.noise_range.karras(steps))
    return _request(manifest, draw, levels, most)


def edit_request(manifest: Manifest, draw: Draw, edit: Edit, most: int = MICRO_BATCH_LIMIT) -> Request:
    """Check a request for the answers to an edit: answer n has noise number ``start + n``. Raises RequestError.

    draw: its sigmas are as of a sampler, but the first may be any from above sigma_min to sigma_max; its count and its
    labels are the edit's.
    """
    m, sigmas = manifest, draw.sigmas or ()
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
    check_labels(edit.label, m.num_classes)
    if edit.label is not None and edit.label.shape != (inputs,):
        raise RequestError(f"{quantity(inputs, 'image')} to edit need one label each, not {edit.label.size}")
    first = float(sigmas[0]) if len(sigmas) else m.sigma_max
    levels = replace(m.noise_range, sigma_max=min(first, m.sigma_max)).check(sigmas)
    request = _request(m, replace(draw, count=edit.count, labels=None), levels, most)
    return replace(request, labels=None, edit=edit)


def _request(manifest: Manifest, draw: Draw, levels: tuple[float, ...], most: int) -> Request:
    count, seed, start = (
        whole_number("count", draw.total(256)),
        whole_number("seed", draw.seed),
        whole_number("start", draw.start),
    )
    if count < 1:
        raise RequestError(f"count must be at least 1, not {count}")
    size = even_micro_batch(count, most) if draw.micro_batch is None else draw.micro_batch
    micro_batch = min(whole_number("micro_batch", size), count)
    if not 1 <= micro_batch <= MICRO_BATCH_LIMIT:
        raise RequestError(f"micro-batch must be from 1 to {MICRO_BATCH_LIMIT}, not {micro_batch}")
    if not 0 <= seed < 1 << 64:
        raise RequestError(f"seed must be from 0 to 2^64-1, not {seed}")
    if not 0 <= start <= INDICES - count:
        raise RequestError(f"image indices must be from 0 to 2^64-1; {quantity(count, 'image')} from {start} are not")
    if draw.output == "device":
        raise RequestError("output device is cm.sample's alone; here images come to the host, as uint8 or float32")
    if draw.output not in get_args(Output):
        raise RequestError(f"output must be uint8 or float32, not {draw.output!r}")
    labels = check_labels(draw.labels, manifest.num_classes)
    if isinstance(draw.labels, Mapping):
        total = replace(draw, count=None).total(0)
        if total != count:
            raise RequestError(f"the labels are for {quantity(total, 'image')}, but {count} are asked for")
        labels = _in_turn(draw.labels, start)
    values = {"count": count, "seed": seed, "start": start, "labels": labels, "micro_batch": micro_batch}
    return Request(**{**vars(draw), **values, "steps": len(levels), "sigmas": levels})


def no_label(num_classes: int) -> RequestError:
    """The error of an edit of images whose classes are unknown."""
    classes = quantity(num_classes, "class")
    return RequestError(
        f"this model has {classes}: give the images' own, from 0 to {num_classes - 1}, as labels (--labels)"
    )


def explicit_signature(options: Any = DrawOptions, **defaults: Any) -> Callable[[F], F]:
    """Show ``**options: Unpack[...]`` as keywords with the defaults of `Draw`, or others, in help and in editors.

    The function takes no other keywords: TypeError names the function, and the new name of a renamed option.
    """
    values = {field.name: field.default for field in fields(Draw)} | defaults
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=values[name], annotation=kind)
        for name, kind in get_type_hints(options).items()
    ]

    def show(function: F) -> F:
        signature = inspect.signature(function)
        plain = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        names = {each.name for each in (*plain, *more)}

        @wraps(function)
        def call(*values: Any, **keywords: Any) -> Any:
            for name in keywords.keys() - names:
                hint = f"; it is {RENAMED[name]}" if name in RENAMED else ""
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}{hint}")
            return function(*values, **keywords)

        call.__signature__ = signature.replace(parameters=[*plain, *more])  # type: ignore[attr-defined]
        return cast(F, call)

    return show


def even_micro_batch(count: int, most: int) -> int:
    """The size of micro-batches that splits ``count`` images evenly with at most ``most`` in each."""
    return -(-count // -(-count // most))


def split(request: Request, size: int) -> Iterator[Request]:
    """Share out a request's images as requests of ``size`` each, the last one shorter."""
    for first in range(0, request.count, size):
        count = min(size, request.count - first)
        edit = request.edit and request.edit.part(first, count)
        yield replace(request, start=request.start + first, count=count, edit=edit)


def _in_turn(counts: Mapping[int, int], start: int) -> tuple[int, ...]:
    """The list that gives images from ``start`` on the classes of ``counts``, as often as it says, in its order."""
    classes = np.repeat([int(label) for label in counts], [int(each) for each in counts.values()])
    turn: list[int] = np.roll(classes, start % classes.size).tolist()
    return tuple(turn) if len(counts) > 1 else (turn[0],)


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def whole_number(name: str, value: Any) -> int:
    """``value`` as an int. Raises RequestError for what is no whole number, booleans too."""
    if not _is_whole(value):
        raise RequestError(f"{name} must be a whole number, not {value!r}")
    return int(value)


def check_labels(labels: Labels, num_classes: int) -> CheckedLabels:
    """Labels as a request has them, of a mapping its classes. Raises RequestError."""
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
    plain: Any = np.atleast_1d(labels).tolist() if isinstance(labels, np.ndarray) else labels
    classes = [plain] if _is_whole(plain) else plain
    if not isinstance(classes, Sequence | Mapping) or isinstance(classes, bytes | bytearray | memoryview):
        raise RequestError(
            f"labels must be all, random, a number from 0 to {num_classes - 1}, a list of such, or a mapping of such to"
            f" counts, not {labels!r}"
        )
    if not classes:
        raise RequestError("the list of labels is empty")
    for label in classes:
        if not _is_whole(label):
            raise RequestError(f"labels must be whole numbers from 0 to {num_classes - 1}, not {label!r}")
        if not 0 <= label < num_classes:
            raise RequestError(f"labels must be from 0 to {num_classes - 1}, not {label}")
    return tuple(int(label) for label in classes)
