"""Bytes that F's evaluation in torch moves, counted from the operators of one evaluation; nothing is computed.

Usage: python benchmarks/bytes_moved.py [NETWORK]

Each operator reads its inputs and writes its outputs once, whatever the caches hold; views move nothing. As cuDNN adds
no bias, torch's convolution with one is counted with another read and write of its output. Not counted: what cuDNN does
to the layout of NCHW images, and how a matrix product or an attention goes over its inputs.

The bound: weights once, inputs and outputs of convolutions, and a read and a write of what is normalised.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cm_runtime.backends.torch_unet import InferenceUNet
from cm_runtime.bench.networks import config
from cm_runtime.networks.consistency import build
from cm_runtime.networks.unet import GroupNorm, UNet

SPEED = 4.3e12  # bytes a second of an H200's memory
BATCHES = (1, 64)


class Bytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it lasts: bytes and calls of each operator, by its name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Bytes of all operators."""
        return sum(self.bytes.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count it unless all of its outputs are views."""
        output = func(*args, **(kwargs or {}))
        read, made = (_tensors(each) for each in ((args, kwargs), output))
        written = _tensors([args[i] for i, each in enumerate(func._schema.arguments) if _is_written(each)])
        memory = {_storage(tensor) for tensor in read}
        written += [tensor for tensor in made if _storage(tensor) not in memory]
        if written:
            moved = sum(map(_size, read + written))
            if func is torch.ops.aten.convolution.default and args[2] is not None:
                moved += 2 * _size(made[0])
            self.bytes[str(func)] += moved
            self.calls[str(func)] += 1
        return output


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # type: ignore[no-any-return]


def _size(tensor: Tensor) -> int:
    """Bytes of the elements that a tensor has in memory: what is expanded is there once."""
    count = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride else 1
    return count


def count(make: Callable[[UNet], nn.Module], network: str, batch: int, dtype: torch.dtype, autocast: bool) -> Bytes:
    """The bytes of one evaluation of a standing network of ``batch`` images in ``dtype``."""
    settings = config(network).network
    shape = batch, settings.image_channels, settings.image_size, settings.image_size
    with FakeTensorMode(), torch.no_grad():
        F = make(build(config(network)).F.eval())
        x = torch.empty(shape, dtype=torch.float32 if autocast else dtype)
        inputs = [x if autocast else x.to(memory_format=torch.channels_last), torch.empty(batch)]
        if settings.num_classes:
            inputs.append(torch.zeros(batch, dtype=torch.int64))
        bytes_moved = Bytes()
        with torch.autocast("cpu", dtype, enabled=autocast), bytes_moved:
            F(*inputs)
    return bytes_moved


def bound(network: str, batch: int, size: int = 2) -> int:
    """Weights once, inputs and outputs of convolutions, two moves an element normalised; ``size`` bytes each."""
    settings = config(network).network
    elements: Counter[str] = Counter()

    def convolution(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        elements["convolutions"] += inputs[0].numel() + output.numel()

    def norm(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        elements["norms"] += 2 * output.numel()

    F = build(config(network), "meta").F.eval()
    for layer in F.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(convolution)
        if isinstance(layer, GroupNorm):
            layer.register_forward_hook(norm)
    with torch.no_grad():
        x = torch.empty(batch, settings.image_channels, settings.image_size, settings.image_size, device="meta")
        F(x, torch.empty(batch, device="meta"), torch.zeros(batch, dtype=torch.int64, device="meta"))
    elements["weights"] = sum(weight.numel() for weight in F.parameters())
    return sum(elements.values()) * size


def main(arguments: list[str]) -> None:
    """Print the table of kernels/README.md, and the operators behind it."""
    network = arguments[0] if arguments else "imagenet64"
    for batch in BATCHES:
        least = bound(network, batch)
        for name, make, autocast in (
            ("the published module under autocast", lambda F: F, True),
            ("`InferenceUNet`", lambda F: InferenceUNet(F, torch.float16), False),
        ):
            moved = count(make, network, batch, torch.float16, autocast)
            megabytes, floor = moved.total / batch / 1e6, moved.total / batch / SPEED * 1e3
            print(f"| {batch} | {name} | {megabytes:.0f} | {moved.total / least:.2f} | {floor:.3f} |")
            for operator, size in moved.bytes.most_common():
                print(f"    {operator:50} {moved.calls[operator]:5} {size / batch / 1e6:9.2f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
