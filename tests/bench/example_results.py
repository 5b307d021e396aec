"""Results made by hand: every case that a report must show."""

from __future__ import annotations

from typing import Any

from cm_runtime.bench import results as r

HOSTILE = "<script>alert(1)</script>|$\\frac{1}$ \u202e\n# x"


def estimate(value: float, width: float = 0.01) -> r.Estimate:
    return r.Estimate(value=value, low=value * (1 - width), high=value * (1 + width))


def latency(p50: float, *, tails: bool = True, **changes: Any) -> r.Latency:
    more = {"p90": estimate(p50 * 1.1), "p95": estimate(p50 * 1.2)} if tails else {}
    return r.Latency(**({"samples": 240, "blocks": 12, "p50": estimate(p50)} | more | changes))


def side(name: str = r.SUBJECT, **changes: Any) -> r.Contender:
    fields: dict[str, Any] = {"name": name, "status": "measured", "version": "0.1.0"}
    fields["role"] = {r.SUBJECT: "subject", r.BASE: "base"}.get(name, "peer")
    return r.Contender(**(fields | changes))


def subject(p50: float, batch: int, **changes: Any) -> r.Contender:
    fields: dict[str, Any] = {
        "latency": latency(p50),
        "images_per_s": estimate(1000 * batch / p50),
        "cold_start_s": (1.82, 1.79, 1.9),
        "load_s": 0.0815,
        "peak_host_bytes": 212_345_678,
        "outside_network": 0.031,
        "gflop_per_s": 84.2,
        "peak_fraction": 0.412,
        "agreement": r.Agreement(against="diffusers", max_abs=1.3e-6, grey_levels=0),
        "block_ms": (p50, p50 * 1.001),
        "warmup": 12,
    }
    return side(**(fields | changes))


def peer(name: str, p50: float, ratio: float, **changes: Any) -> r.Contender:
    fields: dict[str, Any] = {
        "latency": latency(p50),
        "images_per_s": estimate(1000 / p50),
        "time_ratio": estimate(ratio, 0.03),
        "agreement": r.Agreement(against=r.SUBJECT, max_abs=1.3e-6, grey_levels=0),
        "version": "0.35.1",
    }
    return side(name, **(fields | changes))


def facts(**changes: Any) -> r.ModelFacts:
    fields: dict[str, Any] = {"path": "model.onnx", "sha256": "ab" * 32, "image_shape": (1, 28, 28), "bytes": 8_700_000}
    fields |= {"num_classes": 10, "precision": "fp32", "export_parity": 2.5e-6, "gflop": 0.2134}
    return r.ModelFacts(**(fields | changes))


def scenario(steps: int, batch: int, *contenders: r.Contender, **changes: Any) -> r.ScenarioResult:
    fields: dict[str, Any] = {"model": "default", "kind": "single-stream", "backend": "auto", "device": "cpu"}
    fields |= {"threads": 2, "status": "measured", "engine": "onnxruntime 1.32.0", "facts": facts()}
    fields |= changes
    fields.setdefault("name", f"{fields['model']} {fields['kind']} {steps}x{batch}")
    return r.ScenarioResult(steps=steps, batch=batch, sigmas=(80.0, 1.12)[:steps], contenders=contenders, **fields)


def result(*scenarios: r.ScenarioResult, **changes: Any) -> r.Result:
    processor = r.Processor(
        model="AMD EPYC 9B14", cores=2, sockets=1, flags=("avx2", "avx512f"), memory_bytes=8_200_000_000
    )
    machine = r.Machine(
        processor=processor,
        kernel="6.1.0",
        architecture="x86_64",
        libc="glibc 2.36",
        is_virtual=True,
        python="3.12.3",
        packages={"onnxruntime": "1.32.0", "numpy": "2.3.0"},
    )
    conditions = r.Conditions(seconds=312.4, mhz=(2800.0, 3700.0), throttled=0, stolen=0.001, others=0.004)
    peaks = r.Peaks(
        threads=2,
        device="cpu",
        matrix_gflop_per_s=estimate(204.4),
        copy_gb_per_s=estimate(21.2),
        library="numpy OpenBLAS",
        drift=0.011,
    )
    fields: dict[str, Any] = {
        "tool": "cm-runtime 0.1.0",
        "commit": "0123456789abcdef",
        "created": "2025-11-25T19:00:00Z",
        "command": "cm-runtime bench run --suite default",
        "complete": True,
        "settings": r.Settings(budget_s=10, interval=0.01, quick=False, seed=0),
        "machine": machine,
        "conditions": conditions,
        "peaks": (peaks,),
        "samples": r.Samples(file="result.samples", bytes=123_456, sha256="cd" * 32),
        "scenarios": scenarios,
    }
    return r.Result(**(fields | changes))


def server(**changes: Any) -> r.ScenarioResult:
    """At 20 requests a second, bound not kept, p99 unbounded."""
    served = r.ServerResult(rate=19.7, bound_ms=30.0, met=False, mean_batch=1.43)
    return scenario(2, 64, side(latency=latency(21.5), served=served, load_s=0.08), kind="server", **changes)


def full() -> r.Result:
    """One model, three batches and two step counts, peers measured, absent and failed, offline and server."""
    found = []
    for steps in (1, 2):
        for batch in (1, 8, 64):
            p50 = 3.21 * steps * batch**0.8
            torch = peer("torch", p50 * 1.3, 1.3 if batch < 64 else 0.93)
            diffusers = peer("diffusers", p50 * 2.17, 2.17)
            gone = side("torch.compile", status="absent", reason="there is no C++ compiler", version="")
            wrong = side("onnx", status="failed", reason="images differ by 0.3, over 0.001", version="1.18.0")
            found.append(scenario(steps, batch, subject(p50, batch), torch, diffusers, gone, wrong))
    found.append(scenario(2, 256, subject(900.0, 256, latency=latency(900.0, tails=False)), kind="offline"))
    found.append(server())
    return result(*found)


def awkward() -> r.Result:
    """Two models, one of them hostile by name; a GPU; no intervals; failures; stopped half way on a noisy machine."""
    bare = r.Latency(samples=3, blocks=1, p50=r.Estimate(value=41.5))
    little = side(latency=bare, images_per_s=r.Estimate(value=24.1), stable=False)
    device = subject(1.25, 1, device_latency=latency(1.1), peak_device_bytes=1_234_000_000)
    old = peer(r.BASE, 1.3, 1.04, commit="fedcba9876543210")
    gpu = {"device": "cuda:0", "engine": "torch 2.13.0", "backend": "torch"}
    differing = side(status="failed", reason="parity: images differ by 0.21 | " + HOSTILE)
    found = (
        scenario(1, 1, little, model=HOSTILE, facts=None),
        scenario(1, 1, device, old, **gpu),
        scenario(2, 1, subject(2.5, 1, peak_fraction=None), peer(HOSTILE, 2.1, 0.84), **gpu),
        scenario(4, 8, status="failed", reason="out of memory: " + HOSTILE, name=HOSTILE),
        scenario(2, 8, differing, peer("torch", 5.0, 2.0, time_ratio=None)),
    )
    plain = result()
    card = r.Gpu(name="NVIDIA H100 80GB HBM3", driver="570.1", memory_bytes=85_000_000_000, power_limit_w=700.0)
    noisy = r.Conditions(seconds=60, throttled=3, stolen=0.12, others=0.2, gpu_throttled=("SwPowerCap", HOSTILE))
    return plain.model_copy(
        update={
            "scenarios": found,
            "machine": plain.machine.model_copy(update={"gpus": (card,)}),
            "complete": False,
            "conditions": noisy,
            "left_out": ("default offline 2x256", HOSTILE),
            "settings": r.Settings(budget_s=2, interval=0.01, quick=True, seed=0),
        }
    )


def evaluated(steps: int, distance: float, **images: Any) -> dict[str, Any]:
    """What `cm-runtime eval -o` writes."""
    described = {"kind": "model", "path": "/m/model.onnx", "sha256": "ab" * 32, "sampler": "multistep", "seed": 1}
    described |= {"sigmas": [80.0, 1.1, 0.6, 0.3][:steps], "count": 10_000} | images
    return {
        "cm_runtime": "0.1.0",
        "images": described,
        "reference": {
            "kind": "statistics",
            "path": "/m/fashion-mnist-statistics.npz",
            "sha256": "ef" * 32,
            "count": 60000,
        },
        "extractor": {"path": "/m/classifier.onnx", "sha256": "12" * 32, "resize": "none"},
        "figures": {
            "count": 10_000,
            "frechet_distance": distance,
            "precision": None,
            "recall": None,
            "neighbours": 3,
            "manifold": None,
            "class_agreement": 0.92,
        },
    }
