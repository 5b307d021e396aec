"""The report of a build of the kernels: nvcc's log and kernels.fatbin -> kernels.json. `make` calls it.

    python resources.py NVCC LOG PTX FOLDER    # writes FOLDER/kernels.json
    python resources.py --compare FOLDER       # holds what is committed to the build in FOLDER

The registers, static shared memory, spills and stack of each kernel on each GPU, as ptxas printed them, the sizes of
its parameters in the PTX, the compiler's version, and the hashes of the binary and of the sources it was built from.
A kernel that spills is an error.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = ("*.cu", "*.h", "Makefile")
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<gpu>\d+)a?'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers"
    r"(?:[^\n]*? (?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)
ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)", re.DOTALL)
PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.[bfsu](\d+)[^,\[]*(?:\[(\d+)\])?")


def sources() -> dict[str, str]:
    """The hash of each file that decides what is built, by its name."""
    paths = sorted(path for pattern in SOURCES for path in FOLDER.glob(pattern))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def kernels(log: str) -> dict[str, dict[str, dict[str, int]]]:
    """Kernel -> GPU -> registers, bytes of static shared memory and of stack, and bytes spilled."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for match in KERNEL.finditer(log):
        spills = int(match["stores"]) + int(match["loads"])
        shared = int(match["shared"] or 0)
        numbers = {
            "registers": int(match["registers"]),
            "shared": shared,
            "stack": int(match["stack"]),
            "spills": spills,
        }
        table.setdefault(match["name"], {})[f"sm_{match['gpu']}"] = numbers
    return {name: dict(sorted(table[name].items())) for name in sorted(table)}


def parameters(ptx: str) -> dict[str, list[int]]:
    """Kernel -> bytes of each of its parameters."""
    entries = {name: PARAMETER.findall(text) for name, text in ENTRY.findall(ptx)}
    return {name: [int(bits) // 8 * int(count or 1) for bits, count in entries[name]] for name in sorted(entries)}


def main(nvcc: str, log: Path, ptx: Path, folder: Path) -> None:
    """Writes ``folder``/kernels.json; ends the program where a kernel spills."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    table = kernels(log.read_text())
    result = {
        "nvcc": re.findall(r"release ([\d.]+), V([\d.]+)", version)[0][1],
        "fatbin_sha256": hashlib.sha256((folder / "kernels.fatbin").read_bytes()).hexdigest(),
        "sources_sha256": sources(),
        "kernels": table,
        "parameters": parameters(ptx.read_text()),
    }
    spills = [f"{name} on {gpu}" for name, each in table.items() for gpu, has in each.items() if has["spills"]]
    if spills or not table:
        sys.exit(f"registers are spilled in {', '.join(spills)}" if spills else "no kernel was compiled")
    lines = json.dumps(result, indent=1)
    lines = re.sub(r"\{(\s+\"registers\".*?)\}|\[(.*?)\]", _on_a_line, lines, flags=re.S)
    (folder / "kernels.json").write_text(lines + "\n")


def compare(built: Path) -> None:
    """Ends the program unless what is committed is of these sources and, with the same compiler, this binary."""
    committed, new = (json.loads((folder / "kernels.json").read_text()) for folder in (FOLDER, built))
    binary = hashlib.sha256((FOLDER / "kernels.fatbin").read_bytes()).hexdigest()
    names = [
        name for name in ("sources_sha256", "fatbin_sha256", "kernels", "parameters") if committed[name] != new[name]
    ]
    if committed["nvcc"] != new["nvcc"]:  # which makes another binary of the same sources
        names = [name for name in names if name == "sources_sha256"]
    if names or binary != committed["fatbin_sha256"]:
        sys.exit(f"kernels.fatbin is not of these sources ({', '.join(names) or 'its hash'}); run make -C kernels")
    count = len(new["kernels"]), sum(map(len, new["kernels"].values()))
    most = max(has["registers"] for each in new["kernels"].values() for has in each.values())
    print(f"{count[0]} kernels, {count[1]} builds, no warnings, no spills, at most {most} registers")


def _on_a_line(match: re.Match[str]) -> str:
    return match[0][0] + re.sub(r"\s+", " ", match[0][1:-1]).strip() + match[0][-1]


if __name__ == "__main__":
    if sys.argv[1] == "--compare":
        compare(Path(sys.argv[2]))
    else:
        main(sys.argv[1], *map(Path, sys.argv[2:]))
