"""What `--dry-run` says: quantities worked out by hand, devices, memory, parity; and the checks before a run."""

import json
import struct
from pathlib import Path

import pytest

from pipelinerl.config.device import gpu_count, resolve_device
from pipelinerl.config.load import load_config
from pipelinerl.config.plan import plan, render
from pipelinerl.config.preflight import preflight
from pipelinerl.errors import DataError, EnvironmentProblem
from tests.unit.configs import config_of

MATH = "experiment=math_7b_8gpu"


def test_quantities_of_a_step() -> None:
    derived = plan(config_of("batch.groups_per_step=6", "batch.group_size=4", "async.max_lag=3"), gpus=0)
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
    assert plan(config_of("steps=10", *overrides), gpus=0).eval_versions == versions


@pytest.mark.parametrize(
    ("overrides", "gpus", "device", "backend", "needed"),
    [
        (["cluster.device=auto"], 0, "cpu", "gloo", 0),
        (["cluster.device=auto"], 2, "cuda", "nccl", 2),
        (["cluster.device=cpu"], 8, "cpu", "gloo", 0),
        ([MATH], 0, "cuda", "nccl", 8),
        ([MATH, "engine.tensor_parallel=2"], 8, "cuda", "nccl", 12),  # 4 * 2 + 4
    ],
)
def test_devices_and_backend(overrides: list[str], gpus: int, device: str, backend: str, needed: int) -> None:
    derived = plan(config_of(*overrides), gpus)
    assert (derived.device, derived.backend, derived.gpus_needed) == (device, backend, needed)


@pytest.mark.parametrize(
    ("overrides", "gpus", "backend"),
    [
        ([], 1, "ipc"),
        ([], 2, "nccl"),
        (["cluster.address=auto", "cluster.object_store_mb=null"], 1, "nccl"),  # other machines have more
        (["weights.backend=nccl"], 1, "nccl"),
        (["weights.backend=ipc"], 2, "ipc"),
    ],
)
def test_the_transport_of_the_only_gpu(overrides: list[str], gpus: int, backend: str) -> None:
    assert plan(config_of("cluster.device=cuda", *overrides), gpus).backend == backend


@pytest.mark.parametrize(
    ("overrides", "off"),
    [
        ([], []),
        (["engine.logprobs_mode=raw_logprobs"], ["1"]),
        (["engine.prefix_caching=true"], ["2"]),
        (["engine.async_scheduling=true"], ["2"]),
        (["engine.generation_config=auto"], ["2"]),
        (["engine.update_pause=wait"], ["3"]),
        (["engine.update_clear_cache=true"], ["3"]),
        ([MATH, "model.head_dtype=bfloat16"], ["4"]),
    ],
)
def test_a_parity_fix_that_is_off_is_said_to_be_off(overrides: list[str], off: list[str]) -> None:
    derived = plan(config_of(*overrides), gpus=0)
    assert [fix.name[0] for fix in derived.parity if not fix.in_force] == off
    assert render(derived).count(" OFF ") == len(off)


def rows_of(*overrides: str) -> dict[str, str]:
    """What the plan shows, by label."""
    lines = render(plan(config_of(*overrides), gpus=0)).splitlines()
    return {line[2:24].strip(): line[25:] for line in lines if line.startswith("  ")}


def test_the_plan_shows_the_objective_that_is_in_force() -> None:
    rows = rows_of()
    assert (rows["loss"], rows["advantage"]) == ("ppo_clip, aggregated by token_mean", "rloo of the task's reward")
    assert rows["proximal policy"].startswith("the engine's logprobs")
    assert (rows["corrections"], rows["KL"], rows["entropy bonus"]) == ("none", "none", "none")
    assert rows["optimizer updates"] == "1 per step, of 64 groups each"
    assert "equal rewards" not in rows and "truncated" not in rows


def test_the_plan_shows_what_differs_from_it() -> None:
    rows = rows_of(
        "algo=decoupled_ppo", "algo.advantage=grpo", "algo.aggregation=prompt_mean", "batch.updates=4",
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
    assert rows_of("algo=gspo")["loss"] == "gspo, aggregated by seq_mean_token_mean"


def tiny_model(directory: Path) -> Path:
    """A model of 10 * 4 + 4 = 44 parameters: two layers, four heads of two, of which two hold keys and values."""
    directory.mkdir()
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "embed": {"dtype": "F32", "shape": [10, 4], "data_offsets": [0, 160]},
            "norm": {"dtype": "F32", "shape": [4], "data_offsets": [160, 176]},
        }
    ).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(176))
    shape = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    (directory / "config.json").write_text(json.dumps(shape))
    return directory


@pytest.mark.parametrize(
    ("dtype", "stage", "ranks", "weights", "gradients", "optimizer", "kv"),
    [
        # 44 parameters of 4 bytes, gradients 44 * 4, optimizer 44 * 12; KV 2 * 2 layers * 2 heads * 2 * 4 bytes
        ("float32", 1, 1, 176, 176, 528, 64),
        ("float32", 1, 2, 176, 176, 264, 64),  # optimizer 44 * 12 / 2
        ("bfloat16", 2, 4, 88, 44, 132, 32),  # gradients 44 * 4 / 4, optimizer 44 * 12 / 4
        ("float32", 0, 4, 176, 176, 528, 64),  # nothing is divided
        ("bfloat16", 3, 4, 22, 44, 132, 32),  # weights 44 * 2 / 4 too
    ],
)
def test_memory_of_a_local_model(
    tmp_path: Path, dtype: str, stage: int, ranks: int, weights: int, gradients: int, optimizer: int, kv: int
) -> None:
    model = tiny_model(tmp_path / "m")
    size = plan(
        config_of(
            f"model.path={model}", f"model.dtype={dtype}", f"trainer.zero_stage={stage}", f"trainer.ranks={ranks}"
        ),
        gpus=0,
    ).footprint
    assert size is not None
    assert size.parameters == 44
    assert size.engine_weights == 44 * {"float32": 4, "bfloat16": 2}[dtype]
    assert (size.trainer_weights, size.trainer_gradients, size.trainer_optimizer) == (weights, gradients, optimizer)
    assert size.kv_per_token == kv


@pytest.mark.parametrize(
    ("targets", "adapted"),
    # rank 3: 3 * (inputs + outputs) values beside each adapted weight
    [("[all-linear]", 3 * (6 + 4 + 8 + 6)), ("[q_proj]", 3 * (6 + 4))],
)
def test_only_adapters_need_gradients_and_an_optimizer(tmp_path: Path, targets: str, adapted: int) -> None:
    shapes = {"embed_tokens.weight": [10, 4], "a.q_proj.weight": [6, 4], "b.up.weight": [8, 6], "norm.weight": [4]}
    header = json.dumps({name: {"dtype": "F32", "shape": shape} for name, shape in shapes.items()}).encode()
    model = tiny_model(tmp_path / "m")
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    lora = ("trainer.lora.rank=3", f"trainer.lora.targets={targets}")
    size = plan(config_of(f"model.path={model}", "model.dtype=bfloat16", *lora), gpus=0).footprint
    assert size is not None and size.parameters == 40 + 24 + 48 + 4
    assert size.trainer_weights == 2 * (size.parameters + adapted)
    assert (size.trainer_gradients, size.trainer_optimizer) == (4 * adapted, 12 * adapted)


def test_kv_cache_capacity_is_told_in_tokens(tmp_path: Path) -> None:
    text = render(plan(config_of(f"model.path={tiny_model(tmp_path / 'm')}", "engine.kv_cache_mb=1"), gpus=0))
    assert "1 MB hold 16,384 tokens" in text  # 2**20 / 64


def test_a_model_that_is_not_here_has_unknown_memory() -> None:
    assert "unknown: model not local" in render(plan(config_of(MATH), gpus=0))


def test_a_damaged_model_file_is_named(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    (model / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(EnvironmentProblem, match=r"model\.safetensors: not a readable safetensors file"):
        plan(config_of(f"model.path={model}"), gpus=0)


def test_preflight_accepts_a_model_that_is_here(tmp_path: Path) -> None:
    preflight(config_of(f"model.path={tiny_model(tmp_path / 'm')}"))


def test_preflight_tells_how_to_get_the_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EnvironmentProblem, match=r"model\.path=models/tiny.*run: pipelinerl make-tiny"):
        preflight(config_of())


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


def test_preflight_counts_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(tmp_path, monkeypatch, 4)
    model = tiny_model(tmp_path / "m")
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "1+1", "answer": "2"}\n')
    overrides = [MATH, f"model.path={model}", f"task.path={data}"]
    with pytest.raises(EnvironmentProblem, match=r"8 GPUs needed .* this machine has 4"):
        preflight(config_of(*overrides))
    preflight(config_of(*overrides, "engine.count=2", "trainer.ranks=2"))
    preflight(config_of(*overrides, "cluster=ray"))


def test_preflight_wants_a_kv_cache_size_when_auto_turns_out_to_be_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(tmp_path, monkeypatch, 0)
    config = load_config([f"model.path={tiny_model(tmp_path / 'm')}", "cluster.device=auto", "engine=gpu"])
    with pytest.raises(EnvironmentProblem, match=r"engine\.kv_cache_mb=null on CPU"):
        preflight(config)
