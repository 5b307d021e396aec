"""``python -m cm_runtime`` and the console script: the boundary first, then the imports of the command line."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line of this process."""
    try:
        from cm_runtime.errors.boundary import guard

        guard(_run, "--debug" in sys.argv)
    except KeyboardInterrupt:  # before the boundary stood
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    finally:
        import signal

        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left to save while Python ends


def _run() -> None:
    from cm_runtime.cli import main as run

    run()


if __name__ == "__main__":
    main()
