"""bench/turns.py: the order of turns, the number of rounds, and the ratio of two contenders."""

from __future__ import annotations

import pytest

from cm_runtime.bench.turns import ratio, take_turns, timer, until


def test_every_contender_has_one_turn_a_round_and_the_order_turns_round() -> None:
    order: list[str] = []
    work = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}  # type: ignore[misc]
    assert take_turns(work, range(3)) == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}
    assert "".join(order) == "abccbaabc"


@pytest.mark.parametrize(("seconds", "least", "most", "rounds"), [(0, 5, 9, 5), (60, 5, 9, 9), (0, 0, 9, 0)])
def test_rounds_are_within_their_bounds(seconds: float, least: int, most: int, rounds: int) -> None:
    assert list(until(seconds, least, most)) == list(range(rounds))


def test_a_timer_gives_the_seconds_on_its_clock() -> None:
    ticks = iter([1.0, 3.5])
    assert timer(lambda: None, lambda: next(ticks))() == 2.5


def test_a_ratio_is_the_median_and_the_quartiles_of_rounds() -> None:
    assert ratio([2.0, 3.0, 8.0, 4.0, 4.0], [1.0, 1.0, 2.0, 1.0, 2.0]) == (3.0, 2.0, 4.0)
