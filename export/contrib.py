"""ONNX Runtime's own operators of the CUDA form, by their documentation (ContribOperators.md), in standard ones.

ONNX Runtime has most of them on a GPU alone. The proof of an export runs its copy in these terms, on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
from onnx import helper, parser

from cm_runtime.export.builder import OPSET
from cm_runtime.onnx_graph.rules import CONTRIB

DOMAIN = "cm.by_definition"  # not the operators' own, whose kernels an engine would look for
_HEAD = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>'
_DEFINITIONS = (
    """NhwcConv <kernel_shape, strides: ints = [1, 1], pads: ints = [0, 0, 0, 0]> (X, W, B) => (Y) {
        x = Transpose <perm = [0, 3, 1, 2]> (X)
        w = Transpose <perm = [0, 3, 1, 2]> (W)
        y = Conv <kernel_shape: ints = @kernel_shape, strides: ints = @strides, pads: ints = @pads> (x, w, B)
        Y = Transpose <perm = [0, 2, 3, 1]> (y)
    }""",
    """GroupNorm <groups, epsilon, activation, channels_last: int = 1> (X, gamma, beta) => (Y) {
        one = Constant <value_ints = [1]> ()
        number = Constant <value_int: int = @groups> ()
        groups = Reshape (number, one)
        channels = Shape (gamma)
        size = Div (channels, groups)
        pixels = Constant <value_ints = [0, -1]> ()
        grouped = Concat <axis = 0> (pixels, groups, size)
        image = Shape (X)
        x = Cast <to = 1> (X)
        parts = Reshape (x, grouped)
        axes = Constant <value_ints = [1, 3]> ()
        mean = ReduceMean (parts, axes)
        centred = Sub (parts, mean)
        squared = Mul (centred, centred)
        variance = ReduceMean (squared, axes)
        eps = Constant <value_float: float = @epsilon> ()
        safe = Add (variance, eps)
        deviation = Sqrt (safe)
        parts_normal = Div (centred, deviation)
        normal = Reshape (parts_normal, image)
        scale = Cast <to = 1> (gamma)
        shift = Cast <to = 1> (beta)
        scaled = Mul (normal, scale)
        y = Add (scaled, shift)
        gate = Sigmoid (y)
        silu = Mul (y, gate)
        flag = Constant <value_int: int = @activation> ()
        is_active = Cast <to = 9> (flag)
        full = Where (is_active, silu, y)
        Y = CastLike (full, X)
    }""",
    """MultiHeadAttention <num_heads> (query, key, value) => (output) {
        one = Constant <value_ints = [1]> ()
        number = Constant <value_int: int = @num_heads> ()
        heads = Reshape (number, one)
        front = Constant <value_ints = [0, 0]> ()
        rest = Constant <value_ints = [-1]> ()
        by_head = Concat <axis = 0> (front, heads, rest)
        whole = Concat <axis = 0> (front, rest)
        q_parts = Reshape (query, by_head)
        k_parts = Reshape (key, by_head)
        v_parts = Reshape (value, by_head)
        q = Transpose <perm = [0, 2, 1, 3]> (q_parts)
        k = Transpose <perm = [0, 2, 3, 1]> (k_parts)
        v = Transpose <perm = [0, 2, 1, 3]> (v_parts)
        size = Shape <start = 3, end = 4> (q)
        size_float = Cast <to = 1> (size)
        root_float = Sqrt (size_float)
        root = CastLike (root_float, query)
        q_scaled = Div (q, root)
        scores = MatMul (q_scaled, k)
        shares = Softmax <axis = -1> (scores)
        mixed = MatMul (shares, v)
        merged = Transpose <perm = [0, 2, 1, 3]> (mixed)
        output = Reshape (merged, whole)
    }""",
    """QuickGelu <alpha> (X) => (Y) {
        factor_float = Constant <value_float: float = @alpha> ()
        factor = CastLike (factor_float, X)
        scaled = Mul (X, factor)
        gate = Sigmoid (scaled)
        Y = Mul (X, gate)
    }""",
)


def functions() -> list[onnx.FunctionProto]:
    """The definitions, in `DOMAIN`."""
    return [parser.parse_function(f"{_HEAD} {each}") for each in _DEFINITIONS]


def define(model: onnx.ModelProto) -> None:
    """Replace the operators of ``model`` by functions that define them."""
    for node in model.graph.node:
        if node.domain == CONTRIB:
            node.domain = DOMAIN
    others = [each for each in model.opset_import if each.domain != CONTRIB]
    del model.opset_import[:]
    model.opset_import.extend([*others, helper.make_opsetid(DOMAIN, 1)])
    model.functions.extend(functions())


@contextmanager
def defined_copy(path: Path) -> Iterator[Path]:
    """A copy of an ``.onnx`` in the terms of `functions`, beside it and its data file, until the block ends."""
    model = onnx.load(str(path), load_external_data=False)
    define(model)
    copy = path.with_suffix(".defined.onnx")
    try:
        onnx.save(model, str(copy))
        del model
        yield copy
    finally:
        copy.unlink(missing_ok=True)
