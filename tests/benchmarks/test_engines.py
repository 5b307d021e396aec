"""benchmarks/engines.py: the README says what its result says, and a result that draws something else is none."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import engines
import race

ROOT = Path(__file__).parents[2]
SHOWN = {"README.md": "xeon-avx512-2-cores", "benchmarks/README.md": "epyc-zen4-2-cores"}


@pytest.fixture(params=SHOWN)
def page(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def result(page: str) -> dict[str, Any]:
    path = ROOT / "benchmarks" / "results" / SHOWN[page] / "engines.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_a_page_shows_the_table_of_the_committed_result(page: str, result: dict[str, Any]) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    _, _, after = text.partition("<!-- engines:begin -->\n")
    assert after.partition("\n<!-- engines:end -->")[0].strip() == engines.table(result)


def test_the_committed_result_is_whole_and_agrees(result: dict[str, Any]) -> None:
    assert [(row["network"], row["batch"]) for row in result["rows"]] == list(engines.SETUPS)
    for row in result["rows"]:
        engines.check(row)
        assert row["rounds"] >= 5


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("grey", "ort"), 1.2, "ort is 1.2 grey levels"),
        (("grey", "plain openvino"), 7.0, "plain openvino is 7.0 grey levels"),
        (("psnr", "openvino bf16"), 39.9, "bf16 has 39.9 dB"),
    ],
)
def test_images_that_differ_end_the_run(result: dict[str, Any], place: Any, value: float, message: str) -> None:
    row = copy.deepcopy(result["rows"][0])
    row[place[0]][place[1]] = value
    with pytest.raises(SystemExit, match=message):
        engines.check(row)


def test_a_ratio_is_the_median_of_rounds() -> None:
    import numpy as np

    slow, fast = (
        race.Times(seconds, np.zeros(1)) for seconds in ([2.0, 3.0, 8.0, 4.0, 4.0], [1.0, 1.0, 2.0, 1.0, 2.0])
    )
    assert race.ratio_text(slow, fast) == "3.00x [2.00, 4.00]"
