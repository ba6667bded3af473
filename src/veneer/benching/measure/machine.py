"""Describes the machine of a run: the facts that figures depend on, and none that identifies it."""

from __future__ import annotations

import os
import platform
import re
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from veneer._version import __version__
from veneer.benching.result import Machine
from veneer.errors import UsageError

_PACKAGES = ("torch", "transformers", "safetensors")


def machine(device: torch.device) -> Machine:
    """Describe this machine."""
    return Machine(
        cpu=_cpu(),
        cores=_cores(),
        threads=torch.get_num_threads(),
        memory=memory(torch.device("cpu")),
        accelerator=_accelerator(device),
        system=f"{platform.system()} {platform.machine()}",
        versions={"python": platform.python_version(), "veneer": __version__, **_versions()},
    )


def device_of(name: str | None) -> torch.device:
    """Return the device of that name, after a test that it works; the CPU when ``None``.

    Raises:
        UsageError: there is no such device, or it cannot be used.
    """
    try:
        device = torch.device(name or "cpu")
        torch.zeros(1, device=device) + 1
    except Exception as error:  # each backend has its own
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise UsageError(
            f"The device {name!r} cannot be used: {reason}.", hint="Give another, such as cpu or cuda:0."
        ) from error
    if device.type == "meta":
        raise UsageError("The device 'meta' computes nothing.", hint="Give another, such as cpu or cuda:0.")
    return device


def memory(device: torch.device) -> int:
    """Return the device's memory in bytes; the machine's for the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process held, of the device or the machine, since its start or `forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage: a child's begins with its parent's.
    status = Path("/proc/self/status")
    if status.is_file():
        peak = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
        return 1024 * int(peak[1]) if peak else 0
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak(device: torch.device) -> None:
    """Reset the peak memory where the system can; elsewhere it stays that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the number that proc(5) gives for VmHWM


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return name[1].strip() if name else platform.processor() or platform.machine()


def _cores() -> int:
    """Count the physical cores that this process may use; its threads where the system does not tell the cores."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = set()
    for index in usable:
        file = Path(f"/sys/devices/system/cpu/cpu{index}/topology/thread_siblings_list")
        siblings.add(file.read_text().strip() if file.is_file() else str(index))
    return len(siblings)


def _accelerator(device: torch.device) -> str | None:
    if device.type == "cpu":
        return None
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {memory(device) / 1e9:.0f} GB"
    return device.type


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
