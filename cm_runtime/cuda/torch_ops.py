"""Our kernels as torch's custom ops, ``torch.ops.cm.*``; importing this module registers them.

On a GPU an op is one launch in torch's current stream, or two, behind a few fills that put its coefficients in memory.
Nothing waits, and a CUDA graph can capture it once the kernels are loaded, that is, after a first run. On a CPU an op
is its formula in float32. All of them trace; `skip_scale` alone has gradients.

Images are (N, C, H, W), contiguous or channels_last, all of them alike, and what is made of them has their layout. x is
float32, F float32, float16 or bfloat16; coefficients are numbers that precond.py has computed. RequestError is raised
for anything else, and on a GPU for views whose address is no multiple of 16 bytes.

Noise that is not given is draw ``draw`` of the samples ``first`` + n under ``seed`` (see noise.py). A schema has only
signed integers: seed and first, from 0 to 2^64-1, are the int64 of the same bits, `signed`. A number that is not finite
is clamped to -1 or 1, as the kernels do, and nobody is told: whoever needs to know looks at F.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional

from cm_runtime import noise
from cm_runtime.cuda.torch_launch import launch, limits
from cm_runtime.errors import RequestError
from cm_runtime.errors.wording import quantity
from cm_runtime.kernels import group_norm, launches
from cm_runtime.kernels.launches import Arrays, Images, Type
from cm_runtime.precond import Precond, precond

TYPES: dict[torch.dtype, Type] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def as_signed(number: int) -> int:
    """The int64 that has the 64 bits of a seed or a sample's number, 0..2^64-1."""
    return (number + 2**63) % 2**64 - 2**63


# y = c_skip(sigma) x + c_out(sigma) F


@custom_op("cm::skip_scale", mutates_args=(), device_types="cpu")
def skip_scale(x: Tensor, F: Tensor, sigma: Tensor, sigma_data: float, sigma_boundary: float) -> Tensor:
    """c_skip(sigma) x + c_out(sigma) F, float32 (arXiv 2303.01469, appendix C; a boundary of 0 is the edm form).

    sigma: float32, (N,) or one number for all; it gets no gradient.
    """
    _check_skip_scale(x, F, sigma)
    form, s = _form(sigma_data, sigma_boundary), sigma.reshape(-1, 1, 1, 1)
    return x.clone().mul_(form.c_skip(s)).add_(form.c_out(s) * F)


def _skip_scale_cuda(x: Tensor, F: Tensor, sigma: Tensor, sigma_data: float, sigma_boundary: float) -> Tensor:
    images = _check_skip_scale(x, F, sigma)
    y, each, form = torch.empty_like(x), sigma.contiguous(), _form(sigma_data, sigma_boundary)
    at = Arrays(x=x.data_ptr(), F=F.data_ptr(), sigma=each.data_ptr(), y=y.data_ptr())
    launch(launches.skip_scale(images, at, form, levels=sigma.numel()), x.device)
    return y


def _skip_scale_fake(x: Tensor, F: Tensor, sigma: Tensor, *_: float) -> Tensor:
    _check_skip_scale(x, F, sigma)
    return torch.empty_like(x)


def _keep_sigma(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, F, sigma, sigma_data, sigma_boundary = inputs
    ctx.save_for_backward(sigma)
    ctx.form, ctx.type = _form(sigma_data, sigma_boundary), F.dtype


def _skip_scale_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """c_skip g, and c_out g in F's type."""
    (sigma,) = ctx.saved_tensors
    s = sigma.reshape(-1, 1, 1, 1)
    to_x, to_F = ctx.needs_input_grad[:2]
    return ctx.form.c_skip(s) * g if to_x else None, (ctx.form.c_out(s) * g).to(ctx.type) if to_F else None, *[None] * 3


# What comes before, between and after evaluations of the network: kernels/steps.cu


@custom_op("cm::first_noise", mutates_args=(), device_types="cpu")
def first_noise(
    like: Tensor, z: Tensor | None, sigma: float, c_in: float, seed: int, first: int, draw: int
) -> tuple[Tensor, Tensor]:
    """x = sigma z float32, and x_in = c_in x in the type of ``like``, whose numbers are not read.

    z: (N, C, H, W) float32, contiguous, or None to draw it.
    """
    _check_noise(_batch("like", like), like, z, draw)
    x = torch.empty_like(like, dtype=torch.float32).copy_(_noise(like, z, seed, first, draw)).mul_(sigma)
    return x, torch.empty_like(like).copy_(x * c_in)


def _first_noise_cuda(
    like: Tensor, z: Tensor | None, sigma: float, c_in: float, seed: int, first: int, draw: int
) -> tuple[Tensor, Tensor]:
    images = _check_noise(_batch("like", like), like, z, draw)
    x, x_in = torch.empty_like(like, dtype=torch.float32), torch.empty_like(like)
    level, request = _table(like, torch.float32, 0, 0, sigma, c_in), _table(like, torch.int64, seed, first)
    at = Arrays(request.data_ptr(), level.data_ptr(), _address("z", z), x=x.data_ptr(), x_in=x_in.data_ptr())
    launch(launches.first_noise(images, at, draw), like.device)
    return x, x_in


def _first_noise_fake(like: Tensor, z: Tensor | None, *_: float) -> tuple[Tensor, Tensor]:
    _check_noise(_batch("like", like), like, z)
    return torch.empty_like(like, dtype=torch.float32), torch.empty_like(like)


@custom_op("cm::step", mutates_args=(), device_types="cpu")
def step(
    x: Tensor,
    F: Tensor,
    z: Tensor | None,
    c_skip: float,
    c_out: float,
    renoise: float,
    c_in: float,
    clip: bool,
    seed: int,
    first: int,
    draw: int,
) -> tuple[Tensor, Tensor]:
    """x_next = clamp(c_skip x + c_out F) + renoise z float32, and x_in = c_in x_next in F's type (alg. 1).

    z: (N, C, H, W) float32, contiguous, or None to draw it.
    """
    _check_noise(_pair(x, F), F, z, draw)
    x_next = _check_denoised(x, F, c_skip, c_out, clip).add_(_noise(x, z, seed, first, draw), alpha=renoise)
    return x_next, torch.empty_like(F).copy_(x_next * c_in)


def _step_cuda(
    x: Tensor,
    F: Tensor,
    z: Tensor | None,
    c_skip: float,
    c_out: float,
    renoise: float,
    c_in: float,
    clip: bool,
    seed: int,
    first: int,
    draw: int,
) -> tuple[Tensor, Tensor]:
    images = _check_noise(_pair(x, F), F, z, draw)
    x_next, x_in = torch.empty_like(x), torch.empty_like(F)
    level, request = _table(x, torch.float32, c_skip, c_out, renoise, c_in), _table(x, torch.int64, seed, first)
    flag = x.new_empty(1, dtype=torch.int32)
    at = Arrays(
        request.data_ptr(),
        level.data_ptr(),
        _address("z", z),
        x.data_ptr(),
        F.data_ptr(),
        x_next.data_ptr(),
        x_in.data_ptr(),
        not_finite=flag.data_ptr(),
    )
    launch(launches.step(images, at, draw, clip=clip), x.device)
    return x_next, x_in


def _step_fake(x: Tensor, F: Tensor, z: Tensor | None, *_: float) -> tuple[Tensor, Tensor]:
    _check_noise(_pair(x, F), F, z)
    return torch.empty_like(x), torch.empty_like(F)


@custom_op("cm::finish", mutates_args=(), device_types="cpu")
def finish(x: Tensor, F: Tensor, c_skip: float, c_out: float) -> Tensor:
    """clamp(c_skip x + c_out F) as uint8 (N, H, W, C)."""
    _pair(x, F)
    grey = _check_denoised(x, F, c_skip, c_out, True).add_(1).mul_(127.5).round_()
    return _bytes(x).copy_(grey.permute(0, 2, 3, 1))


def _finish_cuda(x: Tensor, F: Tensor, c_skip: float, c_out: float) -> Tensor:
    images = _pair(x, F)
    pixels, flag, level = _bytes(x), x.new_empty(1, dtype=torch.int32), _table(x, torch.float32, c_skip, c_out, 0, 0)
    addresses = {"level": level, "x": x, "F": F, "bytes": pixels, "not_finite": flag}
    at = Arrays(**{name: tensor.data_ptr() for name, tensor in addresses.items()})
    launch(launches.finish(images, at), x.device)
    return pixels


def _finish_fake(x: Tensor, F: Tensor, *_: float) -> Tensor:
    _pair(x, F)
    return _bytes(x)


# GroupNorm, scale and shift, SiLU: kernels/group_norm.cu


@custom_op("cm::group_norm_silu", mutates_args=(), device_types="cpu")
def group_norm_silu(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    scale_shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    offset: Tensor | None = None,
) -> Tensor:
    """silu(group_norm(x + offset) (1 + scale) + shift) in x's type, computed in float32; x: channels_last.

    gamma, beta: (C,) float32, and so is offset, or None; scale_shift: (N, 2C) in x's type, scales first, or None.
    """
    _check_norm(x, gamma, beta, scale_shift, groups, offset)
    # of channels_last torch would take the variance from squares, which loses it where the mean is large
    full = x.to(torch.float32, memory_format=torch.contiguous_format)
    full = full if offset is None else full + offset[:, None, None]
    y = torch.group_norm(full, groups, gamma, beta, eps)
    if scale_shift is not None:
        scale, shift = scale_shift.float()[:, :, None, None].chunk(2, dim=1)
        y.mul_(1 + scale).add_(shift)
    return torch.empty_like(x).copy_(functional.silu(y, inplace=True) if silu else y)


def _group_norm_silu_cuda(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    scale_shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    offset: Tensor | None = None,
) -> Tensor:
    images, y = _check_norm(x, gamma, beta, scale_shift, groups, offset), torch.empty_like(x)
    plan = group_norm.plan_norm(images, groups, limits(x.device))
    moments = x.new_empty(plan.moments(images, groups), dtype=torch.float32)
    addresses = {"x": x, "gamma": gamma, "beta": beta, "moments": moments, "y": y}
    at = Arrays(**{name: tensor.data_ptr() for name, tensor in addresses.items()})
    at = at._replace(scale_shift=_address("scale_shift", scale_shift, 4), offset=_address("offset", offset, 4))
    for work in group_norm.group_norm_silu(images, at, groups, eps, silu, plan):
        launch(work, x.device)
    return y


def _group_norm_silu_fake(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    scale_shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    offset: Tensor | None = None,
) -> Tensor:
    _check_norm(x, gamma, beta, scale_shift, groups, offset)
    return torch.empty_like(x)


skip_scale.register_autograd(_skip_scale_backward, setup_context=_keep_sigma)
for _op, _cuda, _fake in (
    (skip_scale, _skip_scale_cuda, _skip_scale_fake),
    (first_noise, _first_noise_cuda, _first_noise_fake),
    (step, _step_cuda, _step_fake),
    (finish, _finish_cuda, _finish_fake),
    (group_norm_silu, _group_norm_silu_cuda, _group_norm_silu_fake),
):
    _op.register_kernel("cuda", _cuda)
    _op.register_fake(_fake)


# What is taken; each raises RequestError


def _batch(name: str, images: Tensor) -> Images:
    if images.dim() != 4 or images.numel() == 0 or images.dtype not in TYPES:
        description = _describe(images.shape, images.dtype, images.device)
        raise RequestError(f"{name} must be images (N, C, H, W) in float32, float16 or bfloat16, not {description}")
    n, c, h, w = images.shape
    if images.is_contiguous():
        return Images(n, c, h, w, TYPES[images.dtype], "nchw")
    if images.is_contiguous(memory_format=torch.channels_last):
        return Images(n, c, h, w, TYPES[images.dtype], "nhwc")
    raise RequestError(f"{name} must be contiguous or channels_last, not of strides {tuple(images.stride())}")


def _pair(x: Tensor, F: Tensor) -> Images:
    """The batch that F is of, in F's type, with x beside it."""
    images = _batch("F", F)
    _check("x", x, F.shape, torch.float32, F.device)
    if _batch("x", x).layout != images.layout:
        raise RequestError("x and F must have one layout: both contiguous, or both channels_last")
    return images


def _check_skip_scale(x: Tensor, F: Tensor, sigma: Tensor) -> Images:
    images = _pair(x, F)
    is_for_all = sigma.dim() <= 1 and sigma.numel() == 1
    _check("sigma", sigma, sigma.shape if is_for_all else (images.n,), torch.float32, F.device)
    return images


def _check_noise(images: Images, F: Tensor, z: Tensor | None, draw: int = 0) -> Images:
    if not 0 <= draw < 1 << 32:
        raise RequestError(f"draw must be from 0 to {(1 << 32) - 1}, not {draw}")
    if z is not None:
        _check_plain("z", z, F.shape, torch.float32, F.device)
    return images


def _check_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, scale_shift: Tensor | None, groups: int, offset: Tensor | None
) -> Images:
    images = _batch("x", x)
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise RequestError("x must be channels_last")
    channels = images.channels
    if groups < 1 or channels % groups:
        raise RequestError(f"{quantity(channels, 'channel')} cannot be split in {quantity(groups, 'group')}")
    _check_plain("gamma", gamma, (channels,), torch.float32, x.device)
    _check_plain("beta", beta, (channels,), torch.float32, x.device)
    if scale_shift is not None:
        _check_plain("scale_shift", scale_shift, (images.n, 2 * channels), x.dtype, x.device)
    if offset is not None:
        _check_plain("offset", offset, (channels,), torch.float32, x.device)
    return images._replace(layout="nhwc")


def _check_plain(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    _check(name, tensor, shape, dtype, device)
    if not tensor.is_contiguous():
        raise RequestError(f"{name} must be contiguous, not of strides {tuple(tensor.stride())}")


def _check(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or tensor.device != device:
        description = _describe(tensor.shape, tensor.dtype, tensor.device)
        raise RequestError(f"{name} must be {_describe(shape, dtype, device)}, not {description}")


def _describe(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> str:
    return f"{tuple(shape)} {str(dtype).removeprefix('torch.')} on {device}"


# Parts of the ops


def _form(sigma_data: float, sigma_boundary: float) -> Precond:
    return precond("boundary" if sigma_boundary else "edm", sigma_data, sigma_boundary)


def _check_denoised(x: Tensor, F: Tensor, c_skip: float, c_out: float, clip: bool) -> Tensor:
    """clamp(c_skip x + c_out F), float32, in memory of its own."""
    x0 = x.clone().mul_(c_skip).add_(F, alpha=c_out)
    return x0.nan_to_num_(-1, 1, -1).clamp_(-1, 1) if clip else x0  # what is no number is -1, as in fmaxf


def _noise(images: Tensor, z: Tensor | None, seed: int, first: int, draw: int) -> Tensor:
    """z, or what is drawn in its place, (N, C, H, W) float32."""
    if z is not None:
        return z
    samples = np.arange(len(images), dtype=np.uint64) + np.uint64(first % 2**64)
    return torch.from_numpy(noise.normal(seed % 2**64, samples, draw, images.shape[1:]))


def _bytes(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.new_empty((n, h, w, c), dtype=torch.uint8)


def _table(beside: Tensor, dtype: torch.dtype, *numbers: float) -> Tensor:
    """Numbers in memory of the GPU, by fills: a copy from the host would wait, and no graph could capture it."""
    table = beside.new_empty(len(numbers), dtype=dtype)
    for place, number in zip(table, numbers, strict=True):
        place.fill_(number)
    return table


def _address(name: str, tensor: Tensor | None, multiple: int = launches.ALIGNMENT) -> int:
    """As a launch takes it, 0 for None, but by the name that the op has for it where it is refused."""
    address = 0 if tensor is None else tensor.data_ptr()
    if address % multiple:
        raise RequestError(f"{name} is misaligned: its address must be a multiple of {multiple} bytes")
    return address
