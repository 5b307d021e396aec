"""What several test modules share: a reference Philox, small configs, manifests, and networks that are not silent."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiers

from cm_runtime.backends import trials
from cm_runtime.cli import main


def philox4x32(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 as its paper writes it (Salmon et al. 2011, section 3.3), in Python integers."""
    word = 0xFFFFFFFF
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * a, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c, 1 << 32)
        a, b, c, d = high1 ^ b ^ k, low1, high0 ^ d ^ m, low0
        k, m = (k + 0x9E3779B9) & word, (m + 0xBB67AE85) & word
    return a, b, c, d


def addressed_words(seed: int, sample: int, draw: int, block: int) -> tuple[int, ...]:
    """The four words of the design's layout: counter (block, draw, sample low, high), key (seed low, high)."""
    low = 0xFFFFFFFF
    return philox4x32((block, draw, sample & low, sample >> 32), (seed & low, seed >> 32))


def pytest_configure() -> None:
    """A shell's background jobs ignore Ctrl-C, and so would all that the tests start, and interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tiers.mark_slow_cases(items)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Of a worker that died pytest-xdist does not say how: a negative status is the number of the signal."""
    if error:
        print(f"\n{node.gateway.id} died, exit status {node.gateway._io.wait()}")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is remembered between processes is remembered for this session only, by all of pytest's workers."""
    session = tmp_path_factory.getbasetemp()
    folder: Path = session.parent if "PYTEST_XDIST_WORKER" in os.environ else session
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(trials, "PAUSE", 0.0)  # seconds: it matters little here which engine is the faster
        patch.setattr(trials, "SECONDS", 0.01)
        yield


@pytest.fixture(scope="session", autouse=True)
def complaints(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """In make test-fast nobody starts a process: the complaints of those who tried."""
    with tiers.no_children() if tiers.is_fast(request.config) else nullcontext([]) as complaints:
        yield complaints


@pytest.fixture(autouse=True)
def no_caught_complaint(complaints: list[str]) -> Iterator[None]:
    """A complaint that the product caught, or that a thread raised, fails the test all the same."""
    complaints.clear()
    yield
    if complaints:
        pytest.fail(complaints[0], pytrace=False)


@pytest.fixture(scope="session")
def reference_philox() -> Callable[..., tuple[int, ...]]:
    return philox4x32


@pytest.fixture(scope="session")
def reference_words() -> Callable[..., tuple[int, ...]]:
    return addressed_words


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20230303)


@pytest.fixture(scope="session")
def make_manifest() -> Callable[..., Any]:
    """A boundary-form manifest for small images, with changes."""
    from cm_runtime.manifest import Manifest

    def make(**changes: Any) -> Manifest:
        plain = {"graph": "denoiser", "image_shape": (1, 3, 7), "num_classes": 0, "precond": "boundary"}
        return Manifest(**{**plain, "sigma_boundary": 0.002, **changes})

    return make


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Any]:
    """The config of a tiny network; changes go to the network, those of f itself in ``f``."""
    from cm_runtime.networks.consistency import ModelConfig

    def make(f: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
        network = {"channels": 32, "channel_mult": (1, 2), "res_blocks": 1, "head_channels": 32}
        images = {"image_size": 8, "image_channels": 3}
        form = {"precond": "boundary", "sigma_boundary": 0.002, **(f or {})}
        return ModelConfig(network={**network, **images, **changes}, **form)

    return make


@pytest.fixture(scope="session")
def randomised() -> Callable[..., Any]:
    """Fills every weight of a torch module, the silent ones included, from a seed."""
    import torch

    def fill(module: Any, seed: int = 0) -> Any:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in module.named_parameters():
                fan_in = weight[0].numel() if weight.dim() > 1 else 1
                values = torch.randn(weight.shape, generator=generator) / fan_in**0.5
                if weight.dim() == 1:  # biases, and the norms' scales
                    values = 0.1 * values + (1 if "norm" in name or name.endswith("s.0.weight") else 0)
                weight.copy_(values)
        return module.eval()

    return fill


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def boundary(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Exported files of three channels and classes; see tests/exports.py, which needs torch."""
    import exports

    return exports.Files("boundary", tmp_path_factory)


@pytest.fixture(scope="session")
def edm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Exported files of one channel, without classes."""
    import exports

    return exports.Files("edm", tmp_path_factory)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs the command line in this process, in an empty folder; anything but SystemExit is the test's failure.

    A command that takes long says so, and on a busy machine any does: here none does.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cm_runtime.cli.progress.LONG", float("inf"))

    def run(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in arguments])
        captured = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), captured.out, captured.err)

    return run
