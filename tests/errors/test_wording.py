"""cm_runtime/errors/wording.py."""

import pytest

from cm_runtime.errors.wording import join_words, quantity


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (1, "step", "1 step"),
        (2, "step", "2 steps"),
        (0, "image", "0 images"),
        (1, "class", "1 class"),
        (10, "class", "10 classes"),
    ],
)
def test_a_count_and_its_noun_agree(count: int, noun: str, text: str) -> None:
    assert quantity(count, noun) == text


@pytest.mark.parametrize(
    ("words", "text"), [([], ""), (["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")]
)
def test_words_in_a_row(words: list[str], text: str) -> None:
    assert join_words(words) == text
