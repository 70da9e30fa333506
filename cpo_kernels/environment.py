"""Hardware, versions, date and commit that a result was measured with, for the files of `check` and `bench`."""

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# Variables by which a user chooses the instructions of the kernels, of oneDNN (two names) and of torch.
LIMITS = ("CPO_KERNELS_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


def installed(package: str) -> str:
    """The installed version of a package; '' if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def chosen_device(text: str) -> torch.device:
    """The device that `--device` names. Raises ValueError if torch has no such device here."""
    name, _, index = text.partition(":")
    if name not in ("cpu", "cuda") or not (index.isdecimal() or text == name):
        raise ValueError(f"--device {text!r}: give cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if name == "cuda" else 1
    if not count:
        raise ValueError(f"--device {text}: torch sees no GPU here, use --device cpu")
    if int(index or 0) >= count:
        raise ValueError(f"--device {text}: this machine has {count}, numbered from 0")
    return torch.device(text)


def check_options(out: Path | None, **numbers: float | None) -> None:
    """Raise ValueError for a given number that is not positive, IsADirectoryError if `out` is a folder. Makes the
    parent folder of `out`."""
    for name, value in numbers.items():
        if value is not None and not value > 0:
            unit = " of seconds" if name.endswith("limit") else ""
            raise ValueError(f"--{name.replace('_', '-')} {value:g}: give a positive number{unit}")
    if out is not None:
        if out.is_dir():
            raise IsADirectoryError(f"--out {out} is a folder: name a file in it")
        out.parent.mkdir(parents=True, exist_ok=True)


def output_of(*command: str, cwd: Path | None = None) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=cwd).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def commit() -> str:
    """Short hash where the package runs from its repository, with + where files differ from it; else ''."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no", cwd=root)
    return output_of("git", "rev-parse", "--short", "HEAD", cwd=root) + ("+" if changed else "")


def of_cpu(name: str) -> str:
    """A line of /proc/cpuinfo; '' where there is none."""
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":")[1].strip() for line in info if line.startswith(name))
    except (OSError, StopIteration):
        return ""


def gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "processors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", 0),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[:1],
    }


def describe(device: torch.device, packages: Sequence[str] = (), threads: int | None = None) -> dict[str, Any]:
    names = ("torch", "triton", "cpo-kernels", *packages)
    described = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit() or "unknown",
        "device": device.type,
        "cpu": of_cpu("model name") or platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_amx": "amx_bf16" in of_cpu("flags").split(),
        "threads": threads or torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda or "",
        "versions": {name: installed(name) or "not installed" for name in names},
    }
    limits = {name: os.environ[name] for name in LIMITS if os.environ.get(name)}
    described |= {"cpu_limits": limits} if limits else {}
    return described | (gpu(device) if device.type == "cuda" else {})


def differing(a: dict[str, Any], b: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Those of `names` that differ between two of `describe`. Older files lack some that are false."""
    return [name for name in names if (a.get(name) or None) != (b.get(name) or None)]


def processor(described: dict[str, Any]) -> str:
    """The CPU of `describe`, with the vector instructions that torch uses: CPUs of one name may differ in them."""
    count, limits = described["threads"], described.get("cpu_limits", {})
    used = [described["cpu_capability"], *(["AMX"] if described.get("cpu_amx") else [])]
    used += [f"{name}={value}" for name, value in limits.items()]
    return f"{described['cpu']} ({', '.join(used)}), {count} thread{'s' * (count != 1)}"
