"""The results file, and what is known of the machine they come from."""

import json
import platform
import statistics
import subprocess
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from overtone.hardware import usable_cores

RESULTS = Path(__file__).parent / "results" / "latest.json"

_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")


@dataclass(frozen=True, slots=True)
class Result:
    """One figure."""

    value: float
    unit: str
    higher_is_better: bool
    detail: dict[str, Any] = field(default_factory=dict)
    """Every sample the figure was made from, and what was measured how."""


def middle(samples: list[float], digits: int = 4) -> float:
    """The median of `samples`, which one disturbed sample does not move."""
    return round(statistics.median(samples), digits)


def ratio(ours: list[float], theirs: list[float], **detail: Any) -> Result:
    """`ours` over `theirs`, sample by sample: each pair was measured one right after the other."""
    ratios = [round(a / b, 4) for a, b in zip(ours, theirs, strict=True)]
    return Result(middle(ratios), "ratio", True, {"samples": ratios, **detail})


def write(
    results: dict[str, Result],
    path: Path,
    *,
    model_version: str,
    quick: bool,
    rounds: int | None = None,
    unavailable: dict[str, str] | None = None,
) -> None:
    """Write `results` with the machine, the commit, and why something could not be measured, by its name."""
    content = {
        "machine": machine(),
        "commit": commit(),
        "model_version": model_version,
        "quick": quick,
        "rounds": rounds,
        "unavailable": unavailable or {},
        "results": {name: asdict(result) for name, result in results.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """The processor, its instruction sets that matter here, memory, and the versions that run the model."""
    return {
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "instructions": [name for name in _INSTRUCTIONS if name in _cpuinfo("flags").split()],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("onnxruntime", "tokenizers", "ray", "numpy")},
    }


def commit() -> str:
    """The commit of the working tree, with `+` if files differ from it; empty outside a repository."""
    root = Path(__file__).parent.parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=root, capture_output=True, check=False)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if changed.returncode else "")


def busy_share(seconds: float) -> float:
    """The share of the machine's cores that other programs use now, 0 to 1, looked at for `seconds`."""
    return float(psutil.cpu_percent(interval=seconds)) / 100


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
