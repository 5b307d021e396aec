"""benchmarks/training.py: ours and the transcription agree, and a transcription that does not is caught."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def _import() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_training", ROOT / "benchmarks" / "training.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


training = _import()
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pair(method: str, precision: str = "fp32", channels_last: bool = False) -> tuple[Any, Any]:
    case = training.Case(method, "tiny", 6, precision, False, channels_last, CPU)
    ours, plain = training.pair_of(case, learning_rate=100.0)
    return ours, plain


@pytest.mark.process
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("method", ["cd", "ct"])
def test_ours_and_the_transcription_agree(method: str, channels_last: bool) -> None:
    found = training.disagreement(*pair(method, channels_last=channels_last))
    assert set(found) == {"loss", "gradient", "target"}
    assert training.agree(found), found


def euler(plain: Any) -> None:
    """The teacher's second evaluation gives what the first one gave: a step of Euler."""
    seen: list[torch.Tensor] = []

    def denoised(net: Any, x: torch.Tensor, t: torch.Tensor, label: Any) -> torch.Tensor:
        wide = t[:, None, None, None]
        seen.append((x - true(net, x, t, label)) / wide)
        return x - seen[-1] * wide if len(seen) % 2 else x - seen[-2] * wide

    true = training.denoise
    training.denoise = denoised


def other_mu(plain: Any) -> None:
    N_and_mu = plain.N_and_mu
    plain.N_and_mu = lambda k: (N_and_mu(k)[0], N_and_mu(k)[1] - 0.2)


def teacher_as_target(plain: Any) -> None:
    plain.target = plain.teacher


def double_the_rate(plain: Any) -> None:
    plain.optimizer.param_groups[0]["lr"] *= 2


def another_grid(plain: Any) -> None:
    grid = training.grid
    training.grid = lambda N, device: grid(N, device) * (1 + 2e-3)


@pytest.mark.process
@pytest.mark.parametrize(
    ("method", "sabotage", "shows_in"),
    [
        ("cd", euler, "gradient"),
        ("cd", teacher_as_target, "loss"),
        ("ct", another_grid, "loss"),
        ("ct", other_mu, "target"),
        ("cd", double_the_rate, "target"),
    ],
)
def test_a_sabotaged_transcription_is_caught(
    method: str, sabotage: Any, shows_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "denoise", training.denoise)  # put back what a sabotage replaces
    monkeypatch.setattr(training, "grid", training.grid)
    ours, plain = pair(method)
    sabotage(plain)
    found = training.disagreement(ours, plain)
    assert not training.agree(found)
    assert found[shows_in] > 1e-3, found


@pytest.mark.quick("ct")
@pytest.mark.process
@pytest.mark.parametrize("method", ["cd", "ct"])
def test_the_whole_program(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--network", "tiny", "--batch", "6", "--rounds", "2", "--compile", "off", "--method", method]
    assert training.main([*arguments, "--require", "0.001"]) == 0
    told = capsys.readouterr().out
    assert told.count("ratio") == 3  # the heading, fp32 and bf16
    assert f"{method}: apart by loss" in told
    assert training.main([*arguments, "--precision", "fp32", "--require", "1e6"]) == 1
    assert "missed" in capsys.readouterr().out


@pytest.mark.process
def test_a_disagreement_stops_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    grid = training.grid
    monkeypatch.setattr(training, "grid", lambda N, device: grid(N, device) * (1 + 2e-3))
    assert training.main(["--network", "tiny", "--batch", "6", "--rounds", "2", "--compile", "off"]) == 1
    assert "disagree" in capsys.readouterr().out


@pytest.mark.slow
def test_profile_shares_are_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    ours, plain = pair("ct")
    for step in (ours.step, plain.step):
        shares = training.profile(step, CPU)
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["convolution"] > 0.1


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(SystemExit) as caught:
        training.main(["--rounds", "1"])
    assert caught.value.code == 2
