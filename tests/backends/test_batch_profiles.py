"""The batches that an engine takes: their text, and the profile that runs a number of images."""

from __future__ import annotations

import pytest

from cm_runtime.backends.batch_profiles import choose_profile, format_profiles, parse_profiles
from cm_runtime.errors import RequestError


@pytest.mark.parametrize("text", ["1:64:256", "1", "8:8:65535", "1,8,64", "1,2:64:256", "1,1,1"])
def test_profiles_are_read_and_written_alike(text: str) -> None:
    assert format_profiles(parse_profiles(text)) == text


def test_one_size_is_all_three() -> None:
    (profile,) = parse_profiles("8:8:8")
    assert (profile.min, profile.opt, profile.max, str(profile)) == (8, 8, 8, "8")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "1:64",
        "1:64:256:512",
        "0:1:2",
        "2:1:3",
        "1:3:2",
        "1:64:65536",
        "-1:1:1",
        "1: 2:3",
        "1, 2",
        "1,,2",
        ",1",
        "a:b:c",
        "\u0661:\u0662:\u0663",
        ",".join(["1"] * 17),
    ],
)
def test_profiles_that_are_none_are_a_request_error(text: str) -> None:
    with pytest.raises(RequestError, match=r"--batch must be up to 16 of N or MIN:OPT:MAX, .* from 1 to 65535"):
        parse_profiles(text)


@pytest.mark.parametrize(
    ("text", "count", "chosen"),
    [
        ("1,8,64", 1, (0, 1)),
        ("1,8,64", 3, (1, 8)),
        ("1,8,64", 8, (1, 8)),
        ("64,8,1", 9, (0, 64)),
        ("1:64:256", 7, (0, 7)),
        ("8:64:256", 7, (0, 8)),
        ("1:64:256,1", 1, (1, 1)),  # no padding by either, and one is tuned for it
        ("1:64:256,8", 7, (0, 7)),
        ("1:64:256,2:8:16", 15, (1, 15)),
        ("1,2:64:256", 255, (1, 255)),
    ],
)
def test_what_pads_least_runs_and_of_that_what_is_tuned_nearest(text: str, count: int, chosen: tuple[int, int]) -> None:
    assert choose_profile(parse_profiles(text), count) == chosen


@pytest.mark.parametrize("text", ["1,8,64", "64,1", "1:8:64"])
def test_more_than_any_takes_names_the_most(text: str) -> None:
    with pytest.raises(RequestError, match=rf"takes batches of {text} .*, not 65; ask for --micro-batch 64"):
        choose_profile(parse_profiles(text), 65)
