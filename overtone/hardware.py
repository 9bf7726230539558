"""What this machine has that an engine can use. Looks at files of the kernel; loads no library."""

import os
from pathlib import Path

CPU_FEATURES = (
    "amx_int8",
    "amx_bf16",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "avx512f",
    "avx2",
    "i8mm",
    "asimddp",
)
"""Instruction sets that decide how fast int8 and bf16 are, in the kernel's names, the best of each family first."""

_FAST_INT8 = frozenset({"amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp"})
"""Each multiplies int8 and adds to int32 in one instruction."""

_FAST_BF16 = frozenset({"amx_bf16", "avx512_bf16"})
"""Each multiplies bf16 and adds to float32 in one instruction."""

_CPU_FILE = Path("/proc/cpuinfo")
_GPU_FILES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""Of NVIDIA's driver on Linux, and on Linux within Windows."""


def read_cpu_features(file: Path = _CPU_FILE) -> frozenset[str] | None:
    """Those of `CPU_FEATURES` that the processor has, or None where the system does not tell: all but Linux."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    # x86 says flags, ARM says Features; other architectures have neither, and no such instruction.
    words = next((line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "feat"))), [])
    return frozenset(CPU_FEATURES).intersection(words)


def has_fast_int8(features: frozenset[str] | None) -> bool | None:
    """Whether int8 models run at full speed; None if that is not known."""
    return None if features is None else bool(features & _FAST_INT8)


def has_fast_bf16(features: frozenset[str] | None) -> bool:
    """Whether bf16 is known to run faster than float32."""
    return bool(features and features & _FAST_BF16)


def usable_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_nvidia_driver() -> bool:
    """Whether a driver of NVIDIA's is loaded and reaches this process or container."""
    return any(file.exists() for file in _GPU_FILES)
