"""Whatever ends a command is one line and an exit status; with --debug it is the exception itself."""

import ast
import errno
import sys
import warnings
from pathlib import Path

import pytest

from cm_runtime import __main__
from cm_runtime.errors import ConfigError, Interrupted, boundary

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("x.toml: no"), 1, "error: x.toml: no"),
        (Interrupted("stopped at step 3"), 130, "stopped at step 3"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
        (MemoryError(), 1, "error: not enough memory for this; lower the micro-batch or the batch"),
        (FULL, 1, "error: no space left on the disk"),
        (OSError(errno.ENOSPC, "x", "a.npz"), 1, "error: a.npz: no space left on the disk"),
        (OSError(errno.ENAMETOOLONG, "File name too long", b"\xffa"), 1, "error: \ufffda: File name too long"),
        (RecursionError("deep"), 1, "error: something is nested too deeply (deep); --debug shows where"),
        (ImportError("a.so:\nno map"), 1, "error: a package cannot be imported: a.so: no map; --debug shows where"),
        (
            ValueError("a\nb\x1b[31m"),
            1,
            "error: unexpected error: ValueError: a b [31m; this is a fault of cm-runtime: --debug shows where",
        ),
    ],
)
def test_an_exception_is_one_line(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        boundary.guard(fail, debug=False)
    assert (ended.value.code, capsys.readouterr()) == (status, ("", f"{line}\n" if line else ""))
    if status == 1 and line:
        with pytest.raises(type(error)):
            boundary.guard(fail, debug=True)


def test_a_line_of_100_kb_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ValueError("x" * 100_000)

    with pytest.raises(SystemExit):
        boundary.guard(fail, debug=False)
    assert 500 < len(capsys.readouterr().err) < 1500


@pytest.mark.parametrize("where", ["write", "flush"])
def test_a_full_disk_under_standard_output_is_one_line(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a command prints, and where only the last flush finds out."""
    import typer

    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115  # closed with the test
    with pytest.raises(SystemExit) as ended:
        boundary.guard(lambda: typer.echo("a") if where == "write" else sys.stdout.write("a"), debug=False)
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: standard output: no space left on the disk\n"


def test_ctrl_c_that_a_package_made_another_exception_of_is_still_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    import signal

    def load() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    with pytest.raises(SystemExit) as ended:
        boundary.guard(load, debug=False)
    assert (ended.value.code, capsys.readouterr().err) == (130, "interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("debug", [False, True])
def test_warnings_are_shown_with_debug_alone(debug: bool) -> None:
    def warn() -> None:
        warnings.simplefilter("always")  # as some packages do
        warnings.warn("a decompression bomb", stacklevel=1)

    with warnings.catch_warnings(record=True) as shown:
        boundary.guard(warn, debug=debug)
    assert [str(each.message) for each in shown] == ["a decompression bomb"] * debug


def test_ctrl_c_while_the_command_line_is_imported_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import signal

    def importing() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "_run", importing)
    try:
        with pytest.raises(SystemExit) as ended:
            __main__.main()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert (ended.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_nothing_is_imported_before_the_boundary_stands() -> None:
    tree = ast.parse(Path(__main__.__file__).read_text())
    assert [ast.unparse(each) for each in tree.body if isinstance(each, ast.Import | ast.ImportFrom)] == [
        "from __future__ import annotations",
        "import sys",
    ]
