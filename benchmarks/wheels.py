"""Wheels for a GPU machine without network: gathered here in bundles of at most 60 MB, installed there.

    python benchmarks/wheels.py gather -o build/wheels            # base: what cm_runtime imports; onnxruntime-gpu alone
    python benchmarks/wheels.py gather -o build/wheels base       # the first of them
    python benchmarks/wheels.py install build/wheels/*.bundle --into /tmp/wheels
    export PYTHONPATH=/tmp/wheels/site

`install` may be called for some bundles at a time: pieces are kept in the folder, and a set is installed when all of
its pieces are there. A bundle begins with a line of JSON: its set, its number, and the SHA-256 of the piece and of the
whole, a tar of wheels. Needs the standard library and pip alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MOST = 60_000_000  # bytes of a bundle
SETS = {  # name -> packages, and whether pip adds what they need
    "base": (("pydantic", "typer", "rich", "pillow"), True),
    "onnxruntime-gpu": (("onnxruntime-gpu",), False),  # numpy and CUDA come with torch
}
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 27, 28, 34)] + ["manylinux2014_x86_64"]


def gather(names: Sequence[str], folder: Path, python: str) -> list[Path]:
    """Download sets of wheels for that Python on x86-64 Linux, and write their bundles."""
    bundles = []
    for name in names:
        packages, has_needs = SETS[name]
        with tempfile.TemporaryDirectory() as wheels:
            words = [sys.executable, "-m", "pip", "download", "-q", "-d", wheels, "--only-binary=:all:"]
            words += ["--implementation", "cp", "--python-version", python]
            words += [word for platform in PLATFORMS for word in ("--platform", platform)]
            subprocess.run([*words, *([] if has_needs else ["--no-deps"]), *packages], check=True)
            bundles += split(name, sorted(Path(wheels).iterdir()), folder)
    return bundles


def split(name: str, wheels: Sequence[Path], folder: Path, most: int = MOST) -> list[Path]:
    """Write a set's wheels as bundles of at most ``most`` bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as whole:
        with tarfile.open(fileobj=whole, mode="w") as archive:
            for wheel in wheels:
                archive.add(wheel, wheel.name)
        size, digest, room = whole.tell(), _sha256(whole), most - 1000
        count = -(-size // room)
        whole.seek(0)
        bundles = [folder / f"{name}-{number}-of-{count}.bundle" for number in range(1, count + 1)]
        for number, path in enumerate(bundles, 1):
            piece = whole.read(room)
            header = {"set": name, "number": number, "count": count, "sha256": digest}
            header["piece"] = hashlib.sha256(piece).hexdigest()
            path.write_bytes(json.dumps(header).encode() + b"\n" + piece)
    return bundles


def install(bundles: Sequence[Path], folder: Path) -> list[str]:
    """Keep the pieces of ``bundles``; install each set that is complete into ``folder``/site.

    Returns a line for each set that was met. Ends the program where a piece or a whole is not what was gathered.
    """
    headers: dict[str, dict[str, Any]] = {}
    for path in bundles:
        with path.open("rb") as bundle:
            header = json.loads(bundle.readline())
            piece = bundle.read()
        if hashlib.sha256(piece).hexdigest() != header["piece"]:
            sys.exit(f"wheels: {path} is damaged: carry it again")
        target = folder / header["sha256"] / str(header["number"])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(piece)
        headers[header["set"]] = header
    return [_install_set(header, folder) for header in headers.values()]


def _install_set(header: dict[str, Any], folder: Path) -> str:
    pieces = [folder / header["sha256"] / str(number) for number in range(1, header["count"] + 1)]
    missing = [piece.name for piece in pieces if not piece.exists()]
    if missing:
        return f"{header['set']}: {len(missing)} of {header['count']} bundles are missing: {', '.join(missing)}"
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        with tempfile.TemporaryFile(dir=temporary) as whole:
            for piece in pieces:
                with piece.open("rb") as content:
                    shutil.copyfileobj(content, whole)
            if _sha256(whole) != header["sha256"]:
                sys.exit(f"wheels: the bundles of {header['set']} are not of one call of gather")
            whole.seek(0)
            with tarfile.open(fileobj=whole) as archive:
                archive.extractall(temporary, filter="data")
        wheels = sorted(map(str, Path(temporary).glob("*.whl")))
        words = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
        subprocess.run([*words, "--target", str(folder / "site"), *wheels], check=True)
    return f"{header['set']}: {len(wheels)} wheels in {folder / 'site'}"


def _sha256(file: Any) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: Sequence[str] | None = None) -> None:
    """Gather or install."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("gather")
    command.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)}; all of them if none is named")
    command.add_argument("-o", "--output", type=Path, default=Path("build/wheels"), metavar="FOLDER")
    command.add_argument("--python", default="3.12", help="of the GPU machine (%(default)s)")
    command = commands.add_parser("install")
    command.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    command.add_argument("--into", type=Path, default=Path("/tmp/wheels"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.command == "install":
        print("\n".join(install(options.bundles, options.into)))
        return
    if unknown := set(options.sets) - set(SETS):
        parser.error(f"there is no set {', '.join(sorted(unknown))}; they are {', '.join(SETS)}")
    for path in gather(options.sets or list(SETS), options.output, options.python):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
