"""What ``--help`` says: all that is written, and the default of what has one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import typer

from cm_runtime.cli import app

Cli = Callable[..., Any]


def commands(command: Any, *words: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    if hasattr(command, "commands"):
        for name, each in command.commands.items():
            yield from commands(each, *words, name)
    else:
        yield words, command


COMMANDS = dict(commands(typer.main.get_command(app)))


def read(text: str) -> str:
    """Without the frame and the lines' breaks."""
    return re.sub(r"[\s\u2500-\u257f]+", "", text)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_says_all_that_is_written(cli: Cli, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich takes what stands in brackets for its markup, and leaves it out."""
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 4000)  # or columns would cut sentences in pieces
    said = read(cli(*words, "--help").out)
    command = COMMANDS[words]
    assert read(command.help) in said
    for each in command.params:
        if each.name != "help":
            assert each.help and read(each.help) in said, each.name
            if isinstance(each.show_default, str):
                assert f"{read(each.help)}[default:({read(each.show_default)})]" in said, each.name


def test_defaults_that_are_none_are_said(cli: Cli) -> None:
    said = " ".join(cli("sample", "--help").out.replace("\u2502", " ").split())
    for default in ("(2)", "(256)", "(one batch)", "(samples.png)", "(npz)", "(the bundled model)"):
        assert f"[default: {default}]" in said
