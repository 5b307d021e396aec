"""List the kernels of ONNX Runtime's CUDA provider, and the nodes of files that it takes, by its wheel alone.

    pip download onnxruntime-gpu==1.31.1 --no-deps && unzip -d WHEEL onnxruntime_gpu-*.whl
    python tests/backends/list_cuda_kernels.py WHEEL -o tests/backends/cuda_kernels.json
    python tests/backends/list_cuda_kernels.py WHEEL m.onnx

Without a GPU: the libraries of CUDA that the provider is linked to are empty ones that gcc makes, in which every call
succeeds and does nothing. A session is planned on them as on a GPU, and nothing can run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

# Those that answer through a pointer.
BODIES = {
    "cudaGetDeviceCount": "int *n) { *n = 1;",
    "cudaGetDevice": "int *n) { *n = 0;",
    "cudaMemGetInfo": "unsigned long *a, unsigned long *b) { *a = *b = 1ul << 34;",
    "cudaGetDeviceProperties": "char *p) { for (int i = 0; i < 1000; i++) p[i] = 0;",
    **dict.fromkeys(("cudaMalloc", "cudaMallocHost", "cudaHostAlloc"), "void **p, unsigned long n) { *p = malloc(n);"),
    **dict.fromkeys(
        ("cudaStreamCreateWithFlags", "cublasCreate_v2", "cublasLtCreate", "cudnnCreate"),
        "void **p) { *p = (void *)16;",
    ),
}
HOMES = {"cuTensor": "libcuda.so.1", "createNv": "libnvonnxparser.so.10", "createIn": "libnvinfer.so.10"}
HOMES |= {"getInfer": "libnvinfer.so.10", "getPlugi": "libnvinfer.so.10"}

OURS = {"float", "float16", "bfloat16", "int64", "uint8", "bool"}

LIST = """
import json
from onnxruntime.capi import _pybind_state
kernels = [k for k in _pybind_state.get_all_opkernel_def() if k.provider == "CUDAExecutionProvider"]
rows = [[k.domain, k.op_name, *k.version_range, {n: sorted(t) for n, t in k.type_constraints.items()}] for k in kernels]
print(json.dumps(rows))
"""
PLACE = """
import sys
import onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 0
provider = "CUDAExecutionProvider", {"enable_cuda_graph": "1"}
onnxruntime.InferenceSession(sys.argv[1], options, providers=[provider], enable_fallback=0)
"""


def build_libraries(wheel: Path, folder: Path) -> None:
    """Write empty libraries for all that the wheel's providers are linked to."""
    names = defaultdict(set)
    names["libcurand.so.10"] = set()
    for provider in ("cuda", "tensorrt"):
        path = wheel / f"onnxruntime/capi/libonnxruntime_providers_{provider}.so"
        for line in _lines("nm", "-D", "--undefined-only", str(path)):
            name, _, library = line.split()[-1].partition("@")
            library = library if library.startswith("libcu") else HOMES.get(name[:8], "")
            if library:
                names[library].add(name)
    for library, functions in names.items():
        source = "void *malloc(unsigned long);\n" + "".join(
            f"int {name}({BODIES.get(name, 'void) {')} return 0; }}\n" for name in sorted(functions)
        )
        (folder / "library.c").write_text(source)
        (folder / "versions").write_text(f"{library} {{ global: *; }};")
        versions = (
            ["-Wl,--version-script=versions"] if library.startswith(("libcublas", "libcudart", "libcudnn")) else []
        )
        words = ["gcc", "-w", "-fno-builtin", "-shared", "-fPIC", "library.c", "-o", library, f"-Wl,-soname,{library}"]
        subprocess.run([*words, *versions], cwd=folder, check=True)


def _lines(*words: str) -> list[str]:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()


def _row(domain: str, kind: str, first: int, last: int, constraints: dict[str, list[str]]) -> list[Any]:
    """A kernel with the types that graphs of ours have; a last version of 0 is none."""
    types = {name: [each[7:-1] for each in all_types if each[7:-1] in OURS] for name, all_types in constraints.items()}
    return [domain, kind, first, last if last < 1 << 30 else 0, types]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        build_libraries(options.wheel, Path(folder))
        environment = os.environ | {"LD_LIBRARY_PATH": folder, "PYTHONPATH": str(options.wheel)}

        def run(code: str, *words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)

        for path in options.files:
            done = run(PLACE, str(path))
            placed = [line for line in done.stderr.splitlines() if "laced on [" in line]
            print(path, *(line.partition("] ")[2] for line in placed or done.stderr.splitlines()[-1:]))
        if options.output:
            (info,) = options.wheel.glob("onnxruntime_gpu-*.dist-info")
            names = set(json.loads(options.output.read_text())["operators"])
            rows = [_row(*row) for row in json.loads(run(LIST).stdout)]
            rows = [row for row in rows if row[1] in names and row[0] in ("", "com.microsoft") and all(row[4].values())]
            head = {
                "source": f"{info.name.removesuffix('.dist-info')}, {Path(__file__).name}",
                "operators": sorted(names),
            }
            lines = ",\n  ".join(json.dumps(row) for row in sorted(rows, key=str) if row[0] or not 0 < row[3] < 20)
            text = json.dumps(head, indent=1).removesuffix("\n}")
            options.output.write_text(f'{text},\n "kernels": [\n  {lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
