"""Step ops and evaluations that write nodes: with them `sampling.run` makes a sampler graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cm_runtime.export import skip_scale
from cm_runtime.export.builder import BOOL, INT64, UINT8, Graph
from cm_runtime.export.embedding import Embedding, Folded, project
from cm_runtime.export.unet import NetworkWriter
from cm_runtime.manifest import OUTPUTS
from cm_runtime.networks.consistency import ModelConfig
from cm_runtime.precond import Precond

LARGEST_SUM = 2.0**126  # of the values of an image; far above any, and finite in bfloat16, which engines may compute in


@dataclass
class GraphSteps:
    """First noise, clamp, renoise and quantisation as nodes of ``g``, `sampling.HostSteps` without edits.

    noise: (K,N,C,H,W) float32; total: the sum of each image's unclamped values so far, which is finite only if all are.
    """

    g: Graph
    config: ModelConfig
    steps: int
    noise: str
    total: str = ""

    def first(self, sigma: float) -> str:
        """sigma_0 z_0."""
        return self._scaled_noise(0, sigma)

    def step(self, x0: str, k: int, sigma: float) -> str:
        """clamp(x0) + sqrt(sigma_k^2 - sigma_min^2) z_k."""
        x0 = self._clamp(x0, k - 1)
        z = self._scaled_noise(k, math.sqrt(sigma**2 - self.config.sigma_min**2))
        with self.g.scope(f"step{k}"):
            return self.g.op("Add", x0, z)

    def finish(self, x0: str) -> str:
        """The graph's outputs: images (N,H,W,C) uint8, and finite (N,) bool."""
        g, (c, h, w) = self.g, self.config.image_shape
        x0 = self._clamp(x0, self.steps - 1)
        grey = g.op("Mul", g.op("Add", x0, g.constant(1)), g.constant(127.5))
        grey = g.op("Transpose", g.op("Round", grey), perm=[0, 2, 3, 1])
        images, finite = OUTPUTS["sampler"]
        g.output(g.op("Cast", grey, to=UINT8), images, UINT8, ["N", h, w, c])
        g.output(g.op("LessOrEqual", g.op("Abs", self.total), g.constant(LARGEST_SUM)), finite, BOOL, ["N"])
        return images

    def _scaled_noise(self, k: int, scale: float) -> str:
        with self.g.scope(f"step{k}"):
            z = self.g.op("Gather", self.noise, self.g.constant(k, INT64), axis=0)
            return self.g.op("Mul", z, self.g.fold(scale))

    def _clamp(self, x0: str, k: int) -> str:
        """x0 of step ``k`` in [-1, 1], added to the total before."""
        g = self.g
        with g.scope(f"step{k}"):
            x0_sum = g.op("ReduceSum", x0, g.constant([1, 2, 3], INT64), keepdims=0)
            self.total = g.op("Add", self.total, x0_sum) if self.total else x0_sum
            return g.op("Clip", x0, g.constant(-1), g.constant(1))


@dataclass(frozen=True)
class GraphEvaluation:
    """f as nodes at the fixed ``sigmas``, everything that depends on them alone folded into constants.

    inline: the skip-scaling as products with constants, in place of cm::SkipScale.
    """

    writer: NetworkWriter
    form: Precond
    sigmas: Sequence[float]
    inline: bool

    def denoise(self, x: str, sigma: float, label: str | None) -> str:
        """c_skip x + c_out F(c_in x, c_noise, label)."""
        with self.writer.g.scope(f"step{self.sigmas.index(sigma)}"):
            s = np.float32(sigma)
            embedding = _embed(self.writer, float(self.form.c_noise(s)), label, len(self.sigmas))
            F = self.writer.evaluate(x, embedding, float(self.form.c_in(s)))
            return self._skip_scale(x, F, s)

    def _skip_scale(self, x: str, F: str, s: np.float32) -> str:
        g, form = self.writer.g, self.form
        if form.form == "piecewise":  # every level of a sampler lies above the boundary
            return F
        if not self.inline:
            return skip_scale.node(g, x, F, g.fold(s.reshape(1)), form)
        skip, out = g.fold(form.c_skip(s)), g.fold(form.c_out(s))
        return g.op("Add", g.op("Mul", skip, x), g.op("Mul", out, F))


def _embed(writer: NetworkWriter, c_noise: float, label: str | None, steps: int) -> Embedding:
    """The cheapest embedding that the classes allow: a table only where it is smaller than the weights behind it."""
    net = writer.net
    if label is None or steps * net.config.num_classes < 4 * net.config.channels:
        return Folded(net, c_noise, label, writer.pixels)
    return project(writer.g, net, writer.weights, c_noise, label, writer.pixels)
