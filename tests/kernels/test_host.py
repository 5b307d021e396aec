"""The host build's rules for blocks, clusters and their memory, on kernels that break them."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from cm_runtime import kernels

pytestmark = [pytest.mark.process, pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")]

FOLDER = Path(kernels.__file__).parent
SOURCE = """
#include "cluster.h"
CM_ENTRY(ranks)(uint32_t* y) {  // each block reads what the next one has written
    CM_SHARED(shared);
    uint32_t* own = reinterpret_cast<uint32_t*>(shared);
    if (threadIdx.x == 0) *own = 100 + blockIdx.x;
    cluster_sync();
    if (threadIdx.x == 1) y[blockIdx.x] = *shared_of(own, (blockIdx.x % 4 + 1) % 4);
    cluster_sync();
}
CM_REGISTER(ranks, true)
CM_ENTRY(ends_early)(uint32_t* y) {  // no barrier behind the reads
    CM_SHARED(shared);
    uint32_t* own = reinterpret_cast<uint32_t*>(shared);
    *own = blockIdx.x;
    cluster_sync();
    y[blockIdx.x] = *shared_of(own, blockIdx.x ^ 1);
}
CM_REGISTER(ends_early, true)
CM_ENTRY(reads_early)(uint32_t* y) {  // none in front of them
    CM_SHARED(shared);
    uint32_t* own = reinterpret_cast<uint32_t*>(shared);
    *own = blockIdx.x;
    y[blockIdx.x] = *shared_of(own, blockIdx.x ^ 1);
    cluster_sync();
}
CM_REGISTER(reads_early, true)
CM_ENTRY(waits_alone)(uint32_t*) {
    if (blockIdx.x == 0) cluster_sync();
}
CM_REGISTER(waits_alone, true)
CM_ENTRY(mixes)(uint32_t*) {
    if (threadIdx.x == 0) __syncthreads();
    else cluster_sync();
}
CM_REGISTER(mixes, true)
CM_ENTRY(overruns)(uint32_t*) {
    CM_SHARED(shared);
    shared[64] = 1;
}
CM_REGISTER(overruns, true)
CM_ENTRY(bounded)(uint32_t*) {}
CM_REGISTER(bounded, false, 64)
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("host")
    (folder / "rules.cu").write_text(SOURCE)
    words = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{FOLDER}", "-x", "c++"]
    files = [FOLDER / "host.cpp", folder / "rules.cu"]
    subprocess.run([*words, *map(str, files), "-o", str(folder / "host.so")], check=True)
    return ctypes.CDLL(str(folder / "host.so"))


def launch(host: ctypes.CDLL, name: str, cluster: int, blocks: int = 4, threads: int = 2) -> tuple[int, list[int]]:
    """The code of `cm_launch_cluster`, and what the kernel wrote."""
    y = (ctypes.c_uint32 * blocks)()
    pointer = ctypes.c_void_p(ctypes.addressof(y))
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(pointer))
    grid, block = (ctypes.c_uint * 3)(blocks, 1, 1), (ctypes.c_uint * 3)(threads, 1, 1)
    return host.cm_launch_cluster(name.encode(), grid, block, cluster, 64, arguments), list(y)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_blocks_read_their_neighbours_in_any_order(host: ctypes.CDLL, seed: int) -> None:
    host.cm_set_order(seed)
    assert launch(host, "ranks", 4, 8) == (0, [101, 102, 103, 100, 105, 106, 107, 104])
    host.cm_set_order(0)


def test_what_a_gpu_would_not_promise_is_an_error(host: ctypes.CDLL) -> None:
    codes = {name: launch(host, name, 2)[0] for name in ("waits_alone", "mixes", "overruns", "ends_early")}
    assert codes == {"waits_alone": 5, "mixes": 3, "overruns": 4, "ends_early": 6}
    assert 0xFFFFFFFF in launch(host, "reads_early", 2)[1]  # memory that nobody has written yet


def test_shapes_that_no_gpu_takes_are_refused(host: ctypes.CDLL) -> None:
    assert [launch(host, "ranks", cluster, 16)[0] for cluster in (0, 3, 16)] == [2, 2, 2]
    assert [launch(host, "bounded", 1, 4, threads)[0] for threads in (64, 65)] == [0, 2]
