"""Benchmarks that the documentation names run, hold their limits at a small size, and fail where they do not."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts" / "bench"


def bench(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPTS / name, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_packing_is_full_and_balanced() -> None:
    done = bench("packing.py", "--steps", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 steps" in done.stdout
    assert bench("packing.py", "--steps", "1", "--min-fill", "1.01").returncode == 1


def test_block_by_block_logprobs_take_a_quarter_of_the_memory() -> None:
    small = ("--vocabulary", "50000", "--hidden", "64", "--tokens", "1024", "--chunk", "512", "--repeats", "1")
    done = bench("logprobs.py", *small, "--max-time", "3")  # of one noisy run; memory and values are exact
    assert done.returncode == 0, done.stdout + done.stderr
    assert "naive" in done.stdout and "chunked" in done.stdout


def test_the_controllers_cost_hardly_grows_with_the_engines() -> None:
    small = ("--engines", "1", "200", "--steps", "3", "--groups", "256", "--rounds", "2")
    done = bench("controller.py", *small, "--min-rate", "2000", "--max-growth", "4")  # of few runs beside others
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| 200 |" in done.stdout
    assert bench("controller.py", *small, "--min-rate", "1e9").returncode == 1


def test_an_update_of_a_serving_engine_is_measured_phase_by_phase() -> None:
    small = ("--vocabulary", "256", "--hidden", "192", "--layers", "2", "--length", "128", "--kv-cache-mb", "64")
    done = bench("update.py", *small, "--requests", "8", "--repeats", "1", "--max-ratio", "1000")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "none aborted" in done.stdout and "| pause |" in done.stdout and "| mapped to 3 |" in done.stdout
