"""The peaks of a machine: what is divided by what, in how many threads, and what happens where it cannot be done."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest
from scipy import stats

from cm_runtime.bench import peaks
from cm_runtime.bench.peaks import drift, measure_peaks
from cm_runtime.bench.results import Estimate, Peaks
from cm_runtime.errors import EngineError, MissingExtraError, RequestError

pytestmark = pytest.mark.process  # processes that measure


@pytest.fixture(scope="module")
def one() -> Peaks:
    return measure_peaks(1, size=512, seconds=0.05)


def fastest(work: object, repeats: int = 5) -> float:
    assert callable(work)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def test_the_rates_are_those_of_the_same_work_done_here(one: Peaks) -> None:
    """Within a factor of 20: other processes share the machine, and a cache or a second thread may help here."""
    a = np.ones((512, 512), np.float32)
    here = 2 * 512**3 / fastest(lambda: a @ a) / 1e9
    assert here / 20 < one.matrix_gflop_per_s.value < here * 20
    source, target = np.ones(128 << 20, np.uint8), np.ones(128 << 20, np.uint8)
    here = 2 * source.nbytes / fastest(lambda: np.copyto(target, source)) / 1e9
    assert here / 20 < one.copy_gb_per_s.value < here * 20


def test_they_come_with_an_interval_and_the_library(one: Peaks) -> None:
    assert (one.threads, one.device, one.drift) == (1, "cpu", None)
    assert one.library.startswith(f"numpy {np.__version__} (")
    for estimate in (one.matrix_gflop_per_s, one.copy_gb_per_s):
        assert estimate.low is not None
        assert estimate.high is not None
        assert 0 < estimate.low <= estimate.value <= estimate.high


@pytest.mark.parametrize("threads", [1, 2])
def test_the_product_runs_in_as_many_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this process was told. NumPy's OpenBLAS keeps its threads, so that they can be counted afterwards."""
    if "OpenBLAS" not in peaks._blas():
        pytest.skip("needs a NumPy with OpenBLAS")
    for name in peaks.THREADS:
        monkeypatch.setenv(name, str(3 - threads))
    found = peaks._in_child(threads, "cpu", 256, 0.0)
    assert found["running"] == threads


def test_as_many_threads_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every element, each by one of them; more threads than elements do no harm."""
    seen: list[tuple[int, int]] = []
    copyto = np.copyto

    def noted(target: np.ndarray, source: np.ndarray | float) -> None:
        if isinstance(source, np.ndarray):  # else it is being filled
            seen.append((target.size, source.size))
        copyto(target, source)

    monkeypatch.setattr(np, "copyto", noted)
    monkeypatch.setattr(peaks, "COPIED", 4 * 1000)
    for threads in (1, 3, 7):
        seen.clear()
        rates = peaks._copies(threads, 0.0)
        assert len(seen) == threads * (len(rates) + 1)
        assert sum(target for target, _ in seen) == 1000 * (len(rates) + 1)
        assert all(target == source for target, source in seen)


def test_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that took a second: 2 n^3 operations a product; the bytes of both arrays a copy."""
    monkeypatch.setattr(peaks, "timer", lambda work: lambda: work() is None or 1.0)
    monkeypatch.setattr(peaks, "COPIED", 4000)
    assert set(peaks._products(30, 0.0)) == {2 * 27_000 / 1e9}
    assert set(peaks._copies(2, 0.0)) == {8000 / 1e9}


def test_a_rate_is_the_amount_over_the_seconds_and_the_first_run_does_not_count() -> None:
    taken = iter([99.0, 2.0, 4.0, 2.0, 2.0, 2.0, 2.0])
    assert peaks._rates(lambda: next(taken), 10.0, 0.0) == [5.0, 2.5, 5.0, 5.0, 5.0, 5.0]
    assert len(peaks._rates(lambda: time.sleep(0.01) or 1.0, 1.0, 0.2)) in range(peaks.LEAST, 21)


@pytest.mark.parametrize("n", [1, 5, 6, 7, 16, 17, 40, 101])
def test_the_interval_is_that_of_the_binomial_distribution(n: int) -> None:
    """The widest pair of ranks that is narrower still holds the median with 95% (Conover 1999, section 3.2)."""
    ranks = np.random.default_rng(n).permutation(n) + 1.0
    estimate = peaks._estimate(list(ranks))
    assert estimate.value == (n + 1) / 2
    if n < 6:
        assert (estimate.low, estimate.high) == (None, None)
        return
    assert estimate.low is not None
    assert estimate.high == n + 1 - estimate.low
    outside = [2 * stats.binom.cdf(rank - 1, n, 0.5) for rank in (estimate.low, estimate.low + 1)]
    assert outside[0] <= 0.05 < outside[1]


def test_drift_is_a_share_of_the_first(one: Peaks) -> None:
    slower, faster = (
        one.model_copy(update={"matrix_gflop_per_s": Estimate(value=one.matrix_gflop_per_s.value * factor)})
        for factor in (0.8, 1.1)
    )
    assert drift(one, slower) == pytest.approx(0.2)
    assert drift(one, faster) == pytest.approx(0.1)
    assert drift(one, one) == 0


def test_a_gpu_takes_torch_and_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match=r"torch .* cannot use cuda:0$"):
            measure_peaks(1, "cuda:0")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"measuring the peaks of cuda:0 needs torch: pip install"):
        measure_peaks(1, "cuda:0")


def test_what_cannot_be_measured_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="threads must be at least 1, not 0"):
        measure_peaks(0)
    with pytest.raises(EngineError, match=r"peaks cannot be measured: .*(Memory|allocate)") as caught:
        measure_peaks(1, size=1 << 22, seconds=0.0)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(peaks, "CHILD", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(EngineError, match="ended with status -9"):
        measure_peaks(1)


@pytest.mark.gpu
def test_the_rates_of_a_gpu() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    found = measure_peaks(1, "cuda:0", seconds=0.2)
    assert found.matrix_gflop_per_s.value > 1000
    assert found.copy_gb_per_s.value > 50
    assert torch.cuda.get_device_name(0) in found.library
