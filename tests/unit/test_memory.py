"""The memory of every process, worked out by hand, and the verdict on devices and nodes."""

import json
import struct
from pathlib import Path

import pytest

from pipelinerl.cluster.fit import fit
from pipelinerl.config.device import Device
from pipelinerl.config.footprint import Footprint, footprint
from pipelinerl.config.inventory import GB, uniform
from pipelinerl.config.memory import Need, engine_need, kv_tokens, trainer_need
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import EnvironmentProblem
from tests.unit.configs import config_of
from tests.unit.model_files import seven_billion, tiny_model, write_headers

MATH = "experiment=math_7b_8gpu"
N = 7_615_616_512


def size_of(config: RunConfig) -> Footprint:
    size = footprint(config)
    assert size is not None
    return size


@pytest.mark.parametrize(
    ("dtype", "stage", "ranks", "weights", "gradients", "optimizer", "kv"),
    [
        # 44 parameters of 4 bytes, gradients 44 * 4, optimizer 44 * 12; KV 2 * 2 layers * 2 heads * 2 * 4 bytes
        ("float32", 1, 1, 176, 176, 528, 64),
        ("float32", 1, 2, 176, 176, 264, 64),  # optimizer 44 * 12 / 2
        ("bfloat16", 2, 4, 88, 44, 132, 32),  # gradients 44 * 4 / 4, optimizer 44 * 12 / 4
        ("float32", 0, 4, 176, 176, 352, 64),  # nothing is divided, and no copy of the weights: 44 * 8
        ("bfloat16", 0, 4, 88, 176, 528, 32),
        ("bfloat16", 3, 4, 22, 44, 132, 32),  # weights 44 * 2 / 4 too
    ],
)
def test_weights_gradients_optimizer(
    tmp_path: Path, dtype: str, stage: int, ranks: int, weights: int, gradients: int, optimizer: int, kv: int
) -> None:
    model = tiny_model(tmp_path / "m")
    overrides = (f"model.dtype={dtype}", f"trainer.zero_stage={stage}", f"trainer.ranks={ranks}")
    size = size_of(config_of(f"model.path={model}", *overrides))
    assert size.parameters == size.trained == 44
    assert size.engine_weights == 44 * {"float32": 4, "bfloat16": 2}[dtype]
    assert (size.trainer_weights, size.trainer_gradients, size.trainer_optimizer) == (weights, gradients, optimizer)
    assert (size.kv_per_token, size.reference) == (kv, 0)


@pytest.mark.parametrize(
    ("overrides", "optimizer"),
    [
        (["trainer.optimizer=adam"], 528),
        (["trainer.optimizer=sgd"], 352),  # 44 * 8
        (["trainer.optimizer=sgd", "trainer.betas=[0.0,0.9]"], 176),
    ],
)
def test_moments_of_the_optimizers(tmp_path: Path, overrides: list[str], optimizer: int) -> None:
    assert size_of(config_of(f"model.path={tiny_model(tmp_path / 'm')}", *overrides)).trainer_optimizer == optimizer


@pytest.mark.parametrize(
    ("targets", "adapted"),
    # rank 3: 3 * (inputs + outputs) values beside each adapted weight
    [("[all-linear]", 3 * (6 + 4 + 8 + 6)), ("[q_proj]", 3 * (6 + 4))],
)
def test_only_adapters_need_gradients_and_an_optimizer(tmp_path: Path, targets: str, adapted: int) -> None:
    shapes = {"embed_tokens.weight": [10, 4], "a.q_proj.weight": [6, 4], "b.up.weight": [8, 6], "norm.weight": [4]}
    model = write_headers(tmp_path / "m", shapes, {})
    lora = ("trainer.lora.rank=3", f"trainer.lora.targets={targets}")
    size = size_of(config_of(f"model.path={model}", "model.dtype=bfloat16", *lora))
    assert size.parameters == 40 + 24 + 48 + 4 and size.trained == adapted
    assert size.trainer_weights == 2 * (size.parameters + adapted)
    assert (size.trainer_gradients, size.trainer_optimizer) == (4 * adapted, 12 * adapted)
    assert size.shape is None and size.kv_per_token is None  # its config.json is empty


def test_a_reference_is_whole_on_every_rank_and_its_own_size(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    other = write_headers(tmp_path / "other", {"embed": [50, 4]}, {})
    on = (f"model.path={model}", "model.dtype=bfloat16", "algo.kl.coef=0.1", "trainer.zero_stage=3", "trainer.ranks=4")
    assert size_of(config_of(*on)).reference == 88
    assert size_of(config_of(*on, f"algo.kl.reference={other}")).reference == 400
    assert size_of(config_of(*on, "algo.kl.reference=some/where")).reference == 88


def items(need: Need) -> dict[str, tuple[int, bool, bool]]:
    """Bytes, whether certain, whether of the host."""
    return {item.name: (item.bytes, item.certain, item.host) for item in need.items}


def test_a_rank_of_seven_billion_by_hand(tmp_path: Path) -> None:
    config = config_of(MATH, f"model.path={seven_billion(tmp_path / 'm')}")  # bf16, ZeRO 2 over 4, checkpointing, 16384
    size = size_of(config)
    assert size.parameters == N
    # A layer, bytes a token. Norms: 2 * 3584 * (4 + 2 * 2). Attention: 2 * 128 * (3 * 28 + 2 * 4). MLP: 4 * 2 * 18944.
    layer = 57_344 + 23_552 + 151_552
    assert items(trainer_need(config, size, "cuda")) == {
        "weights": (2 * N, True, False),  # 15.2 GB
        "gradients": (N, True, False),  # 4 / 4 bytes
        "optimizer": (3 * N, True, False),  # 12 / 4 bytes
        "activations": (16384 * (28 * 2 * 3584 + layer), False, False),  # 7.1 GB
        "logits": (4 * (2 * 2048 * 4096 + 2 * 16384 * 3584), False, False),
        "broadcast buckets": (2 * 256 * 2**20, False, False),
        "loading": (2 * N, False, True),
    }
    need = trainer_need(config, size, "cuda")
    assert need.on_device(certain=True) == 6 * N
    assert need.on_device() == 6 * N + 7_096_762_368 + 536_870_912 + 536_870_912


def test_without_checkpointing_every_layer_keeps_its_activations(tmp_path: Path) -> None:
    model = f"model.path={seven_billion(tmp_path / 'm')}"
    config = config_of(MATH, model, "trainer.gradient_checkpointing=false")
    assert items(trainer_need(config, size_of(config), "cuda"))["activations"][0] == 16384 * 28 * 232_448  # 107 GB
    shared = config_of(MATH, model, "trainer.gradient_checkpointing=false", "trainer.sequence_parallel=4")
    assert items(trainer_need(shared, size_of(shared), "cuda"))["activations"][0] == 4096 * 28 * 232_448


def test_what_is_offloaded_is_in_host_memory(tmp_path: Path) -> None:
    stage_3 = ("trainer.zero_stage=3", "trainer.offload_optimizer=true", "trainer.offload_parameters=true")
    reference = ("algo.kl.coef=0.1", "algo.kl.offload=true")
    config = config_of(MATH, f"model.path={seven_billion(tmp_path / 'm')}", *stage_3, *reference)
    found = items(trainer_need(config, size_of(config), "cuda"))
    assert found["weights"] == (N // 2, True, True)
    assert found["gradients"] == (N, True, True)
    assert found["optimizer"] == (3 * N, True, True)
    assert found["KL reference"] == (2 * N, True, True)
    assert found["gathered weights"] == (2 * 10**9, False, False)
    # On the device while it computes, before activations and logits are: 15.2 GB in their place.
    working = found["activations"][0] + found["logits"][0]
    assert found["KL reference in use"] == (2 * N - working, False, False)
    assert trainer_need(config, size_of(config), "cuda").on_device(certain=True) == 0


@pytest.mark.parametrize(
    ("overrides", "gpu_memory", "weights", "cache", "tokens"),
    [
        # 0.9 * 80 GB less the weights; a token takes 2 * 28 layers * 4 heads * 128 * 2 bytes = 57,344
        ([], 80 * GB, 2 * N, 72 * GB - 2 * N, (72 * GB - 2 * N) // 57_344),
        (["engine.tensor_parallel=2"], 80 * GB, N, 72 * GB - N, (72 * GB - N) // 28_672),
        (["engine.tensor_parallel=8"], 80 * GB, N // 4, 72 * GB - N // 4, (72 * GB - N // 4) // 14_336),  # a head each
        (["engine.pipeline_parallel=2"], 80 * GB, N, 72 * GB - N, (72 * GB - N) // 28_672),
        (["engine.kv_cache_mb=1000"], 80 * GB, 2 * N, 1000 * 2**20, 1000 * 2**20 // 57_344),
        ([], None, 2 * N, None, None),
    ],
)
def test_an_engine_of_seven_billion(
    tmp_path: Path, overrides: list[str], gpu_memory: int | None, weights: int, cache: int | None, tokens: int | None
) -> None:
    config = config_of(MATH, f"model.path={seven_billion(tmp_path / 'm')}", *overrides)
    size = size_of(config)
    need = engine_need(config, size, "cuda", gpu_memory)
    found = items(need)
    assert found["weights"][0] == weights
    caches = [count for name, (count, _, _) in found.items() if name.startswith("KV cache")]
    assert caches == ([] if cache is None else [cache])
    assert kv_tokens(config, size, need) == tokens
    assert need.devices == config.engine.workers
    assert need.unknown == (() if cache is not None else ("KV cache: what engine.gpu_memory_utilization=0.9 leaves",))


def test_activations_of_an_engine_with_a_cache_of_given_size(tmp_path: Path) -> None:
    config = config_of(MATH, f"model.path={seven_billion(tmp_path / 'm')}", "engine.kv_cache_mb=1000")
    # 8192 tokens of 4 hidden and 3 MLP rows in bf16; logits and softmax of 256 sequences in fp32.
    expected = 8192 * 2 * (4 * 3584 + 3 * 18944) + 2 * 4 * 256 * 152064
    assert items(engine_need(config, size_of(config), "cuda", None))["activations"] == (expected, False, False)


def verdict(
    tmp_path: Path, gpus: int, gpu_memory: float, memory: float, *overrides: str
) -> tuple[list[str], list[str]]:
    """Problems and warnings of a 7B model on one node; memory in GB."""
    model = tmp_path / "m"
    config = config_of(MATH, f"model.path={model if model.exists() else seven_billion(model)}", *overrides)
    found = fit(config, uniform(1, 64, gpus, int(memory * GB), int(gpu_memory * GB)))
    return list(found.problems), list(found.warnings)


def test_it_fits_eight_gpus_of_80_gb(tmp_path: Path) -> None:
    assert verdict(tmp_path, 8, 80, 1000) == ([], [])


def test_what_is_certain_not_to_fit_is_a_problem(tmp_path: Path) -> None:
    problems, warnings = verdict(tmp_path, 8, 40, 1000)
    assert problems == [
        f"node 0, GPU of trainer rank {i}: will not fit: trainer rank {i} 45.7 GB needed, 40.0 GB there"
        for i in range(4)
    ]
    assert warnings == []


def test_what_is_estimated_not_to_fit_is_a_warning(tmp_path: Path) -> None:
    problems, warnings = verdict(tmp_path, 8, 50, 1000)  # 45.7 are certain, 53.9 estimated
    assert problems == []
    assert warnings[0] == (
        "node 0, GPU of trainer rank 0: may not fit (estimated): trainer rank 0 53.9 GB needed, 50.0 GB there"
    )


def test_weights_beyond_the_part_of_the_engine_are_a_problem(tmp_path: Path) -> None:
    offload = ("trainer.zero_stage=3", "trainer.offload_optimizer=true")
    problems, _ = verdict(tmp_path, 8, 16, 1000, *offload)
    assert problems == [
        "node 0: will not fit: the weights of an engine take 15.2 GB of each GPU, and "
        "engine.gpu_memory_utilization=0.9 gives it 14.4 GB; raise engine.tensor_parallel"
    ]
    assert verdict(tmp_path, 12, 16, 1000, *offload, "engine.tensor_parallel=2")[0] == []


def test_host_memory_of_a_node_holds_what_all_its_ranks_offload(tmp_path: Path) -> None:
    offload = ("trainer.zero_stage=3", "trainer.offload_optimizer=true")
    problems, _ = verdict(tmp_path, 8, 80, 100, *offload)
    # Four ranks with 4 N of gradients and optimizer each: 122 GB; the engines need none.
    parts = " + ".join(f"trainer rank {i} 30.5 GB" for i in range(4))
    parts += "".join(f" + engine {i} 0 B" for i in range(4))
    assert problems == [f"node 0, host memory: will not fit: {parts} needed, 100.0 GB there"]
    warnings = verdict(tmp_path, 8, 80, 150, *offload)[1]
    assert len(warnings) == 1 and "host memory: may not fit (estimated)" in warnings[0]  # 15.2 GB each for loading
    assert verdict(tmp_path, 8, 80, 200, *offload) == ([], [])


def test_a_shared_gpu_holds_both(tmp_path: Path) -> None:
    one = ("engine.count=1", "trainer.ranks=1", "trainer.lora.rank=8", "trainer.lora.targets=[q_proj]")
    problems, _ = verdict(tmp_path, 1, 80, 1000, *one)
    assert len(problems) == 1
    # 2 N, and 18 bytes for each of the 8 * (3584 + 3584) * 28 values of the adapters
    assert problems[0] == (
        "node 0, GPU of trainer rank 0 and engine 0: will not fit: trainer rank 0 15.3 GB + engine 0 72.0 GB needed, "
        "80.0 GB there"
    )
    assert verdict(tmp_path, 1, 80, 1000, *one, "engine.gpu_memory_utilization=0.6")[0] == []


def test_on_a_cpu_all_processes_share_the_memory(tmp_path: Path) -> None:
    sizes = ("experiment=quickstart", "engine.tensor_parallel=2", "trainer.ranks=2", "trainer.zero_stage=0")
    config = config_of(*sizes, f"model.path={tiny_model(tmp_path / 'm')}", "engine.kv_cache_mb=100")
    problems = fit(config, uniform(1, 4, 0, 200_000_000, None)).problems
    # Two ranks of 44 * 16 bytes; two workers with twice 44 * 4 / 2 bytes and 104,857,600 of cache each.
    assert problems == (
        "node 0, memory: will not fit: trainer rank 0 704 B + trainer rank 1 704 B + engine 0 209.7 MB needed, "
        "200.0 MB there",
    )


def test_on_a_cpu_the_weights_to_come_are_in_memory_beside_those_in_use(tmp_path: Path) -> None:
    """The copy that is sent, and the model that an engine loads it into; a compiled engine loads the one it has."""
    model = f"model.path={tiny_model(tmp_path / 'm')}"
    config = config_of("experiment=quickstart", model, "engine.tensor_parallel=2")
    size = size_of(config)
    assert items(trainer_need(config, size, "cpu"))["weights to send"] == (44 * 4, False, False)
    assert items(engine_need(config, size, "cpu", None))["weights being loaded"] == (44 * 2, True, False)
    compiled = config_of("experiment=quickstart", model, "engine.enforce_eager=false")
    assert "weights being loaded" not in items(engine_need(compiled, size, "cpu", None))
    on_gpu = {**items(trainer_need(config, size, "cuda")), **items(engine_need(config, size, "cuda", None))}
    assert not {"weights to send", "weights being loaded"} & on_gpu.keys()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_model_without_a_plain_shape_has_no_estimate_and_says_so(tmp_path: Path, device: Device) -> None:
    config = config_of(f"model.path={write_headers(tmp_path / 'm', {'embed': [10, 4]}, {})}")
    size = size_of(config)
    why = ("activations: config.json describes no plain decoder",)
    assert trainer_need(config, size, device).unknown == engine_need(config, size, device, None).unknown == why
    assert kv_tokens(config, size, engine_need(config, size, device, None)) is None


def test_a_damaged_model_file_is_named(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    (model / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(EnvironmentProblem, match=r"model\.safetensors: not a readable safetensors file"):
        footprint(config_of(f"model.path={model}"))
    header = json.dumps({"a": {"dtype": "F32"}}).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(EnvironmentProblem, match="not a readable safetensors file"):
        footprint(config_of(f"model.path={model}"))
