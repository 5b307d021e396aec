"""Bytes that an evaluation moves: the count of single operators, and the bound that the network keeps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from cm_runtime.backends.torch_unet import InferenceUNet

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import bytes_moved  # type: ignore[import-not-found]


def counted(operation: Any, *shapes: tuple[int, ...]) -> int:
    tensors = [torch.empty(shape, dtype=torch.float16, device="meta") for shape in shapes]
    tensors = [each.to(memory_format=torch.channels_last) if each.dim() == 4 else each for each in tensors]
    counter = bytes_moved.Bytes()
    with torch.no_grad(), counter:
        operation(*tensors)
    return counter.total  # type: ignore[no-any-return]


def test_operators_move_their_inputs_and_outputs_once() -> None:
    """By hand, in elements of 2 bytes."""
    image, small = (3, 8, 4, 4), (8, 1, 1)
    assert counted(lambda x: x.permute(0, 2, 3, 1).view(-1, 8), image) == 0
    assert counted(lambda x: x.clone(), image) == 2 * 2 * 384
    assert counted(lambda x: x.float(), image) == (2 + 4) * 384
    assert counted(lambda x, y: x.add_(y), image, image) == 2 * 3 * 384
    assert counted(lambda x, b: x + b, image, small) == 2 * (2 * 384 + 8)
    assert counted(lambda x, b: x + b.expand(image), image, small) == 2 * (2 * 384 + 8)
    assert counted(lambda x, y: torch.cat([x, y], 1), image, image) == 2 * 4 * 384
    assert counted(lambda x, w: functional.conv2d(x, w, padding=1), image, (5, 8, 3, 3)) == 2 * (384 + 360 + 240)
    with_bias = counted(lambda x, w, b: functional.conv2d(x, w, b, padding=1), image, (5, 8, 3, 3), (5,))
    assert with_bias == 2 * (384 + 360 + 5 + 3 * 240)


@pytest.mark.process
@pytest.mark.parametrize(("batch", "most"), [(1, 1.3), (64, 1.45)])
def test_an_evaluation_moves_little_more_than_it_must(batch: int, most: float) -> None:
    """With its weights read for one image at most 1.3 times the bound; see kernels/README.md for where the rest is."""
    moved = bytes_moved.count(lambda F: InferenceUNet(F, torch.float16), "imagenet64", batch, torch.float16, False)
    least = bytes_moved.bound("imagenet64", batch)
    assert least <= moved.total <= most * least


@pytest.mark.process
def test_the_bound_is_that_of_the_networks_shapes() -> None:
    """296M weights, 100.6M elements of convolutions, 35.1M normalised: counted from the shapes by another script."""
    assert bytes_moved.bound("imagenet64", 1) / 2e6 == pytest.approx(295.9 + 100.6 + 2 * 35.06, abs=0.1)
    assert bytes_moved.bound("imagenet64", 3) - bytes_moved.bound("imagenet64", 1) == pytest.approx(
        4e6 * (100.6 + 2 * 35.06), rel=1e-3
    )


@pytest.mark.slow
def test_the_readmes_table_is_what_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    bytes_moved.main([])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    readme = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()
    assert len(rows) == 4
    assert all(row in readme for row in rows)
