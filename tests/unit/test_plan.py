"""What `pipelinerl plan` says: quantities worked out by hand, parity, devices; and the checks before a run."""

import json
from pathlib import Path

import pytest

from pipelinerl import cli
from pipelinerl.cluster.fit import require_fit
from pipelinerl.cluster.placement import Demand
from pipelinerl.commands.plan import show_plan
from pipelinerl.config.device import gpu_count, gpu_memory, resolve_backend, resolve_device
from pipelinerl.config.inventory import this_machine, uniform
from pipelinerl.config.load import load_config
from pipelinerl.config.plan import parity_fixes, plan
from pipelinerl.config.preflight import local_inputs, preflight, with_absolute_paths
from pipelinerl.errors import DataError, EnvironmentProblem
from tests.unit.configs import config_of
from tests.unit.model_files import tiny_model

MATH = "experiment=math_7b_8gpu"


def test_quantities_of_a_step() -> None:
    derived = plan(config_of("batch.groups_per_step=6", "batch.group_size=4", "async.max_lag=3"), "gloo")
    assert derived.samples_per_step == 24  # 6 * 4
    assert derived.sampled_tokens_per_step == 24 * derived.config.sampling.max_tokens
    assert derived.tokens_per_step == 24 * derived.config.engine.max_model_len
    assert (derived.lag_steps, derived.lag_samples) == (3, 72)  # 3 * 24
    assert derived.groups_in_flight == 24  # (3 + 1) * 6


@pytest.mark.parametrize(
    ("overrides", "versions"),
    [
        (["eval.every=0"], (0, 10)),
        (["eval.every=4"], (0, 4, 8, 10)),
        (["eval.every=5"], (0, 5, 10)),
        (["eval.every=5", "eval.at_start=false", "eval.at_end=false"], (5, 10)),
        (["eval.at_start=false", "eval.at_end=false"], ()),
    ],
)
def test_each_version_is_evaluated_once(overrides: list[str], versions: tuple[int, ...]) -> None:
    assert plan(config_of("steps=10", *overrides), "gloo").eval_versions == versions


@pytest.mark.parametrize(
    ("overrides", "gpus", "device", "backend"),
    [
        (["cluster.device=auto"], 0, "cpu", "gloo"),
        (["cluster.device=auto"], 2, "cuda", "nccl"),
        (["cluster.device=cpu"], 8, "cpu", "gloo"),
        ([MATH], 0, "cuda", "nccl"),
    ],
)
def test_devices_and_backend(overrides: list[str], gpus: int, device: str, backend: str) -> None:
    config = config_of(*overrides)
    assert resolve_device(config, gpus) == device
    assert resolve_backend(config, resolve_device(config, gpus)) == backend


def test_a_shared_gpu_takes_weights_by_ipc_unless_told_otherwise() -> None:
    assert resolve_backend(config_of(MATH), "cuda", shares_gpu=True) == "ipc"
    assert resolve_backend(config_of(MATH, "weights.backend=nccl"), "cuda", shares_gpu=True) == "nccl"
    assert resolve_backend(config_of(), "cpu") == "gloo"


def test_gpus_are_counted_with_all_workers_of_an_engine() -> None:
    config = config_of(MATH, "engine.tensor_parallel=2", "engine.pipeline_parallel=3")
    assert Demand.of(config).units == 28  # 4 * 2 * 3 + 4


@pytest.mark.parametrize(
    ("overrides", "off"),
    [
        ([], []),
        (["engine.logprobs_mode=raw_logprobs"], ["1"]),
        (["engine.prefix_caching=true"], ["2"]),
        (["engine.async_scheduling=true"], ["2"]),
        (["engine.generation_config=auto"], ["2"]),
        (["engine.update_pause=wait"], ["3"]),
        (["engine.kv_policy=recompute"], ["3"]),
        ([MATH, "model.head_dtype=bfloat16"], ["4"]),
    ],
)
def test_a_parity_fix_that_is_off_is_said_to_be_off(
    overrides: list[str], off: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fixes = plan(config_of(*overrides), "gloo").parity
    assert [fix.name[0] for fix in fixes if not fix.in_force] == off
    assert shown(capsys, *overrides)[1].count(" OFF ") == len(off)


def shown(capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[bool, str]:
    """Whether the plan says that the run fits, and all it says."""
    fits = show_plan(config_of(*overrides))
    return fits, capsys.readouterr().out


def rows_of(capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, str]:
    """What the plan shows, by label."""
    lines = shown(capsys, *overrides)[1].splitlines()
    return {line[2:24].strip(): line[25:] for line in lines if line.startswith("  ")}


def test_the_plan_shows_the_objective_that_is_in_force(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(capsys)
    assert (rows["loss"], rows["advantage"]) == ("ppo_clip, aggregated by token_mean", "rloo of the task's reward")
    assert rows["proximal policy"].startswith("the engine's logprobs")
    assert (rows["corrections"], rows["KL"], rows["entropy bonus"]) == ("none", "none", "none")
    assert rows["optimizer updates"] == "1 per step, of 64 groups each"
    assert "equal rewards" not in rows and "truncated" not in rows


def test_the_plan_shows_what_differs_from_it(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(
        capsys, "algo=decoupled_ppo", "algo.advantage=grpo", "algo.aggregation=prompt_mean", "batch.updates=4",
        "algo.correction.veto=0.0001", "algo.kl.coef=0.01", "algo.kl.reference=a/b", "algo.kl.offload=true",
        "algo.entropy.coef=0.02", "algo.entropy.final_coef=0", "algo.entropy.anneal_steps=9",
        "reward.overlong_buffer=4", "batch.zero_variance=refill", "algo.mask_truncated=true",
    )  # fmt: skip
    assert rows["loss"] == "ppo_clip, aggregated by prompt_mean"
    assert rows["advantage"] == "grpo of the task's reward with overlong_buffer"
    assert rows["proximal policy"].startswith("recomputed at the start of the step")
    assert rows["corrections"] == "tis_token 2.0, veto 0.0001"
    assert rows["KL"] == "k2 in the loss, coef 0.01; to a/b, in host memory"
    assert rows["entropy bonus"] == "0.02 to 0 over 9 steps"
    assert rows["optimizer updates"] == "4 per step, of 16 groups each"
    assert "refilled" in rows["equal rewards"] and "not in the loss" in rows["truncated"]
    assert rows_of(capsys, "algo=gspo")["loss"] == "gspo, aggregated by seq_mean_token_mean"
    assert "training" not in rows and "that are ready" in rows_of(capsys, "batch.stream=true")["training"]


PLAN_8 = ["plan", "--nodes=2", "--gpus-per-node=4", "cluster=ray", MATH]


def test_plan_of_hardware_that_is_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(PLAN_8) == 0
    out = capsys.readouterr().out
    assert "2 node(s) with 64 core(s) and 8 GPU(s)" in out  # 8 cores for every GPU
    assert out.index("  node 0                 trainer rank 0   1 core(s), 1 GPU(s)") < out.index("  node 1    ")
    assert "engine 3         1 core(s), 1 GPU(s)" in out


def test_a_plan_that_does_not_fit_ends_in_exit_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*PLAN_8, "engine.count=5"]) == 3
    problem = capsys.readouterr().out.splitlines()[-1]
    assert problem == (
        "PROBLEM  9 GPUs needed (engine.count=5 x tensor_parallel=1 + trainer.ranks=4), 1 missing: "
        "node 0 has 4, node 1 has 4"
    )


def test_nodes_that_a_local_cluster_does_not_use_are_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--nodes=2", "--cpus-per-node=4"]) == 0
    assert "cluster.address=local uses one node" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--nodes=x", "--nodes=x: should be a whole number above 0, as in --nodes=2"),
        ("--nodes=0", "--nodes=0: should be a whole number above 0, as in --nodes=2"),
        ("--gpus-per-node=1.5", "--gpus-per-node=1.5: should be a whole number above 0, as in --gpus-per-node=2"),
        ("--gpu-memory-gb=-80", "--gpu-memory-gb=-80: should be a number above 0, as in --gpu-memory-gb=2"),
        ("--memory-gb=nan", "--memory-gb=nan: should be a number above 0, as in --memory-gb=2"),
        ("--node=2", "unknown option '--node'; did you mean --nodes?"),
    ],
)
def test_a_wrong_number_of_anything(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", option]) == 2
    assert capsys.readouterr().err == f"pipelinerl: error: {message}\n"


def test_a_cluster_that_is_not_joined_yet_is_not_judged(capsys: pytest.CaptureFixture[str]) -> None:
    fits, out = shown(capsys, MATH, "cluster=ray", "engine.count=40")
    assert fits and "decided when the cluster at auto is joined" in out and "PROBLEM" not in out


def test_a_model_that_is_not_here_has_unknown_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown: model not local" in shown(capsys, MATH)[1]


def test_a_dry_run_shows_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    fits, out = shown(capsys, MATH)
    assert not fits  # no GPU of this machine is free for twelve processes
    assert cli.main(["train", "--dry-run", MATH]) == 0
    assert capsys.readouterr().out == out


def test_preflight_accepts_a_model_that_is_here(tmp_path: Path) -> None:
    preflight(config_of(f"model.path={tiny_model(tmp_path / 'm')}"))


def test_preflight_tells_how_to_get_the_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EnvironmentProblem, match=r"model\.path=models/tiny.*run: pipelinerl make-tiny"):
        preflight(config_of())


def test_an_engine_longer_than_its_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 300}

    def check(length: int, **more: object) -> None:
        (model / "config.json").write_text(json.dumps(config | more))
        preflight(config_of(f"model.path={model}", f"engine.max_model_len={length}"))

    check(300)
    check(301, rope_parameters={"rope_type": "yarn", "factor": 4.0})
    with pytest.raises(EnvironmentProblem, match=r"engine\.max_model_len=301: the model has 300 positions"):
        check(301, rope_parameters={"rope_type": "default"})


def test_preflight_leaves_hub_ids_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    preflight(config_of("model.path=Qwen/Qwen2.5-0.5B"))
    (tmp_path / "Qwen").mkdir()
    with pytest.raises(EnvironmentProblem, match="no such directory"):
        preflight(config_of("model.path=Qwen/Qwen2.5-0.5B"))


def test_preflight_names_a_missing_data_file(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    with pytest.raises(DataError, match=r"task\.path=nowhere\.jsonl: no such file"):
        preflight(load_config([f"model.path={model}", "task=jsonl", "task.path=nowhere.jsonl"]))


def fake_gpus(directory: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    tool = directory / "nvidia-smi"
    lines = "\n".join(f"echo 'GPU {i}: Some GPU (UUID: GPU-{i})'" for i in range(count))
    tool.write_text(f"#!/bin/sh\n{lines}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("visible", "usable"), [(None, 4), ("", 0), ("-1", 0), ("2", 1), ("0,3", 2), ("0,-1,2", 1), ("0,1,2,3,4,5", 4)]
)
def test_gpus_are_those_listed_and_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, usable: int
) -> None:
    fake_gpus(tmp_path, monkeypatch, 4)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_count() == usable
    assert resolve_device(config_of("cluster.device=auto")) == ("cuda" if usable else "cpu")


def test_gpu_memory_is_that_of_the_smallest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(tmp_path, monkeypatch, 2)
    assert gpu_memory() is None  # a driver that does not say
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 81559\necho 40960\necho '[N/A]'\n")
    assert gpu_memory() == 40960 * 2**20
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert gpu_memory() is None


def test_what_lacks_is_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(tmp_path, monkeypatch, 4)
    overrides = [MATH, f"model.path={tiny_model(tmp_path / 'm')}"]
    with pytest.raises(EnvironmentProblem, match=r"8 GPUs needed .*, 4 missing: this machine has 4"):
        require_fit(config_of(*overrides))
    require_fit(config_of(*overrides, "engine.count=2", "trainer.ranks=2"))
    require_fit(config_of(*overrides, "cluster=ray"))  # it is known when it has been joined


def test_this_machine_has_cores_and_memory() -> None:
    (node,) = this_machine(config_of("cluster.num_cpus=3"), gpus=0).nodes
    assert (node.cpus, node.gpus, node.gpu_memory) == (3, 0, None)
    assert node.memory is not None and node.memory > 2**28
    assert this_machine(config_of(), gpus=0).nodes[0].cpus >= 1
    assert uniform(3, 2, 1, None, None).gpus == 3


def test_inputs_that_every_node_must_see_are_those_that_are_local(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    config = load_config(["task=jsonl", f"task.path={rows}", "model.path=models/tiny"])
    assert local_inputs(with_absolute_paths(config)) == [str(Path("models/tiny").resolve()), str(rows)]
    assert local_inputs(config_of("model.path=Qwen/Qwen2.5-0.5B")) == []
    kl = ("algo.kl.coef=0.1", "algo.kl.reference=/shared/reference")
    assert local_inputs(config_of("model.path=a/b", *kl)) == ["/shared/reference"]


def test_preflight_wants_a_kv_cache_size_when_auto_turns_out_to_be_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(tmp_path, monkeypatch, 0)
    config = load_config([f"model.path={tiny_model(tmp_path / 'm')}", "cluster.device=auto", "engine=gpu"])
    with pytest.raises(EnvironmentProblem, match=r"engine\.kv_cache_mb=null on CPU"):
        preflight(config)


def test_the_plan_says_what_recording_takes_at_most(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["batch.groups_per_step=10", "batch.group_size=16", "sampling.max_tokens=100"]
    longest = load_config(sizes).engine.max_model_len
    recorded = f"at most {160 * 4 * (longest + 100) / 1e3:.1f} kB a step, never pruned"
    assert recorded in shown(capsys, *sizes)[1]
    assert "none (journal.batches=false): the run cannot be replayed" in shown(capsys, "journal.batches=false")[1]


def test_the_plan_says_what_an_update_does_to_old_kv() -> None:
    config = load_config(["engine.kv_policy=recompute_at_lag", "engine.kv_max_lag=2"])
    fix = next(fix for fix in parity_fixes(config) if fix.name.startswith("3"))
    assert not fix.in_force and fix.settings == "engine.update_pause=keep, kv_policy=recompute_at_lag 2"
