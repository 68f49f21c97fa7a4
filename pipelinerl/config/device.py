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


def resolve_backend(config: RunConfig, device: Device) -> Literal["gloo", "nccl"]:
    """`weights.backend` with `auto` decided: nccl between GPUs, gloo on CPU."""
    if config.weights.backend != "auto":
        return config.weights.backend
    return "nccl" if device == "cuda" else "gloo"


def gpus_needed(config: RunConfig, trainer: bool = True) -> int:
    """GPUs of a run on cuda: every engine and every trainer rank has its own."""
    return config.engines * config.engine.tensor_parallel + config.trainer.ranks * trainer


def _installed_gpus() -> int:
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30, check=False)
        if listing.returncode == 0:
            return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    driver = Path("/proc/driver/nvidia/gpus")
    return len(list(driver.iterdir())) if driver.is_dir() else 0
