"""torch.ops.cm: on the CPU beside the kernels themselves, as torch checks them, compiled, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import host_gpu
import numpy as np
import pytest
import torch
from torch import Tensor

from cm_runtime import noise
from cm_runtime.cuda import torch_ops
from cm_runtime.errors import RequestError
from cm_runtime.kernels.launches import Launch
from cm_runtime.kernels.limits import Limits
from cm_runtime.precond import precond

pytestmark = pytest.mark.process  # processes which compiles the kernels for the host

ops = torch.ops.cm
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
SHAPES = [(1, 1, 1, 1), (3, 3, 7, 5), (7, 1, 28, 28), (1, 7, 3, 255), (255, 1, 1, 7), (1, 3, 1, 1023), (2, 4, 8, 6)]
ULP = 2.0**-23
SPACING = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}  # relative, at most
LEAST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}  # of subnormals
FORM = precond("boundary")
C_SKIP, C_OUT, C_IN = (float(c(np.float64(1.5))) for c in (FORM.c_skip, FORM.c_out, FORM.c_in))
SEED, FIRST = torch_ops.as_signed(2**64 - 5), torch_ops.as_signed(2**63 - 1)

every_type = pytest.mark.parametrize("type", TYPES.values(), ids=TYPES)
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def images(shape: tuple[int, ...], type: torch.dtype = torch.float32, layout: Any = torch.contiguous_format) -> Tensor:
    """Standard normals, which differ from call to call."""
    return torch.randn(shape).to(type).to(memory_format=layout)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@contextmanager
def host_kernels() -> Iterator[None]:
    """While it lasts, a launch is one of the kernels' host build."""
    if host_gpu.ON_GPU:
        pytest.skip("torch's tensors are in memory that the GPU does not see")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_ops, "launch", lambda work, device: host_gpu.launch(work))
        patch.setattr(torch_ops, "limits", lambda device: host_gpu.limits())
        yield


def by_host_kernels(name: str, *arguments: Any) -> Any:
    with host_kernels():
        return getattr(torch_ops, f"_{name}_cuda")(*arguments)


def on_gpu(name: str, *arguments: Any) -> Any:
    made = getattr(ops, name)(*(each.cuda() if isinstance(each, Tensor) else each for each in arguments))
    return made.cpu() if isinstance(made, Tensor) else tuple(each.cpu() for each in made)


by_kernels = pytest.mark.parametrize("run", [by_host_kernels, pytest.param(on_gpu, marks=needs_gpu)])


def check(found: Tensor, wanted: Tensor, allowed: Tensor | float) -> None:
    """Of one type and layout, and no further apart than ``allowed``."""
    assert (found.dtype, found.shape, found.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
    assert ((found.double() - wanted.double()).abs() <= allowed).all()


# On the CPU they are what the kernels are


@pytest.mark.covering(2)
@by_kernels
@every_layout
@every_type
@every_shape
@pytest.mark.parametrize("boundary", [0.002, 0.0])
def test_skip_scale(run: Callable[..., Any], shape: Any, type: torch.dtype, layout: Any, boundary: float) -> None:
    x, F = images(shape, layout=layout), images(shape, type, layout)
    each = torch.logspace(-2.7, 1.9, shape[0])
    for sigma in (each, each[:1], each[0], each[:1].expand(shape[0])):
        arguments = x, F, sigma, 0.5, boundary
        check(run("skip_scale", *arguments), ops.skip_scale(*arguments), 6 * ULP * (x.abs() + F.abs().double()))


@by_kernels
@every_layout
@every_type
@every_shape
@pytest.mark.parametrize("clip", [True, False])
def test_step(run: Callable[..., Any], shape: Any, type: torch.dtype, layout: Any, clip: bool) -> None:
    x, F, z = images(shape, layout=layout), images(shape, type, layout), images(shape)
    for given in (z, None):
        arguments = x, F, given, C_SKIP, C_OUT, 1.3, C_IN, clip, SEED, FIRST, 2
        found, wanted = run("step", *arguments), ops.step(*arguments)
        drawn = 0 if given is not None else 1.3e-6 * torch.ones(shape).maximum(wanted[0].abs() + 3)
        allowed = 4 * ULP * torch.maximum(torch.maximum(x.abs(), F.float().abs()), 1.3 * z.abs() + 4) + drawn
        check(found[0], wanted[0], allowed)
        check(found[1], wanted[1], C_IN * allowed + SPACING[type] * wanted[1].double().abs() + LEAST[type])


@by_kernels
@every_layout
@every_type
@every_shape
def test_finish(run: Callable[..., Any], shape: Any, type: torch.dtype, layout: Any) -> None:
    """Both are the bytes of the formula in float64, but where that is as good as half-way between two."""
    x, F = images(shape, layout=layout), 2 * images(shape, type, layout)
    grey = ((C_SKIP * x.double() + C_OUT * F.double()).clamp(-1, 1) + 1) * 127.5
    for made in (run("finish", x, F, C_SKIP, C_OUT), ops.finish(x, F, C_SKIP, C_OUT)):
        assert made.dtype == torch.uint8 and made.is_contiguous()
        assert ((made.double() - grey.permute(0, 2, 3, 1)).abs() <= 0.5 + 1e-3).all()


@by_kernels
@every_layout
@every_type
@every_shape
def test_first_noise(run: Callable[..., Any], shape: Any, type: torch.dtype, layout: Any) -> None:
    like, z = images(shape, type, layout), images(shape)
    for given in (z, None):
        arguments = like, given, 80.0, C_IN, SEED, FIRST, 0
        found, wanted = run("first_noise", *arguments), ops.first_noise(*arguments)
        allowed = 0 if given is not None else 1e-6 * torch.full(shape, 80.0).maximum(wanted[0].abs())
        check(found[0], wanted[0], allowed)
        check(found[1], wanted[1], C_IN * allowed + SPACING[type] * wanted[1].double().abs() + LEAST[type])


# N, C, H, W, groups
NORMS = [
    (1, 32, 8, 8, 32),
    (2, 64, 7, 5, 32),
    (1, 255, 3, 3, 51),
    (7, 3, 5, 5, 3),
    (15, 8, 1, 1, 4),
    (1, 6, 1, 1023, 2),
]


@pytest.mark.covering(2)
@by_kernels
@every_type
@pytest.mark.parametrize("shape", NORMS, ids=str)
@pytest.mark.parametrize("silu", [True, False])
def test_group_norm_silu(run: Callable[..., Any], shape: Any, type: torch.dtype, silu: bool) -> None:
    """Of a mean far from 0 too."""
    n, c, h, w, groups = shape
    x = (2 * images((n, c, h, w)) + 10).to(type).to(memory_format=torch.channels_last)
    gamma, beta = images((c,)), images((c,))
    deviation = (x.double().reshape(n, groups, -1).var(2, correction=0) + 1e-3).sqrt()
    rounding = 4 * ULP * (1 + 20 / deviation).repeat_interleave(c // groups, 1)[:, :, None, None]  # of x - mean, scaled
    for scale_shift in (None, images((n, 2 * c), type)):
        arguments = x, gamma, beta, scale_shift, groups, 1e-3, silu
        found, wanted = run("group_norm_silu", *arguments), ops.group_norm_silu(*arguments)
        scale = gamma if scale_shift is None else gamma * (1 + scale_shift[:, :c].float())
        size = wanted.double().abs() + scale.abs().reshape(-1, c, 1, 1) + 1
        check(found, wanted, rounding * 4 * size + SPACING[type] * wanted.double().abs())


def test_scale_and_shift_and_silu_and_eps_arrive() -> None:
    x = images((2, 8, 4, 4), layout=torch.channels_last)
    gamma, beta, both = images((8,)), images((8,)), images((2, 16))
    plain = torch.nn.functional.group_norm(x, 4, gamma, beta, 0.1)
    check(ops.group_norm_silu(x, gamma, beta, None, 4, 0.1, False), plain, 1e-5)
    shifted = plain * (1 + both[:, :8, None, None]) + both[:, 8:, None, None]
    check(ops.group_norm_silu(x, gamma, beta, both, 4, 0.1, False), shifted, 1e-5)
    check(ops.group_norm_silu(x, gamma, beta, both, 4, 0.1, True), shifted * shifted.sigmoid(), 1e-5)
    offset = images((8,))
    arguments = x, gamma, beta, None, 4, 0.1, False, offset
    moved = torch.nn.functional.group_norm(x + offset[:, None, None], 4, gamma, beta, 0.1)
    for result in (ops.group_norm_silu(*arguments), by_host_kernels("group_norm_silu", *arguments)):
        check(result, moved, 1e-5)


@pytest.mark.parametrize("run", [by_host_kernels, lambda name, *arguments: getattr(ops, name)(*arguments)])
@pytest.mark.parametrize(("seed", "first"), [(0, 17), (2**64 - 1, 2**63), (2**63, 2**32 - 2), (5, 2**64 - 3)])
def test_seeds_and_numbers_of_samples_are_64_bits(run: Callable[..., Any], seed: int, first: int) -> None:
    """A step of an f that is 0, renoised by 1, is its noise."""
    zeros = torch.zeros(3, 3, 7, 5)
    bits = torch_ops.as_signed(seed), torch_ops.as_signed(first)
    wanted = noise.normal(seed, [first, first + 1, first + 2], 1, (3, 7, 5))
    x_next, _ = run("step", zeros, zeros, None, 1.0, 1.0, 1.0, 1.0, True, *bits, 1)
    assert np.abs(x_next.numpy() - wanted).max() < 1e-5
    x, _ = run("first_noise", zeros, None, 1.0, 1.0, *bits, 1)
    assert torch.equal(x, x_next)


@pytest.mark.parametrize("run", [by_host_kernels, lambda name, *arguments: getattr(ops, name)(*arguments)])
def test_what_is_not_finite_is_clamped_and_without_the_clamp_stays(run: Callable[..., Any]) -> None:
    x, F = torch.zeros(1, 1, 1, 4), torch.tensor([[[[np.nan, np.inf, -np.inf, 0.5]]]])
    for clip, wanted in ((True, [-1, 1, -1, 0.5]), (False, [np.nan, np.inf, -np.inf, 0.5])):
        x_next, x_in = run("step", x, F, torch.zeros_like(x), 1.0, 1.0, 1.0, 2.0, clip, 0, 0, 1)
        assert np.array_equal(x_next.flatten(), wanted, equal_nan=True)
        assert np.array_equal(x_in.flatten(), 2 * np.array(wanted), equal_nan=True)
        assert run("finish", x, F, 1.0, 1.0).flatten().tolist() == [0, 255, 0, 191]


# As torch checks them


def cases(type: torch.dtype, layout: Any, shape: Any = (3, 4, 4, 6)) -> dict[str, tuple[Any, ...]]:
    """Arguments of every op."""
    n, c = shape[:2]
    x, F, z = images(shape, layout=layout), images(shape, type, layout), images(shape)
    weights = images((c,)), images((c,)), images((n, 2 * c), type)
    return {
        "skip_scale": (x, F, torch.rand(n) + 0.1, 0.5, 0.002),
        "first_noise": (F, None, 80.0, C_IN, SEED, FIRST, 0),
        "step": (x, F, z, C_SKIP, C_OUT, 1.3, C_IN, True, SEED, FIRST, 2),
        "finish": (x, F, C_SKIP, C_OUT),
        "group_norm_silu": (F.to(memory_format=torch.channels_last), *weights, c // 2 or 1, 1e-5, True),
    }


@pytest.mark.covering(1)
@every_layout
@every_type
@pytest.mark.parametrize("name", cases(torch.float32, torch.contiguous_format))
def test_torch_finds_nothing_wrong(name: str, type: torch.dtype, layout: Any) -> None:
    """Schema, fake kernel, autograd registration, and tracing with sizes that are symbols."""
    arguments = cases(type, layout)[name]
    if name == "skip_scale":
        arguments[0].requires_grad_()
        arguments[1].requires_grad_()
    torch.library.opcheck(getattr(ops, name).default, arguments)


@pytest.mark.parametrize("name", cases(torch.float32, torch.contiguous_format))
def test_one_channel_in_either_layout(name: str) -> None:
    """Where both layouts are one, and only strides of channels tell them apart, the fake kernels keep them too."""
    arguments = cases(torch.float16, torch.channels_last, (3, 1, 5, 4))[name]
    made = getattr(ops, name)(*arguments)
    if name != "finish":
        assert all(each.stride() == (20, 1, 4, 1) for each in (made if isinstance(made, tuple) else (made,)))
    torch.library.opcheck(getattr(ops, name).default, arguments, test_utils="test_faketensor")
    if name == "step":  # x has the other's strides
        mixed = images((3, 1, 5, 4)), *arguments[1:]
        assert [each.stride() for each in ops.step(*mixed)] == [(20, 20, 4, 1), (20, 1, 4, 1)]
        torch.library.opcheck(ops.step.default, mixed, test_utils="test_faketensor")


@every_layout
@every_type
@pytest.mark.parametrize("boundary", [0.002, 0.0])
def test_the_gradients_are_those_of_the_formula(type: torch.dtype, layout: Any, boundary: float) -> None:
    """Appendix C's in float64; sigma has none."""
    shape = (3, 3, 7, 5)
    x, F, g = images(shape, layout=layout), images(shape, type, layout), images(shape, layout=layout)
    sigma = torch.tensor([0.002, 0.3, 80.0])
    leaves = [each.requires_grad_() for each in (x, F, sigma)]
    ops.skip_scale(*leaves, 0.5, boundary).backward(g)
    s = sigma.detach().double()[:, None, None, None]
    doubles = [each.detach().double().requires_grad_() for each in (x, F)]
    c_skip = 0.25 / ((s - boundary) ** 2 + 0.25)
    c_out = 0.5 * (s - boundary) / (s**2 + 0.25).sqrt()
    (c_skip * doubles[0] + c_out * doubles[1]).backward(g.double())
    for leaf, double in zip(leaves, doubles, strict=False):
        assert leaf.grad is not None and double.grad is not None
        rounding = SPACING[leaf.dtype] + 8 * ULP
        absolute = LEAST[leaf.dtype] + 1e-9 * (boundary > 0)  # float32's 0.002 is not the decimal one
        assert leaf.grad.dtype == leaf.dtype
        assert ((leaf.grad.double() - double.grad).abs() <= rounding * double.grad.abs() + absolute).all()
    assert sigma.grad is None
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        ops.step(x, F, None, 1.0, 1.0, 1.0, 1.0, True, 0, 0, 1)[0].sum().backward()


@every_layout
def test_a_function_of_them_compiles_whole(layout: Any) -> None:
    def sample(x: Tensor, F: Tensor, sigma: Tensor, gamma: Tensor, beta: Tensor, seed: int) -> tuple[Tensor, ...]:
        f = ops.skip_scale(x, F, sigma, 0.5, 0.002)
        x, F = f.detach(), F.detach()  # the rest has no gradients
        x_next, x_in = ops.step(
            x, F, None, C_SKIP, C_OUT, renoise=1.3, c_in=C_IN, clip=True, seed=seed, first=2, draw=1
        )
        like, _ = ops.first_noise(x_in, None, 80.0, C_IN, seed=seed, first=2, draw=0)
        h = ops.group_norm_silu(x_in.to(memory_format=torch.channels_last), gamma, beta, None, 2, 1e-5, silu=True)
        return f, ops.finish(x_next, h.to(memory_format=layout), C_SKIP, C_OUT), like

    torch.compiler.reset()
    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager")
    for n, seed in ((3, 7), (4, 8), (5, -1)):  # the later ones with symbols
        arguments = images((n, 4, 6, 6), layout=layout), images((n, 4, 6, 6), layout=layout), torch.rand(n) + 1
        weights = images((4,)), images((4,))
        grads = []
        for function in (sample, compiled):
            leaves = [each.detach().requires_grad_() for each in arguments[:2]]
            made = function(*leaves, arguments[2], *weights, seed)
            (made[0] ** 2).sum().backward()
            grads.append([*made, *(leaf.grad for leaf in leaves)])
        for eager, traced in zip(*grads, strict=True):
            assert torch.equal(eager, traced)


# What is refused


def changed(name: str, **changes: Any) -> tuple[Any, ...]:
    """An op's arguments in float16 NHWC with one made anew."""
    arguments = list(cases(torch.float16, torch.channels_last)[name])
    places = [argument.name for argument in getattr(ops, name).default._schema.arguments]
    for key, change in changes.items():
        at = places.index(key)
        arguments[at] = change(arguments[at])
    return tuple(arguments)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


SHAPED = r"\(3, 4, 4, 6\) float32 on cpu"
REFUSED: list[tuple[str, dict[str, Callable[[Any], Any]], str]] = [
    ("skip_scale", {"x": Tensor.double}, rf"^x must be {SHAPED}, not \(3, 4, 4, 6\) float64 on cpu$"),
    ("step", {"x": Tensor.half}, rf"^x must be {SHAPED}, not \(3, 4, 4, 6\) float16"),
    ("step", {"F": Tensor.double}, r"^F must be images \(N, C, H, W\) in float32, float16 or bfloat16, not .*float64"),
    ("finish", {"F": lambda F: F[:, :, :3]}, "^F must be contiguous or channels_last, not of strides"),
    ("finish", {"x": lambda x: x[:2]}, rf"^x must be {SHAPED}, not \(2, 4, 4, 6\)"),
    ("finish", {"x": lambda x: x[0], "F": lambda F: F[0]}, r"^F must be images \(N, C, H, W\)"),
    ("finish", {"x": lambda x: x[:0], "F": lambda F: F[:0]}, r"^F must be images .* not \(0, 4, 4, 6\)"),
    ("skip_scale", {"x": Tensor.contiguous}, "^x and F must have one layout"),
    ("skip_scale", {"x": transposed}, "^x must be contiguous or channels_last"),
    ("skip_scale", {"x": lambda x: x.to("meta")}, rf"^x must be {SHAPED}, not \(3, 4, 4, 6\) float32 on meta"),
    ("skip_scale", {"sigma": lambda s: s[:2]}, r"^sigma must be \(3,\) float32 on cpu, not \(2,\)"),
    ("skip_scale", {"sigma": Tensor.double}, r"^sigma must be \(3,\) float32 on cpu, not \(3,\) float64"),
    ("skip_scale", {"sigma": lambda s: s[:, None]}, r"^sigma must be \(3,\) float32 on cpu, not \(3, 1\)"),
    ("skip_scale", {"sigma": lambda s: s[:1, None]}, r"^sigma must be \(3,\) float32 on cpu, not \(1, 1\)"),
    ("step", {"z": lambda z: z[:2]}, rf"^z must be {SHAPED}, not \(2, 4, 4, 6\)"),
    ("step", {"z": Tensor.half}, rf"^z must be {SHAPED}, not .*float16"),
    ("step", {"z": lambda z: z.to(memory_format=torch.channels_last)}, "^z must be contiguous, not of strides"),
    ("first_noise", {"like": Tensor.int}, "^like must be images .* not .*int32"),
    ("first_noise", {"like": transposed}, "^like must be contiguous or channels_last"),
    ("group_norm_silu", {"x": Tensor.contiguous}, "^x must be channels_last$"),
    ("group_norm_silu", {"groups": lambda g: 3}, "^4 channels cannot be split in 3 groups$"),
    ("group_norm_silu", {"groups": lambda g: 0}, "^4 channels cannot be split in 0 groups$"),
    ("group_norm_silu", {"gamma": Tensor.half}, r"^gamma must be \(4,\) float32 on cpu, not \(4,\) float16"),
    ("group_norm_silu", {"beta": lambda b: b[:3]}, r"^beta must be \(4,\) float32 on cpu, not \(3,\)"),
    ("group_norm_silu", {"scale_shift": Tensor.float}, r"^scale_shift must be \(3, 8\) float16 on cpu, not .*float32"),
    ("group_norm_silu", {"scale_shift": lambda s: s.T.contiguous().T}, "^scale_shift must be contiguous"),
]
DRAWS = [(name, draw) for name in ("step", "first_noise") for draw in (-1, 2**32)]


def never(work: Launch, device: torch.device) -> None:
    raise AssertionError("what is refused was launched")


@pytest.mark.parametrize(("name", "changes", "reason"), REFUSED)
def test_other_tensors_are_refused(monkeypatch: Any, name: str, changes: Any, reason: str) -> None:
    """On a CPU, on a GPU, and while tracing."""
    monkeypatch.setattr(torch_ops, "launch", never)
    for run in (getattr(ops, name), getattr(torch_ops, f"_{name}_cuda"), getattr(torch_ops, f"_{name}_fake")):
        with pytest.raises(RequestError, match=reason):
            run(*changed(name, **changes))


@pytest.mark.parametrize(("name", "draw"), DRAWS)
def test_other_draws_are_refused(monkeypatch: Any, name: str, draw: int) -> None:
    """Whether noise is drawn or given."""
    monkeypatch.setattr(torch_ops, "launch", never)
    for z in (None, images((3, 4, 4, 6))):
        for run in (getattr(ops, name), getattr(torch_ops, f"_{name}_cuda")):
            with pytest.raises(RequestError, match=f"^draw must be from 0 to 4294967295, not {draw}$"):
                run(*changed(name, z=lambda _, z=z: z, draw=lambda _: draw))


def misaligned(tensor: Tensor) -> Tensor:
    """A copy whose address is no multiple of 16."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return memory.as_strided(tensor.shape, tensor.stride(), memory.storage_offset()).copy_(tensor)


@pytest.mark.parametrize(
    ("name", "which"),
    [(name, which) for name in ("skip_scale", "step", "finish") for which in ("x", "F")]
    + [("step", "z"), ("group_norm_silu", "x"), ("group_norm_silu", "scale_shift")],
)
def test_a_misaligned_view_is_refused_where_a_kernel_would_read_it(monkeypatch: Any, name: str, which: str) -> None:
    monkeypatch.setattr(torch_ops, "launch", never)
    monkeypatch.setattr(torch_ops, "limits", lambda device: Limits())
    arguments, multiple = changed(name, **{which: misaligned}), 4 if which == "scale_shift" else 16
    reason = f"^{which} is misaligned: its address must be a multiple of {multiple} bytes$"
    with pytest.raises(RequestError, match=reason):
        getattr(torch_ops, f"_{name}_cuda")(*arguments)
    getattr(ops, name)(*arguments)


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_a_graph_captures_them_and_a_side_stream_orders_them() -> None:
    x, F = (images((3, 3, 32, 32)).cuda() for _ in range(2))
    numbers = C_SKIP, C_OUT, 1.3, C_IN, True, SEED, FIRST, 2
    ops.step(x, F, None, *numbers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x_next, x_in = ops.step(x, F, None, *numbers)
    x.copy_(images((3, 3, 32, 32)))
    graph.replay()
    for found, wanted in zip((x_next, x_in), ops.step(x, F, None, *numbers), strict=True):
        assert torch.equal(found, wanted)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        late = F.mul(2)  # a launch in another stream would not wait for it
        made = ops.finish(x, late, C_SKIP, C_OUT)
    side.synchronize()
    assert torch.equal(made, ops.finish(x, F * 2, C_SKIP, C_OUT))
