"""Layers of `InferenceUNet`: feature maps are channels_last, weights of one type, and a map lacks its ``offset``.

torch adds the bias of a convolution by cuDNN in a pass of its own. So biases are left out here: a feature map lacks an
``offset``, (C,) float32, known when the network is built. Norms add it in float32 as they read, products carry it on.
A convolution of one pixel is a matrix product, which adds to what is there already.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cm_runtime.cuda import torch_ops
from cm_runtime.networks.dropout import Dropout
from cm_runtime.networks.unet import AttentionBlock, Block, Downsample, GroupNorm, ResBlock, Upsample


class Convolution(nn.Module):
    """A 3x3 convolution without its bias.

    patch: the input is not yet pixel-unshuffled by it. A kernel as much larger, moved by as much, computes the same.
    """

    weight: Tensor

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, patch: int = 1) -> None:
        super().__init__()
        weight = conv.weight.detach()
        out, channels, height, width = weight.shape
        unshuffled = weight.reshape(out, channels // patch**2, patch, patch, height, width)
        weight = unshuffled.permute(0, 1, 4, 2, 5, 3).reshape(out, -1, height * patch, width * patch)
        self.register_buffer("weight", weight.to(dtype=dtype, memory_format=torch.channels_last))
        self.stride, self.padding = conv.stride[0] * patch, patch

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight, stride=self.stride, padding=self.padding)


class Linear(nn.Module):
    """x W^T + b of rows x; a convolution of one pixel is one too."""

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, dtype: torch.dtype, more: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", layer.weight.detach().flatten(1).to(dtype))
        self.register_buffer("bias", (bias_of(layer) if more is None else bias_of(layer) + more).to(dtype))

    def forward(self, rows: Tensor) -> Tensor:
        return torch.addmm(self.bias, rows, self.weight.t())


class Embeddings(nn.Module):
    """Linear layers of one input, those of a width in one product: (N, 4 channels) -> (N, width) of each, in order."""

    def __init__(self, layers: list[Linear]) -> None:
        super().__init__()
        widths = sorted({len(layer.weight) for layer in layers})
        alike = [[i for i, layer in enumerate(layers) if len(layer.weight) == width] for width in widths]
        self.places = [(k, each.index(i)) for i in range(len(layers)) for k, each in enumerate(alike) if i in each]
        for k, each in enumerate(alike):
            self.register_buffer(f"weight{k}", torch.stack([layers[i].weight for i in each]))  # (layers, width, inputs)
            self.register_buffer(f"bias{k}", torch.stack([layers[i].bias for i in each])[:, None])
        self.count = len(alike)

    def forward(self, e: Tensor) -> list[Tensor]:
        outputs = []
        for k in range(self.count):
            weight, bias = self.get_buffer(f"weight{k}"), self.get_buffer(f"bias{k}")
            outputs.append(torch.baddbmm(bias, e.expand(len(weight), *e.shape), weight.transpose(1, 2)))
        return [outputs[k][i] for k, i in self.places]


class Norm(nn.Module):
    """GroupNorm of a feature map that lacks ``offset``, scaled and shifted or not by an embedding, then SiLU or not."""

    def __init__(self, norm: GroupNorm, offset: Tensor | None, silu: bool = True) -> None:
        super().__init__()
        self.groups, self.eps, self.silu = norm.num_groups, norm.eps, silu
        self.register_buffer("gamma", norm.weight.detach().float())
        self.register_buffer("beta", norm.bias.detach().float())
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor, scale_shift: Tensor | None = None) -> Tensor:
        y: Tensor = torch_ops.group_norm_silu(
            x, self.gamma, self.beta, scale_shift, self.groups, self.eps, self.silu, self.offset
        )
        return y


class Layers(nn.ModuleList):
    """A `Block`. offset: what its output lacks; embeddings: layers of the residual blocks so far, which it adds to."""

    def __init__(self, block: Block, dtype: torch.dtype, offset: Tensor, embeddings: list[Linear]) -> None:
        super().__init__()
        layer: Residual | Attention | Resampling
        for each in block:
            if isinstance(each, ResBlock):
                layer = Residual(each, dtype, offset, embeddings)
            elif isinstance(each, AttentionBlock):
                layer = Attention(each, dtype, offset)
            else:
                layer = Resampling(cast("Upsample | Downsample", each), dtype, offset)
            self.append(layer)
            offset = layer.offset
        self.offset = offset

    def forward(self, x: Tensor, scale_shifts: list[Tensor]) -> Tensor:
        for layer in self:
            x = cast("Tensor", layer(x, scale_shifts))
        return x


class Residual(nn.Module):
    """`ResBlock`; its scale and shift, or what is added, are computed with those of the others."""

    def __init__(self, block: ResBlock, dtype: torch.dtype, offset: Tensor, embeddings: list[Linear]) -> None:
        super().__init__()
        norm, _, before = cast("tuple[GroupNorm, nn.SiLU, nn.Conv2d]", block.in_layers)
        middle_norm, *_, after = cast("tuple[GroupNorm, nn.SiLU, Dropout, nn.Conv2d]", block.out_layers)
        embedding = cast("nn.Linear", block.emb_layers[1])
        self.scale_shift, self.resample = block.scale_shift, type(block.resample)
        self.norm, self.before = Norm(norm, offset), Convolution(before, dtype)
        self.index = len(embeddings)
        embeddings.append(Linear(embedding, dtype, None if block.scale_shift else bias_of(before)))
        self.middle_norm = Norm(middle_norm, bias_of(before) if block.scale_shift else None)
        self.after, self.skip = Convolution(after, dtype), None
        if isinstance(skip := block.skip_connection, nn.Conv2d):
            self.skip = Linear(skip, dtype)
            offset = skip.weight.detach().flatten(1).float() @ offset + bias_of(skip)
        self.offset = offset + bias_of(after)

    def forward(self, x: Tensor, scale_shifts: list[Tensor]) -> Tensor:
        h: Tensor = self.norm(x)
        if self.resample is Upsample:
            h = functional.interpolate(h, scale_factor=2.0, mode="nearest")
        elif self.resample is Downsample:
            h, x = functional.avg_pool2d(h, 2), functional.avg_pool2d(x, 2)
        h, e = self.before(h), scale_shifts[self.index]
        h = self.middle_norm(h, e) if self.scale_shift else self.middle_norm(h.add_(e[:, :, None, None]))
        h = self.after(h)
        if self.resample is Upsample:  # nearest neighbours of x are read, and not written
            n, c, height, width = x.shape
            _rows(h).view(n, height, 2, width, 2, c).add_(_rows(x).view(n, height, 1, width, 1, c))
        elif self.skip is not None:
            _rows(h).addmm_(_rows(x), self.skip.weight.t())
        else:
            h.add_(x)
        return h


class Attention(nn.Module):
    """`AttentionBlock`, which writes over its input."""

    def __init__(self, block: AttentionBlock, dtype: torch.dtype, offset: Tensor) -> None:
        super().__init__()
        self.heads, self.norm = block.heads, Norm(block.norm, offset, silu=False)
        self.qkv, self.out = Linear(block.qkv, dtype), Linear(block.proj_out, dtype)
        self.offset = offset + bias_of(block.proj_out)

    def forward(self, x: Tensor, scale_shifts: list[Tensor]) -> Tensor:
        n, c, height, width = x.shape
        qkv = self.qkv(_rows(self.norm(x))).view(n, height * width, 3, self.heads, c // self.heads)
        q, k, v = (each.transpose(1, 2) for each in qkv.unbind(2))  # each (n, heads, pixels, dim)
        h = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, c)
        _rows(x).addmm_(h, self.out.weight.t())
        return x


class Resampling(nn.Module):
    """`Upsample` or `Downsample` by a convolution, which pads with 0: what the input lacks is added before."""

    missing: Tensor

    def __init__(self, layer: Upsample | Downsample, dtype: torch.dtype, offset: Tensor) -> None:
        super().__init__()
        conv = cast("nn.Conv2d", layer.conv if isinstance(layer, Upsample) else layer.op)
        self.is_up, self.conv, self.offset = isinstance(layer, Upsample), Convolution(conv, dtype), bias_of(conv)
        self.register_buffer("missing", offset.to(dtype)[:, None, None])

    def forward(self, x: Tensor, scale_shifts: list[Tensor]) -> Tensor:
        x = x + self.missing
        h: Tensor = self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest") if self.is_up else x)
        return h


def bias_of(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """A layer's bias, float32."""
    assert layer.bias is not None
    return layer.bias.detach().float()


def _rows(x: Tensor) -> Tensor:
    """(N, C, H, W) channels_last as (N H W, C), without a copy."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])
