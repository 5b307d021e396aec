"""TOML of others: what is bounded, and that nothing hides a key from the bounds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cm_runtime.errors import ConfigError
from cm_runtime.files import toml

LONG = ".".join(["a"] * (toml.MOST_PARTS + 1))
HEX = "f" * 16


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (f"x = 1\n{LONG} = 1", "line 2: a...: must be a key of at most 16 parts"),
        (".".join(["a"] * 20_000) + " = 1", "must be a key of at most 16 parts"),
        (f"[{LONG}]", "at most 16 parts"),
        (f"[[{LONG}]]", "at most 16 parts"),
        (f"x = {{b = 1, {LONG} = 1}}", "at most 16 parts"),
        (" . ".join(['"a.b"'] * 17) + " = 1", "at most 16 parts"),
        (f'x = [""" """", {{{LONG} = 1}}]', "at most 16 parts"),
        (f"x = [''' '''', {{{LONG} = 1}}]", "at most 16 parts"),
        (f'x = ["\\\\", {{{LONG} = 1}}]', "at most 16 parts"),
        (f"x = ['\\', {{{LONG} = 1}}]", "at most 16 parts"),
        (f"# it's\n{LONG} = 1", "line 2: a...: must be a key"),
        ("x = [[1],\n {y = 1" + "0" * 5000 + "}]", "line 2: y: must be a number of fewer digits than 5001"),
        ("x = 1" + "0" * 400, "x: must be a whole number of at most 64 bits"),
        (f"[[t]]\nx = [1, {{y = 0x1{HEX}}}]", "t.0.x.1.y: must be a whole number of at most 64 bits"),
        (f"x = {1 << 63}", "64 bits"),
        ("x = " + "[" * 100_000, "is not valid TOML: maximum recursion depth"),
        ('x = "\\ud800"', "is not valid TOML"),
        ('\\"""' * 40_000 + "\\", "is not valid TOML"),  # in linear time
    ],
)
def test_what_is_out_of_bounds_is_one_line_that_names_the_key(tmp_path: Path, text: str, wrong: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        toml.read(path)
    assert str(caught.value).startswith(str(path)) and wrong in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        ".".join(["a"] * toml.MOST_PARTS) + " = 1",
        'x = "' + "." * 1000 + '"  # ' + "." * 1000,
        'x = """\n' + ".a\n" * 100 + '"""',
        "x = '" + "1" * 5000 + "'",
        "x = [" + "0.5, " * 100 + "]",
        f"x = [{-(1 << 63)}, {(1 << 63) - 1}]",
    ],
)
def test_what_fits_is_read_as_tomllib_does(text: str) -> None:
    import tomllib

    assert toml.parse(text, "x") == tomllib.loads(text)


def test_a_file_is_bounded_and_regular(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_text("#" * (toml.MOST_BYTES + 1))
    for name, wrong in (("pipe", "a pipe"), ("/dev/zero", "a device"), ("large", "262145 bytes"), ("no", "no such")):
        with pytest.raises(ConfigError, match=wrong):
            toml.read(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "value"), [("0.5", 0.5), ("../" * 20, "../" * 20), ("{", "{"), ("[1]", [1]), ("[" * 99_999, "[" * 99_999)]
)
def test_a_value_that_is_no_toml_is_text(text: str, value: object) -> None:
    assert toml.parse_value(text, "--set x") == value


@pytest.mark.parametrize("text", ["1" + "0" * 5000, "1" + "0" * 400, "{y = 1" + "0" * 30 + "}", f"{{{LONG} = 1}}"])
def test_a_value_is_bounded_too(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^set: x.*(digits|64 bits|16 parts)"):
        toml.parse_value(text, "set: x")
