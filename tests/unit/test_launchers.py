"""scripts/launch: the SLURM script run for real against stand-ins of srun, scontrol, ray and pipelinerl; the RayJob."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from pipelinerl.config.load import load_config

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "launch" / "slurm.sh"
NODES = ("gpu-a", "gpu-b", "gpu-c")

STAND_INS = {
    "scontrol": "printf '%s\\n' " + " ".join(NODES),
    # The node is the word after -w, the command what follows.
    "srun": 'echo "srun $*" >> "$LOG"; while [ "$1" != -w ]; do shift; done; shift 2; exec "$@"',
    "home/.venv/bin/ray": """
case "$1" in
    status) exit 0 ;;
    start)  trap 'echo "ray stopped" >> "$LOG"; exit 0' TERM; echo up >> "$LOG.ray"; while :; do sleep 0.1; done ;;
esac""",
    "home/.venv/bin/python": f"""
case "$*" in
    *get_node_ip_address*) echo 10.0.0.7 ;;
    *) exec {sys.executable} "$@" ;;
esac""",
    # Tells of its start when each node's Ray, and it, would tell of their end.
    "home/.venv/bin/pipelinerl": """
touch "$LOG.ray"; while [ "$(wc -l < "$LOG.ray")" -lt 3 ]; do sleep 0.05; done
trap 'sleep 0.5; echo "checkpoint saved" >> "$LOG"; exit 143' TERM
echo "pipelinerl $*" >> "$LOG"; stat -c '%a' "$RAY_AUTH_TOKEN_PATH" >> "$LOG"; wc -c < "$RAY_AUTH_TOKEN_PATH" >> "$LOG"
[ -z "${CODE:-}" ] || exit "$CODE"
while :; do sleep 0.1; done""",
}


@dataclass
class Job:
    """A SLURM job of three nodes that is none."""

    folder: Path

    def __post_init__(self) -> None:
        for name, body in STAND_INS.items():
            file = self.folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"#!/usr/bin/env bash\n{body}\n")
            file.chmod(0o755)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        job = {"SLURM_JOB_NODELIST": "gpu-[a-c]", "SLURM_JOB_ID": "4242", "PIPELINERL_HOME": str(self.folder / "home")}
        job |= {"PIPELINERL_TOKEN_DIR": str(self.folder / "tokens"), "LOG": str(self.folder / "log")}
        path = {"PATH": f"{self.folder}:{os.environ['PATH']}", "HOME": str(self.folder)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([SCRIPT, *arguments], env=job | path | environment, text=True, **pipes)  # type: ignore[call-overload, no-any-return]

    @property
    def log(self) -> list[str]:
        file = self.folder / "log"
        return file.read_text().splitlines() if file.exists() else []

    def wait_for(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not reached():
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    yield Job(tmp_path)


def test_a_dry_run_prints_what_it_would_run_and_runs_nothing(job: Job) -> None:
    dry = job.start("--dry-run", "experiment=math_7b_8gpu", "task.path=my rows.jsonl")
    out, err = dry.communicate(timeout=30)
    assert (dry.returncode, err, job.log) == (0, "", [])
    commands = [shlex.split(line) for line in out.splitlines()]
    bin_ = str(job.folder / "home" / ".venv" / "bin")
    srun = ["srun", "--nodes=1", "--ntasks=1", "--overlap", "--cpu-bind=none", "--export=ALL", "-w"]
    ray = [f"{bin_}/ray", "start", "--block", "--disable-usage-stats"]
    address = "10.0.0.7:61242"  # 61000 + 4242 % 4000
    head = ["--head", "--include-dashboard=false", "--node-ip-address=10.0.0.7", "--port=61242"]
    assert commands == [
        [*srun, "gpu-a", *ray, *head, "--temp-dir=/tmp/ray-4242"],
        [*srun, "gpu-b", *ray, f"--address={address}"],
        [*srun, "gpu-c", *ray, f"--address={address}"],
        [f"{bin_}/pipelinerl", "train", "cluster=ray", f"cluster.address={address}", "experiment=math_7b_8gpu",
         "task.path=my rows.jsonl"],
    ]  # fmt: skip
    load_config([*commands[-1][2:-1], "task.path=rows.jsonl"])
    assert not (job.folder / "tokens").exists()


def test_sigterm_reaches_the_run_which_saves_and_everything_ends(job: Job) -> None:
    run = job.start("steps=5")
    job.wait_for(lambda: len(job.log) >= 6)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=30)
    assert run.returncode == 143, err
    assert job.log.count("ray stopped") == 3
    assert job.log.index("checkpoint saved") < job.log.index("ray stopped"), "Ray stays until the run has saved"
    assert "pipelinerl train cluster=ray cluster.address=10.0.0.7:61242 steps=5" in job.log
    assert job.log[job.log.index("600") + 1] == "64", "a token that only its owner can read"
    assert list((job.folder / "tokens").iterdir()) == []


@pytest.mark.parametrize("code", [0, 5])
def test_the_exit_code_is_that_of_the_run(job: Job, code: int) -> None:
    run = job.start(CODE=str(code))
    _, err = run.communicate(timeout=30)
    assert run.returncode == code, err
    assert job.log.count("ray stopped") == 3
    assert list((job.folder / "tokens").iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_JOB_NODELIST": ""}, "slurm.sh: no SLURM job here; submit it: sbatch"),
        ({"PIPELINERL_HOME": "/nowhere"}, "slurm.sh: no /nowhere/.venv/bin/pipelinerl; call sbatch in the checkout"),
    ],
)
def test_what_is_missing_is_said(job: Job, environment: dict[str, str], message: str) -> None:
    run = job.start(**environment)
    _, err = run.communicate(timeout=30)
    assert run.returncode == 3 and err.startswith(message)


def test_ray_that_does_not_start_ends_the_job(job: Job) -> None:
    (job.folder / "home" / ".venv" / "bin" / "ray").write_text("#!/bin/sh\nexit 1\n")
    run = job.start()
    _, err = run.communicate(timeout=30)
    assert run.returncode == 3 and "Ray did not start on gpu-a" in err
    assert list((job.folder / "tokens").iterdir()) == []


def test_all_shell_scripts_parse() -> None:
    scripts = sorted((ROOT / "scripts").rglob("*.sh"))
    assert SCRIPT in scripts
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)


def test_the_rayjob_is_one_and_runs_our_command() -> None:
    text = (ROOT / "scripts" / "launch" / "rayjob.yaml").read_text()
    manifest = yaml.safe_load(text)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    spec = manifest["spec"]
    known = {"entrypoint", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"}
    assert spec.keys() == known | {"rayClusterSpec"}
    command = shlex.split(spec["entrypoint"])
    assert command[:2] == ["pipelinerl", "train"]
    config = load_config(command[2:])
    assert (config.cluster.address, config.cluster.device) == ("auto", "cuda")
    cluster = spec["rayClusterSpec"]
    assert cluster.keys() == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert f'"ray[default]=={cluster["rayVersion"]}"' in (ROOT / "pyproject.toml").read_text()
    assert cluster["authOptions"] == {"mode": "token"}
    (workers,) = cluster["workerGroupSpecs"]
    assert workers.keys() == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"]
    gpus = workers["replicas"] * gpus_of(workers)
    assert gpus == config.engine.count * config.engine.workers + config.trainer.ranks
    assert gpus_of(cluster["headGroupSpec"]) == 0 and cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for paths in (config.run_dir, config.model.path):
        assert paths is not None and paths.startswith("/shared/")
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]} and "shared" in mounted
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def gpus_of(group: dict[str, dict[str, dict[str, list[dict[str, dict[str, dict[str, str]]]]]]]) -> int:
    (container,) = group["template"]["spec"]["containers"]
    return int(container["resources"]["limits"].get("nvidia.com/gpu", "0"))
