"""Counts in sentences."""

from __future__ import annotations

from collections.abc import Sequence


def quantity(count: int, noun: str) -> str:
    """``count`` with its noun: 1 step, 2 steps, 10 classes.

    Args:
        count: How many there are.
        noun: The word for one of them.

    Returns:
        Both in agreement.
    """
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{count} {noun if count == 1 else plural}"


def join_words(words: Sequence[str]) -> str:
    """``words`` as a list in a sentence: a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
