"""A real offline W&B run, read back from its file, in a process of its own: wandb keeps process-wide state."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import logging, os, signal, sys, time
from pathlib import Path
import psutil
from pipelinerl.config.schema import WandbConfig
from pipelinerl.metrics.wandb_sink import WandbSink

logging.basicConfig(format="%(message)s")
sink = WandbSink(WandbConfig(mode="offline"), Path(sys.argv[1]), {"lr": 1e-3, "api_key": "s3cret"}, "named",
                 run_id="resumed1", close_timeout_s=float(sys.argv[3]))
sink.write("eval", 0, {"eval/sort/accuracy": 0.25, "time/elapsed_s": 1.0})
sink.write("train", 1, {"reward/mean": 0.5, "policy/ess": float("nan"), "time/elapsed_s": 2.0})
if sys.argv[2] != "none":
    while not (sink.sync_hint and sink._queue.empty()):
        time.sleep(0.05)
    time.sleep(0.5)  # the record taken last is with wandb-core: it dies between two records, not during one
    core, = [child for child in psutil.Process().children() if child.name().startswith("wandb-core")]
    core.send_signal(getattr(signal, sys.argv[2]))
    time.sleep(0.2)
    sink.write("train", 2, {"reward/mean": 0.6, "time/elapsed_s": 3.0})
sink.close()
print(sink.sync_hint)
print(len(psutil.Process().children()))
"""


def run(run_dir: Path, core_signal: str, close_timeout_s: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, str(run_dir), core_signal, str(close_timeout_s)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def test_offline_run_reads_back(tmp_path: Path) -> None:
    done = run(tmp_path, "none", 30)
    assert (done.returncode, done.stderr) == (0, "")
    hint, children = done.stdout.splitlines()  # and no chatter of wandb's
    assert children == "0"
    folder = Path(hint.removeprefix("wandb sync "))
    assert folder.parent == tmp_path / "wandb"
    [file] = folder.glob("run-*.wandb")
    assert file.name == "run-resumed1.wandb", "a resumed run goes on under its old id"
    assert b"s3cret" not in file.read_bytes()
    wandb = Path(sys.executable).with_name("wandb")
    inspect = [str(wandb), "leet", "inspect", "--json", str(folder)]
    records = [json.loads(line) for line in subprocess.check_output(inspect, text=True).splitlines()]
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [(item["train/step"], item["time/elapsed_s"]) for item in history] == [(0, 1), (1, 2)]
    assert history[0]["eval/sort/accuracy"] == 0.25 and history[1]["reward/mean"] == 0.5
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    assert any(metric.get("glob_name") == "*" and metric["step_metric"] == "train/step" for metric in metrics)
    [header] = [record["run"] for record in records if record["type"] == "run" and "display_name" in record["run"]]
    assert (header["display_name"], header["project"]) == ("named", "pipelinerl")


@pytest.mark.parametrize(("core_signal", "timeout_s"), [("SIGKILL", 10), ("SIGSTOP", 2)])
def test_a_dead_or_stopped_wandb_core_does_not_hold_the_run(tmp_path: Path, core_signal: str, timeout_s: float) -> None:
    done = run(tmp_path, core_signal, timeout_s)
    assert done.returncode == 0
    assert "incomplete" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == "0"  # no process is left
