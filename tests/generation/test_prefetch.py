"""What runs ahead: how far, in which order, and how it ends."""

import threading
import time
from collections.abc import Iterator

import pytest

from cm_runtime.generation.prefetch import prefetch


def settled(made: list[int]) -> int:
    """How many were made when no more are."""
    before = -1
    while before != len(made):
        before = len(made)
        time.sleep(0.1)
    return before


def counted(made: list[int], end: int = 1000) -> Iterator[int]:
    for n in range(end):
        made.append(n)
        yield n


@pytest.mark.parametrize("most", [1, 2, 50])
def test_all_parts_come_in_order(most: int) -> None:
    assert list(prefetch(counted([], 30), most)) == list(range(30))
    assert list(prefetch(iter([None, 0, False]), most)) == [None, 0, False]
    assert list(prefetch(iter([]), most)) == []


@pytest.mark.process
@pytest.mark.parametrize("most", [1, 3])
def test_no_more_are_made_than_asked_for_and_none_for_a_reader_that_left(most: int) -> None:
    made: list[int] = []
    parts = prefetch(counted(made), most)
    assert made == []
    assert [next(parts), next(parts)] == [0, 1]
    assert settled(made) == 2 + most
    parts.close()
    assert settled(made) == 2 + most
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_what_is_raised_comes_in_its_place() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise RuntimeError("no more")

    parts = prefetch(failing(), 5)
    assert next(parts) == 1
    with pytest.raises(RuntimeError, match="no more"):
        next(parts)
    assert list(parts) == []
