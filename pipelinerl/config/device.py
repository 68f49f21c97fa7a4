"""Which devices this machine has, found without importing torch."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

from pipelinerl.config.schema import RunConfig

Device = Literal["cpu", "cuda"]


def gpu_count() -> int:
    """GPUs this process may use: those the driver lists, as far as `CUDA_VISIBLE_DEVICES` lets them through."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return _installed_gpus()
    # An entry that names no device ends the list, as it does in CUDA.
    entries = [entry.strip() for entry in visible.split(",")]
    usable = next((i for i, entry in enumerate(entries) if entry in ("", "-1")), len(entries))
    return min(usable, _installed_gpus()) if usable else 0


def resolve_device(config: RunConfig, gpus: int | None = None) -> Device:
    """`cluster.device` with `auto` decided: cuda when there is a GPU. `gpus` defaults to `gpu_count()`.

    Of a cluster that is joined (`cluster.address` is not `local`) this sees the machine it runs on only.
    """
    if config.cluster.device != "auto":
        return config.cluster.device
    return "cuda" if (gpu_count() if gpus is None else gpus) else "cpu"


def resolve_backend(config: RunConfig, device: Device, shares_gpu: bool = False) -> Literal["gloo", "nccl", "ipc"]:
    """`weights.backend` with `auto` decided: gloo on CPU, nccl between GPUs, ipc where trainer and engine share one."""
    if config.weights.backend != "auto":
        return config.weights.backend
    if device == "cpu":
        return "gloo"
    return "ipc" if shares_gpu else "nccl"


def gpu_memory() -> int | None:
    """Bytes of the smallest GPU that the driver lists; None when it does not say."""
    lines = _nvidia_smi("--query-gpu=memory.total", "--format=csv,noheader,nounits") or []
    sizes = [int(line) for line in lines if line.strip().isdigit()]
    return min(sizes) * 2**20 if sizes else None


def _installed_gpus() -> int:
    listing = _nvidia_smi("-L")
    if listing is not None:
        return sum(line.startswith("GPU ") for line in listing)
    driver = Path("/proc/driver/nvidia/gpus")
    return len(list(driver.iterdir())) if driver.is_dir() else 0


def _nvidia_smi(*arguments: str) -> list[str] | None:
    """The lines it prints; None when it is not there or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.splitlines() if done.returncode == 0 else None
