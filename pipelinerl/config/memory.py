"""How much memory the processes of a run need, before any of them is started.

What a process cannot do without is `certain`: weights, gradients, optimizer state, reference policy, a KV cache of a
given size. The rest is estimated from the shape of the model, with these formulas. Not counted are the CUDA context,
buffers of NCCL and DeepSpeed, fragmentation, and on the host the interpreter with its libraries.

Activations of one decoder layer, in bytes per token. This is the account of 2205.05198 (section 4) made anew for what
transformers' Llama-like layers keep for the backward pass: RMSNorm in fp32, grouped queries, a gated MLP, attention
that never holds its scores. With h = hidden, m = inner width of the MLP, a and k = heads for queries and for keys,
d = size of a head, b = bytes of a value:

    two norms           2 h (4 + 2 b)           input in fp32; normalised input and output, which the projections keep
    attention           b d (3 a + 2 k)         queries, output, and what the projection reads; keys and values
    MLP                 4 b m                   gate, up, activated gate, and the product that the last projection keeps

All layers keep theirs; with gradient checkpointing a layer keeps its input (b h) and one at a time all the rest.
tests/integration/test_memory_estimate.py compares the formula with what torch really keeps.

Head: two blocks of [logprob_chunk, 4096] fp32 logits, and the hidden states and their gradient in fp32.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pipelinerl.config.device import Device
from pipelinerl.config.footprint import BYTES, Footprint, Shape
from pipelinerl.config.schema import RunConfig

TILE = 4096  # words whose logits exist at one time in trainer/logprobs.py
LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters: of a sharded model, how much is whole at a time
MB = 2**20


@dataclass(frozen=True, slots=True)
class Item:
    """Something that takes memory: of each device of a process, or of its node (`host`)."""

    name: str
    bytes: int
    certain: bool = True
    host: bool = False


@dataclass(frozen=True, slots=True)
class Need:
    """What one process needs. `devices`: GPUs of the process, or on a CPU the workers that divide its memory."""

    items: tuple[Item, ...]
    devices: int = 1
    unknown: tuple[str, ...] = ()  # what could not be estimated, and why

    def on_device(self, certain: bool = False) -> int:
        """Bytes of each device; with `certain` only what is."""
        return sum(item.bytes for item in self.items if not item.host and (item.certain or not certain))

    def on_host(self, certain: bool = False) -> int:
        """Bytes of the node's memory that are there besides those of the devices."""
        return sum(item.bytes for item in self.items if item.host and (item.certain or not certain))


def trainer_need(config: RunConfig, size: Footprint, device: Device) -> Need:
    """Memory of one trainer rank; of rank 0 where they differ."""
    trainer, kl, width = config.trainer, config.algo.kl, BYTES[config.model.dtype]
    whole = size.parameters * width
    items = [
        Item("weights", size.trainer_weights, host=trainer.offload_parameters),
        # DeepSpeed reduces gradients to where the optimizer is.
        Item("gradients", size.trainer_gradients, host=trainer.offload_optimizer),
        Item("optimizer", size.trainer_optimizer, host=trainer.offload_optimizer),
    ]
    if size.reference:
        items.append(Item("KL reference", size.reference, host=kl.offload))
    if trainer.zero_stage == 3:
        items.append(Item("gathered weights", min(size.parameters, LIVE_PARAMETERS) * width, certain=False))
    if size.shape is not None:
        items += _working_memory(config, size)
    if device == "cpu":
        items.append(Item("weights to send", whole, certain=False))  # of rank 0: weights/host_sender.py
    else:
        items.append(Item("broadcast buckets", 2 * min(config.weights.bucket_mb * MB, whole), certain=False))
    if device == "cuda" or trainer.zero_stage == 3:
        items.append(Item("loading", whole, certain=False, host=True))
    unknown = () if size.shape else ("activations: config.json describes no plain decoder",)
    return Need(tuple(items), unknown=unknown)


def engine_need(config: RunConfig, size: Footprint, device: Device, gpu_memory: int | None) -> Need:
    """Memory of one engine. `gpu_memory` is that of the GPUs it is on, None where it is not known."""
    engine = config.engine
    weights = size.engine_weights // engine.workers
    items = [Item("weights", weights)]
    if device == "cpu" and engine.enforce_eager:
        items.append(Item("weights being loaded", weights))  # weights/twin.py
    unknown: list[str] = []
    if engine.kv_cache_mb is not None:
        items.append(Item("KV cache", engine.kv_cache_mb * MB))
        if size.shape is None:
            unknown.append("activations: config.json describes no plain decoder")
        else:
            items.append(Item("activations", _engine_activations(config, size.shape, device), certain=False))
        if device == "cuda":
            items.append(Item("broadcast buckets", 2 * min(config.weights.bucket_mb * MB, size.engine_weights), False))
    elif gpu_memory is None:
        unknown.append(f"KV cache: what engine.gpu_memory_utilization={engine.gpu_memory_utilization:g} leaves")
    else:  # vLLM takes its part of the GPU when it starts, whatever it needs
        left = int(engine.gpu_memory_utilization * gpu_memory) - weights
        items.append(Item("KV cache and activations", max(0, left)))
    return Need(tuple(items), engine.workers, tuple(unknown))


def kv_tokens(config: RunConfig, size: Footprint, need: Need) -> int | None:
    """Tokens whose keys and values an engine has room for; None where that is not known."""
    if size.shape is None:
        return None
    engine = config.engine
    layers = -(-size.shape.layers // engine.pipeline_parallel)
    heads = -(-size.shape.kv_heads // engine.tensor_parallel)
    per_token = 2 * layers * heads * size.shape.head_dim * BYTES[config.model.dtype]
    cache = sum(item.bytes for item in need.items if item.name.startswith("KV cache"))
    if any(what.startswith("KV cache") for what in need.unknown):
        return None
    return cache // per_token


def layer_activations(shape: Shape, width: int) -> int:
    """Bytes that one decoder layer keeps of a token for the backward pass, values having `width` bytes."""
    norms = 2 * shape.hidden * (4 + 2 * width)
    attention = width * shape.head_dim * (3 * shape.heads + 2 * shape.kv_heads)
    return norms + attention + 4 * width * shape.mlp


def _working_memory(config: RunConfig, size: Footprint) -> Iterator[Item]:
    """What a forward and backward pass takes; a reference that is offloaded is on the device before it, not with it."""
    assert size.shape is not None
    trainer, shape, width = config.trainer, size.shape, BYTES[config.model.dtype]
    tokens = -(-trainer.micro_batch_tokens // trainer.sequence_parallel)
    layer = layer_activations(shape, width)
    if trainer.gradient_checkpointing:
        activations = tokens * (shape.layers * width * shape.hidden + layer)
    else:
        activations = tokens * shape.layers * layer
    chunk = min(trainer.logprob_chunk, tokens)
    head = 4 * (2 * chunk * min(TILE, shape.vocabulary) + 2 * tokens * shape.hidden)
    yield Item("activations", activations, certain=False)
    yield Item("logits", head, certain=False)
    if config.algo.kl.offload and size.reference > activations + head:
        yield Item("KL reference in use", size.reference - activations - head, certain=False)


def _engine_activations(config: RunConfig, shape: Shape, device: Device) -> int:
    """A few rows of each width for every token of a step, logits and their softmax for every sequence, and on a CPU
    the head's weight in fp32."""
    engine, width = config.engine, BYTES[config.model.dtype]
    rows = engine.max_num_batched_tokens * width * (4 * shape.hidden + 3 * shape.mlp // engine.tensor_parallel)
    logits = 2 * 4 * engine.max_num_seqs * shape.vocabulary
    upcast = 4 * shape.vocabulary * shape.hidden // engine.tensor_parallel
    return rows + logits + (upcast if device == "cpu" and config.model.dtype != "float32" else 0)
