"""``python -m cm_runtime``."""

from cm_runtime.cli import main

main()
