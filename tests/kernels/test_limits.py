"""Launches beside the limits of GPUs: those that launches.py makes keep them, others are refused in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from cm_runtime import kernels
from cm_runtime.bench.networks import STANDING, config
from cm_runtime.errors import EngineError
from cm_runtime.kernels import launches
from cm_runtime.kernels.group_norm import group_norm_silu, plan_norm
from cm_runtime.kernels.launches import NORM_THREADS, Arrays, Images, Launch, Placed, Type
from cm_runtime.kernels.limits import Limits, check_launch
from cm_runtime.networks.unet import GroupNorm, UNet, UNetConfig
from cm_runtime.precond import precond
from cm_runtime.projections import Luma, Mask, PatchMean

AT = Arrays(*[16] * len(Arrays._fields))
# KB of shared memory that a block may opt in to, by compute capability: CUDA's programming guide, specifications
OPT_IN = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
NETWORKS = {
    "default": UNetConfig(
        image_size=28, image_channels=1, channels=32, channel_mult=(1, 2), res_blocks=2, head_channels=32
    ),
    **{name: config(name).network for name in STANDING},
}


@cache
def norms(name: str) -> set[tuple[int, int, int]]:
    """Channels, height and groups of a network's normalisations."""
    shapes, network_shape = set(), NETWORKS[name]
    with torch.device("meta"):
        network = UNet(network_shape)
        for module in network.modules():
            if isinstance(module, GroupNorm):
                module.register_forward_hook(lambda m, x, _: shapes.add((*x[0].shape[1:3], m.num_groups)))
        label = torch.zeros(1, dtype=torch.long) if network_shape.num_classes else None
        images = torch.zeros(1, network_shape.image_channels, *[network_shape.image_size] * 2)
        network(images, torch.zeros(1), label)
    return shapes


def every_launch(name: str, limits: Limits, type: Type, n: int) -> Iterator[Launch]:
    c, size = NETWORKS[name].image_channels, NETWORKS[name].image_size
    known = np.zeros((1, c, size, size), np.float32)
    edits = [None, Placed(Mask(known, known), 16, 16), Placed(PatchMean(known[:, :, ::4, ::4].copy(), 4), 16)]
    edits += [Placed(Luma(known[:, :1]), 16)] if c == 3 else []
    for layout in ("nchw", "nhwc"):
        for output in {None, "fp32"} if type != "fp32" else {None}:
            images = Images(n, c, size, size, type, layout, output)  # type: ignore[arg-type]
            yield launches.first_noise(images, AT)
            yield launches.skip_scale(images, AT, precond("boundary"))
            for edit in edits:
                yield launches.step(images, AT._replace(F=64), 1, edit=edit)
                yield launches.finish(images, AT, edit=edit)
    for channels, height, groups in norms(name):
        images = Images(n, channels, height, height, type, "nhwc")
        yield from group_norm_silu(images, AT, groups, 1e-5, True, plan_norm(images, groups, limits))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("capability", OPT_IN, ids=str)
@pytest.mark.parametrize("launches_clusters", [True, False])
def test_every_gpu_takes_every_launch(network: str, capability: tuple[int, int], launches_clusters: bool) -> None:
    limits = Limits.from_device(capability, OPT_IN[capability] << 10, launches_clusters=launches_clusters)
    count = 0
    for type in launches.TYPES:
        for n in (1, 3, 64, 255):
            for work in every_launch(network, limits, type, n):
                check_launch(work, limits)
                count += 1
    assert count > 100


def test_the_shapes_are_those_of_the_network() -> None:
    assert {shape[:2] for shape in norms("imagenet64")} >= {(192, 64), (384, 64), (1536, 8)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block": (1024, 1, 1)}, "1024 threads of cm_step_half_nhwc need 81920 registers; a block has 65536"),
        ({"block": (33, 1, 32)}, "cm_step_half_nhwc takes blocks of at most 1024 threads, not 1056"),
        ({"shared": 232449}, "cm_step_half_nhwc needs 232449 bytes of shared memory; a block has 232448"),
        ({"cluster": 16, "grid": (16, 1, 1)}, "clusters of 16 of 16 blocks; this GPU or its caller takes 8"),
        ({"cluster": 2, "grid": (3, 1, 1)}, "clusters of 2 of 3 blocks"),
        ({"kernel": "cm_group_norm_silu_half", "block": (544, 1, 1)}, "takes blocks of at most 512 threads, not 544"),
    ],
)
def test_a_launch_that_no_gpu_takes_is_refused(change: dict[str, object], reason: str) -> None:
    limits = Limits.from_device((9, 0), 227 << 10, launches_clusters=True)
    work = launches.step(Images(3, 3, 8, 8, "fp16", "nhwc"), AT._replace(F=64), 1)
    check_launch(work, limits)
    with pytest.raises(EngineError, match=re.escape(reason)):
        check_launch(work._replace(**change), limits)  # type: ignore[arg-type]


def test_clusters_are_for_gpus_and_callers_that_have_them() -> None:
    assert [Limits.from_device(each, 1 << 17, launches_clusters=True).cluster for each in OPT_IN] == [
        1,
        1,
        1,
        1,
        8,
        8,
        8,
    ]
    assert {Limits.from_device(each, 1 << 17, launches_clusters=False).cluster for each in OPT_IN} == {1}
    builds = [Limits.from_device(each, 1 << 17, launches_clusters=True).build for each in OPT_IN]
    assert builds == ["sm_80", "sm_80", "sm_80", "sm_80", "sm_90", "", "sm_120"]
    for build in {*builds} - {""}:
        assert all(build in each for each in kernels.build_report()["kernels"].values())


def test_the_bounds_are_those_of_the_source() -> None:
    source = (Path(kernels.__file__).parent / "group_norm.cu").read_text()
    assert re.findall(r"constexpr int NORM_THREADS = (\d+);", source) == [str(NORM_THREADS)]
    assert len(re.findall(r"CM_BOUNDED_ENTRY\(cm_group_norm_\w+##SUFFIX, NORM_THREADS\)", source)) == 3
