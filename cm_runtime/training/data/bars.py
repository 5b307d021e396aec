"""Progress bars on stderr, silent when it is not a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress


def progress_bar(show: bool) -> Progress:
    """A rich progress display to use in ``with``; draws nothing unless ``show`` and stderr is a terminal."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not (show and console.is_terminal))
