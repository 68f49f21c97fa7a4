"""Training runs of several variants, for the scripts that compare them. A run that is there is not done again."""

import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipelinerl.metrics.log import FILE_NAME, read_metrics


def train(run_dir: Path, overrides: Sequence[str]) -> None:
    """`pipelinerl train` into `run_dir`, and a line about how it went. Exits when it fails."""
    if (run_dir / "model").is_dir():
        return
    command = [str(Path(sys.executable).with_name("pipelinerl")), "train", *overrides, f"run_dir={run_dir}"]
    print(shlex.join(command), flush=True)
    start = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        sys.exit(f"{run_dir.name} ended with exit code {done.returncode}; see {run_dir}/logs")
    rewards = [record["reward/mean"] for record in read_metrics(run_dir / FILE_NAME) if record["kind"] == "train"]
    print(f"  {time.monotonic() - start:.0f} s, reward {rewards[0]:.2f} -> {rewards[-1]:.2f}", flush=True)


def finished(folder: Path, names: Iterable[str]) -> dict[str, list[Path]]:
    """Label -> run directories `<name>-seed<k>` that hold a finished run, for the names that have any."""
    found = {name: sorted(model.parent for model in folder.glob(f"{name}-seed*/model")) for name in names}
    return {name.replace("_", " "): runs for name, runs in found.items() if runs}
