"""What is read of a machine, on trees of /proc and /sys as real ones have them, and on answers of real nvidia-smi's."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from cm_runtime.bench import conditions as watch_module
from cm_runtime.bench import nvidia
from cm_runtime.bench.conditions import Watch
from cm_runtime.bench.machine import PACKAGES, differences, free_bytes, machine
from cm_runtime.bench.nvidia import device_memory
from cm_runtime.bench.results import Gpu, Machine

pytestmark = pytest.mark.process  # processes of nvidia-smi and git

XEON = """\
processor	: {0}
vendor_id	: GenuineIntel
cpu family	: 6
model		: 143
model name	: Intel(R) Xeon(R) Platinum 8488C
stepping	: 8
cpu MHz		: {1}
physical id	: 0
flags		: fpu vme sse4_2 avx f16c hypervisor avx2 avx512f avx512_bf16 avx512_vnni amx_bf16 avx512_fp16 amx_tile
bogomips	: 4800.00

"""
GRAVITON = """\
processor	: {0}
BogoMIPS	: 243.75
Features	: fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimdrdm dcpop asimddp uscat ilrcpc
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x3
CPU part	: 0xd0c
CPU revision	: 1

"""
MEMINFO = "MemTotal:       16384 kB\nMemFree:         1000 kB\nMemAvailable:    8192 kB\n"

Write = Callable[[str, object], None]
Smi = Callable[[str], None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file below a root that starts empty."""

    def put(name: str, text: object) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    return put


@pytest.fixture(autouse=True)
def smi(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Smi:
    """Puts an nvidia-smi on the path that is this shell script; until then there is none."""
    folder = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("PATH", str(folder))

    def put(script: str) -> None:
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
        (folder / "nvidia-smi").chmod(0o755)

    return put


# The fingerprint


def test_an_x86_server(write: Write, tmp_path: Path) -> None:
    write("proc/cpuinfo", XEON.format(0, 2400) + XEON.format(1, 3801.5))
    write("proc/meminfo", MEMINFO)
    for core, (package, khz) in enumerate([(0, 3800000), (0, 3800000), (1, 2100000), (1, 2100000)]):
        folder = f"sys/devices/system/cpu/cpu{core}"
        write(f"{folder}/topology/physical_package_id", package)
        write(f"{folder}/cpufreq/scaling_governor", "performance" if core else "powersave")
        write(f"{folder}/cpufreq/scaling_max_freq", khz)
    write("sys/devices/system/cpu/cpufreq/boost", 1)
    found = machine(tmp_path)
    cpu = found.processor
    assert cpu.model == "Intel(R) Xeon(R) Platinum 8488C"
    assert " ".join(cpu.flags) == "avx avx2 f16c avx512f avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_bf16"
    assert (cpu.sockets, cpu.governor, cpu.asked_mhz) == (2, "performance, powersave", 3800)
    assert cpu.memory_bytes == 16 << 20
    assert found.is_virtual


def test_an_arm_server_has_numbers_for_a_name(write: Write, tmp_path: Path) -> None:
    write("proc/cpuinfo", GRAVITON.format(0) + GRAVITON.format(1))
    write("sys/devices/system/cpu/cpu0/topology/physical_package_id", -1)
    found = machine(tmp_path)
    assert found.processor.model == "implementer 0x41, part 0xd0c"
    assert found.processor.flags == ("asimd", "asimdhp", "asimddp")
    assert found.processor.sockets is None
    assert not found.is_virtual
    write("sys/class/dmi/id/product_name", "KVM Virtual Machine")
    assert machine(tmp_path).is_virtual


def test_two_kinds_of_cores_are_both_named(write: Write, tmp_path: Path) -> None:
    write("proc/cpuinfo", GRAVITON.format(0) + GRAVITON.format(1).replace("0xd0c", "0xd05"))
    assert machine(tmp_path).processor.model == "implementer 0x41, part 0xd0c; implementer 0x41, part 0xd05"


def test_what_is_not_told_is_none(tmp_path: Path) -> None:
    found = machine(tmp_path)
    cpu = found.processor
    assert (cpu.sockets, cpu.governor, cpu.asked_mhz, cpu.limit_cores) == (None,) * 4
    assert (cpu.flags, cpu.memory_bytes, found.gpus, found.is_virtual) == ((), 0, (), False)
    assert cpu.model
    assert free_bytes(tmp_path) == 0


def test_this_machine() -> None:
    found = machine()
    assert found.processor.cores == len(os.sched_getaffinity(0))
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert found.processor.memory_bytes == pytest.approx(pages, rel=1e-3)
    assert 0 < free_bytes() < pages
    assert (found.kernel, found.architecture) == (os.uname().release, os.uname().machine)
    assert found.python == platform.python_version()
    assert {"numpy", "onnxruntime"} <= found.packages.keys()
    installed = {each.name.replace("_", "-"): each.version for each in metadata.distributions()}
    assert found.packages == {name: installed[name] for name in PACKAGES if name in installed}
    assert Machine.model_validate_json(found.model_dump_json()) == found
    assert differences(found, machine()) == []


# Control groups


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/a/b", {"cpu.max": "max 100000", "a/cpu.max": "200000 50000", "a/b/cpu.max": "800000 100000"}, 4),
        ("0::/a/b", {"other/cpu.max": "100000 100000"}, None),
        (None, {"cpu.max": "250000 100000"}, 2.5),
        ("4:cpu,cpuacct:/docker/f00\n3:memory:/\n0::/", {"cpu/docker/f00/cpu.cfs_quota_us": "50000"}, 0.5),
        ("4:cpu,cpuacct:/\n0::/", {"cpu/cpu.cfs_quota_us": "-1"}, None),
        ("4:cpuset:/a", {"cpuset/a/cpu.cfs_quota_us": "50000"}, None),
    ],
)
def test_the_limit_of_a_container(
    write: Write, tmp_path: Path, groups: str | None, files: dict[str, str], cores: float | None
) -> None:
    if groups is not None:
        write("proc/self/cgroup", groups)
    for name, text in files.items():
        write(f"sys/fs/cgroup/{name}", text)
        if name.endswith("quota_us"):
            write(f"sys/fs/cgroup/{name.replace('quota', 'period')}", "100000")
    assert machine(tmp_path).processor.limit_cores == cores


def test_free_memory_is_within_the_limit_of_a_container(write: Write, tmp_path: Path) -> None:
    write("proc/meminfo", MEMINFO)
    assert free_bytes(tmp_path) == 8 << 20
    write("proc/self/cgroup", "0::/a")
    write("sys/fs/cgroup/a/memory.max", "max")
    assert free_bytes(tmp_path) == 8 << 20
    write("sys/fs/cgroup/a/memory.max", 4 << 20)
    assert free_bytes(tmp_path) == 4 << 20
    write("proc/self/cgroup", "4:memory:/b")
    write("sys/fs/cgroup/memory/b/memory.limit_in_bytes", 2 << 20)
    assert free_bytes(tmp_path) == 2 << 20


# nvidia-smi

H100 = "NVIDIA H100 80GB HBM3, GPU-6dc0, 570.86.15, 81559, 700.00, 1980, 1980"
GB10 = "NVIDIA GB10, GPU-1f2e, 580.95.05, [N/A], [N/A], [Not Supported], 3003"


def test_gpus(smi: Smi, tmp_path: Path) -> None:
    smi(f"echo '{H100}'\necho '{GB10}'")
    assert machine(tmp_path).gpus == (
        Gpu(
            name="NVIDIA H100 80GB HBM3",
            uuid="GPU-6dc0",
            driver="570.86.15",
            memory_bytes=81559 << 20,
            power_limit_w=700,
            asked_mhz=1980,
            max_mhz=1980,
        ),
        Gpu(name="NVIDIA GB10", uuid="GPU-1f2e", driver="580.95.05", memory_bytes=0, max_mhz=3003),
    )


def test_a_driver_without_a_field_still_tells_the_others(smi: Smi, tmp_path: Path) -> None:
    smi(
        "case $1 in *applications*) echo 'Field \"clocks.applications.graphics\" is not a valid field'; exit 2;; esac\n"
        "echo 'NVIDIA A10G, GPU-77, 610.3, 23028'"
    )
    (gpu,) = machine(tmp_path).gpus
    assert (gpu.name, gpu.memory_bytes, gpu.asked_mhz) == ("NVIDIA A10G", 23028 << 20, None)


@pytest.mark.parametrize(
    "script",
    [
        "echo 'No devices were found'",
        "echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9",
        f"echo '{H100}'; exit 15",
        "sleep 60",
        "kill -9 $$",
    ],
)
def test_an_nvidia_smi_that_fails_or_hangs_is_none(
    smi: Smi, tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia, "PATIENCE", 0.3)
    smi(script)
    began = time.monotonic()
    assert machine(tmp_path).gpus == ()
    assert device_memory([1]) is None
    with Watch(tmp_path) as watch:
        watch.look()
    assert (watch.conditions.gpu_mhz, watch.conditions.gpu_throttled) == (None, ())
    assert time.monotonic() - began < 10


def test_device_memory_is_that_of_the_processes(smi: Smi) -> None:
    smi("echo '4711, 512'\necho '4712, 1024'\necho '99, 4096'\necho '4713, [N/A]'")
    assert device_memory([4711, 4712, 4713, 5]) == 1536 << 20
    assert device_memory(iter([99])) == 4 << 30
    assert device_memory([4713]) is None
    assert device_memory([5]) is None


def test_without_nvidia_smi_there_is_no_device_memory() -> None:
    assert device_memory([os.getpid()]) is None


# Differences


@pytest.fixture
def known(smi: Smi, write: Write, tmp_path: Path) -> Machine:
    smi(f"echo '{H100}'")
    write("proc/cpuinfo", XEON.format(0, 2400))
    write("proc/meminfo", MEMINFO)
    return machine(tmp_path)


def test_a_line_for_each_difference(known: Machine) -> None:
    cpu, (gpu,) = known.processor, known.gpus
    slower = cpu.model_copy(update={"model": "AMD EPYC 9R14", "governor": "powersave", "flags": cpu.flags[:2]})
    other = known.model_copy(
        update={
            "processor": slower,
            "gpus": (gpu.model_copy(update={"driver": "610.3", "power_limit_w": 350.0}),),
            "is_virtual": False,
            "packages": {**known.packages, "onnxruntime": "1.31.0", "tensorrt": "11.0"},
        }
    )
    ort = metadata.version("onnxruntime")
    assert differences(known, other) == [
        "processor: Intel(R) Xeon(R) Platinum 8488C and AMD EPYC 9R14",
        f"processor flags: {' '.join(cpu.flags)} and {' '.join(cpu.flags[:2])}",
        "clock governor: none and powersave",
        "virtual machine: yes and no",
        "GPU 0 driver: 570.86.15 and 610.3",
        "GPU 0 power limit in W: 700 and 350",
        f"onnxruntime: {ort} and 1.31.0",
        "tensorrt: none and 11.0",
    ]


def test_every_field_but_serial_numbers_counts(known: Machine) -> None:
    """A change of any other field of a machine, its processor or its GPU is a line."""
    changed = {str: "other", int: 12345, float: 0.125, bool: False, tuple: ("sve",), type(None): 7}
    for part in (known, known.processor, known.gpus[0]):
        for name, value in part:
            if name in ("processor", "gpus", "packages", "uuid"):
                continue
            new = part.model_copy(update={name: changed[type(value)]})
            other = {Machine: new, Gpu: known.model_copy(update={"gpus": (new,)})}.get(
                type(part), known.model_copy(update={"processor": new})
            )
            assert len(differences(known, other)) == 1, name
    serial = known.gpus[0].model_copy(update={"uuid": "GPU-2"})
    assert differences(known, known.model_copy(update={"gpus": (serial,)})) == []


def test_memory_within_two_percent_is_the_same(known: Machine) -> None:
    def having(memory: int) -> Machine:
        return known.model_copy(update={"processor": known.processor.model_copy(update={"memory_bytes": memory})})

    assert differences(having(1000 << 30), having(981 << 30)) == []
    assert differences(having(64 << 30), having(32 << 30)) == ["memory: 64.0 GiB and 32.0 GiB"]
    assert differences(having(0), having(32 << 30)) != []


def test_another_number_of_gpus(known: Machine) -> None:
    lines = differences(known.model_copy(update={"gpus": ()}), known)
    assert lines[0] == "GPUs: none and NVIDIA H100 80GB HBM3"
    twice = known.model_copy(update={"gpus": known.gpus * 2})
    assert "GPUs: NVIDIA H100 80GB HBM3 and NVIDIA H100 80GB HBM3, NVIDIA H100 80GB HBM3" in differences(known, twice)


# The watch


def process(write: Write, pid: int, parent: int, user: int, waited: int = 0) -> None:
    """A line of /proc/PID/stat; the name of a process may hold anything."""
    write(f"proc/{pid}/stat", f"{pid} (a b) R 1) S {parent} 1 1 0 -1 0 0 0 0 0 {user} 1 {waited} 0 20 0 1 0 100 0 0")


def test_shares_of_the_processors_time(write: Write, tmp_path: Path) -> None:
    """1000 ticks: 600 busy, of which 3 processes of ours have 450, 100 stolen, 300 idle."""
    write("proc/stat", "cpu  1000 20 300 4000 50 6 7 80 3 0\ncpu0 1 1 1 1 1 1 1 1 0 0")
    process(write, 100, 1, user=10, waited=5)
    process(write, 101, 100, user=20)
    process(write, 7, 1, user=900)
    with Watch(tmp_path, pid=100) as watch:
        write("proc/stat", "cpu  1500 30 360 4250 100 16 27 180 3 0\ncpu0 1 1 1 1 1 1 1 1 0 0")
        process(write, 100, 1, user=110, waited=105)
        process(write, 101, 100, user=120)
        process(write, 102, 101, user=149)
        process(write, 7, 1, user=9000)
    assert watch.conditions.stolen == pytest.approx(0.1)
    assert watch.conditions.others == pytest.approx(0.15)


def test_what_children_use_is_not_taken_for_that_of_others() -> None:
    """On this machine: of one that has ended and one that still runs; to an idle stranger, both are others."""
    burn = "import time\nwhile time.process_time() < 0.5: pass\n"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", "input()"], **pipes) as idle:
        ours, stranger = Watch(), Watch(pid=idle.pid)
        subprocess.run([sys.executable, "-c", burn], check=True)
        with subprocess.Popen([sys.executable, "-c", f"{burn}print(flush=True); input()"], **pipes) as child:
            assert child.stdout is not None
            child.stdout.readline()
            seen, by_stranger = ours.stop(), stranger.stop()
            child.communicate(b"\n")
        idle.communicate(b"\n")
    assert seen.others is not None
    assert by_stranger.others is not None
    total = seen.seconds * (os.cpu_count() or 1)
    assert 0.7 < (by_stranger.others - seen.others) * total < 2


def test_without_a_process_of_that_number_nothing_is_said_of_others() -> None:
    watch = Watch(pid=2**22 + 1)
    time.sleep(0.05)
    seen = watch.stop()
    assert seen.stolen is not None
    assert seen.others is None


def test_clocks_are_those_of_the_looks(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("proc/cpuinfo", XEON.format(0, 2400.25) + XEON.format(1, 3801.5))
    with Watch(tmp_path) as watch:
        pass
    assert watch.conditions.mhz is None
    with watch:
        watch.look()
        write("proc/cpuinfo", XEON.format(0, 800))
        watch.look()  # too soon
    assert watch.conditions.mhz == (2400.25, 3801.5)
    monkeypatch.setattr(watch_module, "BETWEEN_LOOKS", 0.0)
    with watch:
        watch.look()
        write("sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", 3100000)
        write("sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq", "<unknown>")
        watch.look()
    assert watch.conditions.mhz == (800, 3100)


def test_threads_of_one_core_report_its_throttling_once(write: Write, tmp_path: Path) -> None:
    def throttle(counts: dict[str, tuple[int, int, int, int]]) -> None:
        for cpu, (package, core, core_count, package_count) in counts.items():
            folder = f"sys/devices/system/cpu/{cpu}"
            write(f"{folder}/topology/physical_package_id", package)
            write(f"{folder}/topology/core_id", core)
            write(f"{folder}/thermal_throttle/core_throttle_count", core_count)
            write(f"{folder}/thermal_throttle/package_throttle_count", package_count)
            write(f"{folder}/thermal_throttle/core_throttle_total_time_ms", 12345 * core_count)

    throttle({"cpu0": (0, 0, 5, 9), "cpu1": (0, 0, 5, 9), "cpu2": (0, 1, 2, 9), "cpu3": (1, 0, 0, 4)})
    with Watch(tmp_path) as watch:
        pass
    assert watch.conditions.throttled == 0
    with watch:
        throttle({"cpu0": (0, 0, 7, 10), "cpu1": (0, 0, 7, 10), "cpu2": (0, 1, 3, 10), "cpu3": (1, 0, 0, 4)})
    assert watch.conditions.throttled == 2 + 1 + 1


def test_gpus_at_the_looks(smi: Smi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "BETWEEN_LOOKS", 0.0)
    with Watch(tmp_path) as watch:
        smi("echo '345, 31, 0x0000000000000001'\necho '1980, 60, 0x0000000000000002'")
        watch.look()
        smi("echo '1755, 83, 0x0000000000000024'\necho '[N/A], [N/A], [N/A]'")
        watch.look()
        smi("echo '1200, 90, 0x0000000000000248'")
        watch.look()
    seen = watch.conditions
    assert (seen.gpu_mhz, seen.gpu_celsius) == ((345, 1980), (31, 90))
    assert seen.gpu_throttled == ("0x200", "hw_slowdown", "hw_thermal_slowdown", "sw_power_cap", "sw_thermal_slowdown")
    with watch:
        smi("echo '1980, 50, 0x0000000000000000'")
        watch.look()
    assert watch.conditions.gpu_throttled == ()


def test_an_older_driver_has_another_name_for_the_reasons(
    smi: Smi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "BETWEEN_LOOKS", 0.0)
    asked = tmp_path / "asked"
    smi(
        f"echo $1 >> {asked}\ncase $1 in *clocks_event_reasons*) echo 'not a valid field to query.'; exit 2;; esac\n"
        "echo '1410, 55, 0x0000000000000004'"
    )
    with Watch(tmp_path) as watch:
        watch.look()
        watch.look()
    assert watch.conditions.gpu_throttled == ("sw_power_cap",)
    assert ["event" in line for line in asked.read_text().splitlines()] == [True, False, False]


def test_this_machine_is_watched() -> None:
    with Watch() as watch:
        watch.look()
        time.sleep(0.3)
    seen = watch.conditions
    assert 0.3 <= seen.seconds < 30
    assert seen.stolen is not None
    assert seen.others is not None
    assert 0 <= seen.stolen + seen.others <= 1
    assert seen.mhz is None or 100 < seen.mhz[0] <= seen.mhz[1] < 10_000
