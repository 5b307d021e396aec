"""Statistics files: ours, as pytorch-fid and ADM write them, and what is neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cm_runtime.errors import DataError
from cm_runtime.evaluate.statistics import SHIPPED, Statistics, is_statistics, read_statistics, write_statistics

DIGEST = "ab" * 32


def covariance(rng: np.random.Generator, dimension: int) -> Any:
    root = rng.standard_normal((dimension, dimension))
    return root @ root.T


def test_what_was_written_is_read(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "s.npz"
    write_statistics(path, Statistics(rng.standard_normal(5), covariance(rng, 5), 77, DIGEST))
    found = read_statistics(path)
    with np.load(path) as raw:  # under the field's names
        assert np.array_equal(found.mean, raw["mu"])
        np.testing.assert_allclose(found.covariance, raw["sigma"], rtol=1e-15)
    assert (found.count, found.extractor_sha256) == (77, DIGEST)
    assert is_statistics(path)


def test_the_same_statistics_make_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        write_statistics(tmp_path / name, Statistics(np.zeros(3), np.eye(3), 4, DIGEST))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("extra", [{}, {"mu_s": np.zeros(7), "sigma_s": np.eye(7), "arr_0": np.zeros((2, 4, 4, 3))}])
def test_foreign_files_are_taken_and_do_not_say_whose_they_are(tmp_path: Path, extra: dict[str, Any]) -> None:
    """pytorch-fid's two arrays in float64; ADM's with more beside them."""
    np.savez(tmp_path / "f.npz", mu=np.ones(4), sigma=np.eye(4, dtype=np.float32), **extra)
    found = read_statistics(tmp_path / "f.npz")
    assert (found.count, found.extractor_sha256) == (None, None)
    found.check(4, DIGEST, "f.npz")
    with pytest.raises(DataError, match=r"f\.npz: statistics of 4 features, but the extractor gives 5"):
        found.check(5, DIGEST, "f.npz")


def test_statistics_of_another_extractor_are_refused() -> None:
    statistics = Statistics(np.zeros(4), np.eye(4), 9, DIGEST)
    statistics.check(4, DIGEST, "s.npz")
    with pytest.raises(DataError, match=r"s\.npz: statistics of another extractor \(abababababab, not cdcd"):
        statistics.check(4, "cd" * 32, "s.npz")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu is \(3,\) and sigma \(4, 4\)"),
        ({"mu": np.zeros((3, 3)), "sigma": np.eye(3)}, r"mu is \(3, 3\)"),
        ({"mu": np.zeros(3, int), "sigma": np.eye(3)}, "mu is int64"),
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 3, 3))}, "sigma is float64"),
        ({"mu": np.array([0, np.nan, 0]), "sigma": np.eye(3)}, "NaN"),
        ({"mu": np.zeros(3), "sigma": np.diag([1, np.inf, 1])}, "infinity"),
        ({"mu": np.zeros(3), "sigma": -np.eye(3)}, "not a covariance"),
        ({"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))}, "not a covariance"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "extractor_sha256": np.zeros(5, np.uint8)}, "must be 32 bytes"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "count": np.zeros(5, int)}, "one whole number"),
        ({"mu": np.zeros(3)}, "sigma"),
        ({"mu": np.array(["x"]), "sigma": np.eye(1)}, "mu"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), 1e308)}, r"numbers above 1e\+100, which no features have"),
        ({"mu": np.zeros(20_000), "sigma": np.eye(3)}, "D up to 4096"),
    ],
)
def test_what_is_no_statistics_is_one_line(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=words) as caught:
        read_statistics(tmp_path / "bad.npz")
    assert "bad.npz" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 100, 0.5, -30])
def test_a_truncated_file_is_one_line(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "s.npz"
    write_statistics(path, Statistics(np.zeros(30), np.eye(30), 9, DIGEST))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(DataError, match=r"s\.npz"):
        read_statistics(path)


def test_those_that_ship_are_of_the_whole_training_data() -> None:
    found = read_statistics(SHIPPED)
    assert found.count == 60_000 and found.mean.shape == (128,)
    assert SHIPPED.stat().st_size < 80_000
