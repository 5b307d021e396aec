"""Plans and launches of the normalisation in group_norm.cu: how images are cut into blocks, and in one form or two."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np

from cm_runtime.errors import RequestError
from cm_runtime.errors.wording import quantity
from cm_runtime.kernels.launches import (
    ALIGNMENT,
    MOST_ROWS,
    NORM_THREADS,
    SIZES,
    TYPES,
    Arrays,
    Images,
    Launch,
    check_sizes,
    count_rows,
)
from cm_runtime.kernels.limits import Limits

SECTOR = 32  # bytes that memory moves at least
WARP = 32
BLOCKS = 128  # that keep a GPU busy
RESERVED = (
    1 << 10
)  # bytes of shared memory that CUDA takes for each block; a multiprocessor has as many more than a block
MOMENTS = 3  # float32 numbers that a part of a group is reduced to: group_norm.cu
ROUNDS = 8  # of its threads through a slab that a lone block may take while other multiprocessors idle


class NormPlan(NamedTuple):
    """The cut of a batch into blocks.

    slab: channels of a block, whole groups; parts: blocks that share the pixels of a slab; threads: of a block;
    is_cluster: the parts are a cluster and one launch does it all, else two.
    """

    slab: int
    parts: int
    threads: int
    is_cluster: bool

    def moments(self, images: Images, groups: int) -> int:
        """float32 numbers that lie between the two launches; 0 for one."""
        return 0 if self.is_cluster else images.n * groups * self.parts * MOMENTS


@cache
def plan_norm(images: Images, groups: int, limits: Limits) -> NormPlan:
    """The plan for a GPU: clusters that read x once where a slab fits in their shared memory, else two launches.

    A slab is of whole sectors where that leaves enough blocks. A block leaves half of the shared memory to another one
    where it can, so that one reads while the other writes. Raises RequestError for shapes that no plan fits.
    """
    channels, pixels, width = images.channels, images.pixels, _width(images)
    if groups < 1 or channels % groups:
        raise RequestError(f"{channels} channels cannot be split in {groups} groups")
    group, sector = channels // groups, SECTOR // SIZES[images.type]
    unit = math.lcm(group, width)
    least, whole = min(-(-sector // unit) * unit, channels), math.lcm(unit, sector)
    if least // width > NORM_THREADS:
        count = quantity(least // width, "thread")
        raise RequestError(f"groups of {quantity(group, 'channel')} need {count}, more than {NORM_THREADS}")
    slabs = [slab for slab in (whole, least) if slab <= min(channels, NORM_THREADS * width)]

    def runs(slab: int, parts: int) -> int:
        return -(-pixels // parts) * slab // width

    def blocks(slab: int, parts: int) -> int:
        return images.n * -(-channels // slab) * parts

    def plan(slab: int, parts: int, *, is_cluster: bool) -> NormPlan:
        threads = -(-runs(slab, parts) // WARP) * WARP
        return NormPlan(slab, parts, min(threads, NORM_THREADS), is_cluster)

    sizes = [parts for parts in (1, 2, 4, 8) if parts <= min(limits.cluster, pixels)]
    clusters = [plan(slab, parts, is_cluster=True) for slab in slabs for parts in sizes]
    half = (limits.shared - RESERVED) // 2
    clusters = [each for each in clusters if _block_bytes(images, groups, each) <= limits.shared]
    for each in clusters:
        is_enough = blocks(each.slab, each.parts) >= BLOCKS or runs(each.slab, each.parts) <= NORM_THREADS
        if is_enough and _block_bytes(images, groups, each) <= half:
            return each
    if clusters:
        last = clusters[-1]
        if 2 * blocks(last.slab, last.parts) >= BLOCKS or runs(last.slab, last.parts) <= ROUNDS * NORM_THREADS:
            return last
    slab = slabs[0]
    parts = max(min(-(-BLOCKS // blocks(slab, 1)), runs(slab, 1) // NORM_THREADS, pixels), 1)
    while parts < pixels and _block_bytes(images, groups, plan(slab, parts, is_cluster=False)) > half:
        parts = min(2 * parts, pixels)
    both = plan(slab, parts, is_cluster=False)
    most = max(_block_bytes(images, groups, both), _shared(images, groups, both, has_moments=True))
    if most > limits.shared:
        count = quantity(most, "byte")
        raise RequestError(f"groups of {quantity(group, 'channel')} need {count} of shared memory, not {limits.shared}")
    return both


def group_norm_silu(
    images: Images, at: Arrays, groups: int, eps: float, silu: bool, plan: NormPlan
) -> tuple[Launch, ...]:
    """y = silu(group_norm(x + offset) (1 + scale) + shift), NHWC; gamma, beta, and offset unless 0: (C,) float32.

    scale_shift: (N, 2C) in the network's type, scales first, or 0. moments: memory for the plan's, unless it has none.
    y may be x.
    """
    if images.layout != "nhwc":
        raise RequestError("cm_group_norm_silu takes NHWC images")
    check_sizes(images)
    slabs = -(-images.channels // plan.slab)
    if slabs > MOST_ROWS:
        raise RequestError(f"this kernel takes {MOST_ROWS} slabs of groups, not {slabs}")
    suffix = f"{TYPES[images.type]}{'' if _width(images) > 1 else '_any'}"
    grid, block = (plan.parts, slabs, count_rows(images)), (plan.threads, 1, 1)
    shape = tuple(map(np.uint32, (images.channels, images.pixels, groups, plan.slab)))
    affine = *at.pointers("offset", "gamma", "beta", "scale_shift", "y"), *shape, np.float32(eps), np.uint32(silu)
    kept = _block_bytes(images, groups, plan)
    if plan.is_cluster:
        arguments = *at.pointers("x"), *affine
        return (Launch(f"cm_group_norm_silu_{suffix}", grid, block, kept, arguments, plan.parts),)
    shared = _shared(images, groups, plan, has_moments=True)
    return (
        Launch(f"cm_group_norm_moments_{suffix}", grid, block, kept, (*at.pointers("x", "offset", "moments"), *shape)),
        Launch(f"cm_group_norm_apply_{suffix}", grid, block, shared, (*at.pointers("x", "moments"), *affine)),
    )


def _width(images: Images) -> int:
    """Channels that a thread moves at once."""
    width = ALIGNMENT // SIZES[images.type]
    return 1 if images.channels % width else width


def _shared(images: Images, groups: int, plan: NormPlan, *, has_sums: bool = False, has_moments: bool = False) -> int:
    """Bytes of shared memory beside a block's part of x: group_norm.cu's Place."""
    sums = has_sums * (plan.threads // (plan.slab // _width(images))) * plan.slab
    moments = MOMENTS * (plan.slab * groups // images.channels)  # of a part
    return -(-(max(sums, has_moments * plan.parts * moments) + 3 * plan.slab + moments) // 4) * 16


def _block_bytes(images: Images, groups: int, plan: NormPlan) -> int:
    """Bytes of shared memory of a block that keeps its part of x."""
    part = -(-images.pixels // plan.parts) * plan.slab * SIZES[images.type]
    return _shared(images, groups, plan, has_sums=True, has_moments=plan.is_cluster) + part
