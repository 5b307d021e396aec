"""Distances d(a, b) between images, one number an image, that a consistency loss minimises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cm_runtime.training.config import ConsistencyPhase

# a, b: (n,C,H,W) -> (n,)
Distance = Callable[[Tensor, Tensor], Tensor]


def distance_of(phase: ConsistencyPhase, device: torch.device) -> Distance:
    """Choose the distance of a phase. Raises CheckpointError if LPIPS weights cannot be read."""
    match phase.distance:
        case "l1":
            return l1
        case "l2":
            return l2
        case "huber":
            return pseudo_huber(phase.huber_c)
        case "lpips":
            from cm_runtime.training.lpips import load_lpips

            lpips: Distance = load_lpips([Path(name) for name in phase.lpips], device)
            return lpips


def l1(a: Tensor, b: Tensor) -> Tensor:
    """The mean of |a - b| over an image; the authors' code takes means where arXiv 2303.01469 writes norms."""
    return (a - b).abs().flatten(1).mean(1)


def l2(a: Tensor, b: Tensor) -> Tensor:
    """The mean of (a - b)^2 over an image; the authors' code takes means where arXiv 2303.01469 writes norms."""
    return (a - b).square().flatten(1).mean(1)


def pseudo_huber(c: float | None) -> Distance:
    """sqrt(|a - b|^2 + c^2) - c over an image's pixels; c None: 0.00054 sqrt(D) (arXiv 2310.14189, section 3.3)."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        offset = 0.00054 * a[0].numel() ** 0.5 if c is None else c
        return ((a - b).square().flatten(1).sum(1) + offset**2).sqrt() - offset

    return distance
