"""LPIPS, the perceptual distance of consistency training (arXiv 1801.03924; its use: arXiv 2303.01469, appendix C).

With average pooling in place of VGG16's maxima, as in the code that the consistency paper was trained with (piq's
``LPIPS(replace_pooling=True)``): its numbers are not those of the lpips package, which keeps the maxima.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cm_runtime.errors import RequestError
from cm_runtime.training.lpips_weights import CHANNELS, CONVOLUTIONS, bias, head, read_weights, weight

SIZE = 224  # pixels: what VGG16 was trained on
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of images in [0, 1]
EPS = 1e-10


class Lpips(nn.Module):
    """Distance d(a, b) of two batches of images in VGG16's features: (N,) float32. Frozen, always in evaluation mode.

    a, b: (N, C, H, W) floats, C = 1 (repeated) or 3, in units of [-1, 1] and not clipped. Images with a side below
    ``size`` (at least 16) are resized to size x size, bilinearly; others stay as they are (the paper's code also
    shrinks those of 225 to 255 pixels). Always computed in the precision of the weights, float32, under autocast too.
    Differentiable in a and in b; a detached b keeps no activations, so pass the target detached. At a = b the gradient
    is 0.

    ``weights``: from ``read_weights``. Raises RequestError for shapes or types that it cannot compare.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Mapping[str, Tensor], size: int = SIZE) -> None:
        super().__init__()
        if size < 16:
            raise RequestError(f"LPIPS halves images four times and needs 16 pixels, not {size}")
        self.size = size
        self.kernels = nn.ParameterList(weights[weight(i)] for stage in CONVOLUTIONS for i in stage)
        self.biases = nn.ParameterList(weights[bias(i)] for stage in CONVOLUTIONS for i in stage)
        self.heads = nn.ParameterList(weights[head(stage)] for stage in range(len(CHANNELS)))
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Lpips:
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        for images in (a, b):
            if images.dim() != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
                raise RequestError(f"LPIPS takes (N, 1 or 3, H, W) floats, not {tuple(images.shape)} of {images.dtype}")
        if a.shape != b.shape:
            raise RequestError(f"LPIPS takes two batches of one shape, not {tuple(a.shape)} and {tuple(b.shape)}")
        with torch.autocast(a.device.type, enabled=False):
            d = self.mean.new_zeros(len(a))
            for at_a, at_b, w in zip(self._features(a), self._features(b), self.heads, strict=True):
                d = d + (at_a - at_b).square().mean((2, 3)) @ w
        return d

    def _features(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the last ReLU of each stage, channels to unit length: (N, C_stage, H / 2^stage, W / 2^stage)."""
        x = x.to(self.mean.dtype)
        if min(x.shape[2:]) < self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)
        x = ((x + 1) / 2 - self.mean) / self.std  # one channel becomes three
        layers = iter(zip(self.kernels, self.biases, strict=True))
        for stage, convolutions in enumerate(CONVOLUTIONS):
            if stage > 0:
                x = F.avg_pool2d(x, 2)
            for _ in convolutions:
                kernel, shift = next(layers)
                x = F.relu(F.conv2d(x, kernel, shift, padding=1), inplace=True)
            # Where all channels are silent, a plain root of squares sends back NaN, which only the ReLU would stop.
            yield x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + EPS)


def load_lpips(paths: Sequence[str | os.PathLike[str]], device: torch.device | str) -> Lpips:
    """Load LPIPS to ``device`` from published files, see ``read_weights``; raises CheckpointError."""
    return Lpips(read_weights(paths)).to(device)
