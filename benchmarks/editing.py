r"""Zero-shot editing of real images: the README's strips, and figures over a test set.

    python benchmarks/editing.py --data fashion-mnist --count 2000          # figures of the bundled model
    python benchmarks/editing.py --strips benchmarks/results/editing --data tests/data/fashion-mnist --count 0
    python benchmarks/editing.py --strips benchmarks/results/editing --colours cifar-10 --count 0

Figures, means over test images that the model never saw, with their labels: the PSNR of noisy images (sigma 0.3) before
and after denoising, sigma given and estimated; of enlarged images, beside the patches' means and Pillow's bicubic; of a
hole's pixels. And how far the answers are from what is known, and how many of their numbers are clipped.

Strips are made by `cm-runtime edit` from pictures that are written beside them. --colours: an analytic model of colour
images, Gaussian with the mean and the covariance of CIFAR-10's training images, whose consistency function is exact,

    f(x, t) = m + U sqrt((v + eps^2) / (v + t^2)) U' (x - m),    covariance U v U',

colours test images and enlarges 4x4 pixels to 32x32.

Exit status: 0 done, and denoising gained 3 dB or more; 1 it did not, or a one-line error; 2 usage.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

import cm_runtime as cm
from cm_runtime import editing
from cm_runtime.errors import CmRuntimeError, DataError
from cm_runtime.files import image_writer
from cm_runtime.manifest import Manifest
from cm_runtime.sampling import to_uint8
from cm_runtime.training.data import open_data

Array = NDArray[Any]
SIGMA = 0.3
GAIN = 3.0  # dB, that denoising must gain
SHOWN = {"coat": 4, "boot": 9, "trousers": 1}  # label; the first of each in the test images
STRIPS = {
    "inpaint": ["coat.png", "trousers.png", "boot.png", "--labels", "4,1,9", "--box", "8,10,12,12", "--answers", "5"],
    "superres-2": ["coat.png", "trousers.png", "boot.png", "--labels", "4,1,9", "--factor", "2", "--answers", "5"],
    "superres-4": ["coat.png", "trousers.png", "boot.png", "--labels", "4,1,9", "--factor", "4", "--answers", "5"],
    "stroke": ["painting.png", "--labels", "4", "--sigma", "2", "--answers", "6"],
    "denoise": ["noisy.npz", "--sigma", "0.3"],
    "interpolate": ["--from", "3", "--to", "11", "--labels", "7", "--frames", "9"],
}


def psnr(images: Array, reference: Array) -> float:
    """The mean over images of the PSNR in dB; (N,H,W,C) in units of [-1, 1]."""
    error = np.mean((np.clip(images, -1, 1) - reference) ** 2, axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(4 / error)))


def figures(model: Any, y: Array, labels: list[int]) -> dict[str, Any]:
    """All figures; y: (N,H,W,C) float32 in [-1, 1]."""
    rng = np.random.default_rng(0)
    noisy = y + np.float32(SIGMA) * rng.standard_normal(y.shape).astype(np.float32)
    how: Any = {"label": labels, "output": "float32"}
    results: dict[str, Any] = {"images": len(y), "sigma": SIGMA, "noisy": psnr(noisy, y)}
    results["denoised"] = psnr(editing.denoise(model, noisy, SIGMA, **how), y)
    results["denoised, estimated"] = psnr(editing.denoise(model, noisy, **how), y)
    size = y.shape[1:3]
    for factor in (2, 4):
        small = np.moveaxis(editing.patch_means(np.moveaxis(y, -1, 1), factor), 1, -1)
        large = editing.superres(model, small, factor, **how)
        means = np.moveaxis(editing.patch_means(np.moveaxis(large, -1, 1).copy(), factor), 1, -1)
        results[f"superres {factor}"] = {
            "means": psnr(small.repeat(factor, 1).repeat(factor, 2), y),
            "bicubic": psnr(np.stack([bicubic(each, size) for each in small]), y),
            "ours": psnr(large, y),
            "apart from the means": float(np.abs(means - small).max()),
            "clipped": editing.count_clipped(large) / large.size,
        }
    hole = np.zeros(size, bool)
    hole[size[0] * 2 // 7 : size[0] * 5 // 7, size[1] * 2 // 7 : size[1] * 5 // 7] = True
    whole = editing.inpaint(model, y, hole, **how)
    results["inpaint"] = {
        "hole": float(np.mean(10 * np.log10(4 / np.mean((whole[:, hole] - y[:, hole]) ** 2, axis=(1, 2))))),
        "apart outside": float(np.abs(whole[:, ~hole] - y[:, ~hole]).max()),
    }
    return results


def bicubic(small: Array, size: tuple[int, int]) -> Array:
    """(h,w,C) -> (H,W,C), each channel by Pillow in float."""
    channels = [
        Image.fromarray(small[..., c]).resize(size[::-1], Image.Resampling.BICUBIC) for c in range(small.shape[-1])
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)


def write_inputs(data: Any, folder: Path) -> None:
    """The pictures that the README's commands edit."""
    for name, label in SHOWN.items():
        n = int(np.flatnonzero(data.labels == label)[0])
        image_writer.save_png(
            np.moveaxis(data.images[n], 0, -1), folder / f"{name}.png", {"from": f"{data.name}, test image {n}"}
        )
    painting = Image.new("L", (28, 28), 0)
    draw = ImageDraw.Draw(painting)
    draw.polygon(
        [(8, 2), (20, 2), (25, 8), (27, 24), (22, 25), (20, 13), (20, 27), (8, 27), (8, 13), (6, 25), (1, 24), (3, 8)],
        fill=150,
    )
    draw.line([(14, 2), (14, 27)], fill=60)
    image_writer.save_png(np.asarray(painting)[..., None], folder / "painting.png", {"from": "benchmarks/editing.py"})
    clean = np.moveaxis(data.images[:6], 1, -1) / np.float32(127.5) - 1
    noise = np.random.default_rng(0).standard_normal(clean.shape).astype(np.float32)
    np.savez(folder / "noisy.npz", arr_0=clean + np.float32(SIGMA) * noise, arr_1=data.labels[:6])


class GaussianColours:
    """The analytic model of images with a mean and a covariance; see the module."""

    micro_batch = 64

    def __init__(self, data: Array) -> None:
        flat = data.reshape(len(data), -1)
        self.mean = flat.mean(axis=0, dtype=np.float64)
        variances, self.U = np.linalg.eigh(np.cov(flat, rowvar=False))
        self.v = np.maximum(variances, 0)
        shape = data.shape[1:]
        self.manifest = Manifest(
            graph="denoiser", image_shape=shape, num_classes=0, precond="boundary", sigma_boundary=0.002
        )

    def denoise(self, x: Array, sigma: Any, label: Array | None = None) -> Array:
        """f; see `sampling.Denoiser`."""
        eps = self.manifest.sigma_min
        gain = np.sqrt((self.v + eps**2) / (self.v + float(sigma) ** 2))
        coordinates = (x.reshape(len(x), -1) - self.mean) @ self.U
        x0: Array = (self.mean + (coordinates * gain) @ self.U.T).reshape(x.shape).astype(np.float32)
        return x0


def colours(source: str, folder: Path) -> dict[str, float]:
    """Strips of colorize and superres 8 by the analytic model, and their PSNR over 200 test images."""
    train = open_data(source).images
    model = GaussianColours(train / np.float32(127.5) - 1)
    test = np.moveaxis(open_data(source, split="test").images[:200], 1, -1)
    y = (test / np.float32(127.5) - 1).astype(np.float32)
    grey = np.repeat(np.moveaxis(editing.luminance(np.moveaxis(y, -1, 1)), 1, -1), 3, axis=-1)
    small = np.moveaxis(editing.patch_means(np.moveaxis(y, -1, 1).copy(), 8), 1, -1)
    large = small.repeat(8, 1).repeat(8, 2)
    values: dict[str, float] = {}
    for name, source_images, answers in (
        ("colorize", grey, editing.colorize(model, grey, answers=3, output="float32")),
        ("superres-8", large, editing.superres(model, small, 8, answers=3, output="float32")),
    ):
        values |= {f"{name}: given": psnr(source_images, y), f"{name}: answers": psnr(answers[::3], y)}
        rows = np.concatenate([y[:6, None], source_images[:6, None], answers.reshape(200, 3, *y.shape[1:])[:6]], axis=1)
        pixels = to_uint8(np.moveaxis(rows.reshape(-1, *y.shape[1:]), -1, 1))
        image_writer.save_png(
            image_writer.grid(pixels, 5), folder / f"{name}.png", {"model": "Gaussian, CIFAR-10's mean and covariance"}
        )
    return values


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist", help="of the bundled model's kind")
    parser.add_argument("--count", type=int, default=1000, help="test images to measure")
    parser.add_argument("--strips", type=Path, help="a folder for inputs and strips")
    parser.add_argument("--colours", help="CIFAR-10, for the analytic model; needs --strips")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    content: dict[str, Any] = {}
    is_good = True
    try:
        if options.count:
            data = open_data(options.data, split="test")
            y = (np.moveaxis(data.images[: options.count], 1, -1) / np.float32(127.5) - 1).astype(np.float32)
            if data.labels is None:
                raise DataError(f"{options.data} has no labels")
            content = figures(cm.load(), y, data.labels[: options.count].tolist())
            is_good = content["denoised"] - content["noisy"] >= GAIN
        if options.strips:
            options.strips.mkdir(parents=True, exist_ok=True)
            if options.colours:
                content |= colours(options.colours, options.strips)
            else:
                write_inputs(open_data(options.data, split="test"), options.strips)
                for name, words in STRIPS.items():
                    edit = [sys.executable, "-m", "cm_runtime", "edit", name.partition("-")[0]]
                    subprocess.run([*edit, *words, "-o", f"{name}.png"], cwd=options.strips, check=True)
    except CmRuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(content, indent=1))
    if options.json:
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
