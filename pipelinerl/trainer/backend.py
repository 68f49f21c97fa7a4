"""DeepSpeed, driven through accelerate: the one place that knows either of them.

DeepSpeed divides gradients by the number of ranks and, if asked, by the number of accumulation steps. The trainer's
loss already has the global token count as its denominator, so the first is undone by a factor `world_size` in the
loss (see step.py) and the second is never asked for (`scale_wrt_gas=False`).
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pipelinerl.config.schema import TrainerConfig
from pipelinerl.trainer.model import PolicyModel
from pipelinerl.trainer.optimizer import make_optimizer, make_scheduler, resume_scheduler
from pipelinerl.trainer.sharding import shard, use_outside


def init_process_group(
    device: torch.device, rank: int, world_size: int, address: str, port: int, timeout_s: float
) -> None:
    """Join the trainer ranks, with torch first and DeepSpeed on top of it. gloo on CPU, NCCL on GPU."""
    # accelerate and DeepSpeed read these, also when the group exists already.
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK="0",  # Ray shows each rank only its own device
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE="1",
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        ACCELERATE_USE_DEEPSPEED="true",
        ACCELERATE_TORCH_DEVICE=str(device),
    )
    import deepspeed

    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    if device.type == "cpu":
        # Its shared-memory collectives would be compiled with g++ for a minute and a half; gloo serves as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, dist_init_required=False)


class DeepSpeedBackend:
    """A model with its optimizer and schedule, ready for micro-batches and updates.

    One rule holds at every stage: when any element of the gradient is not finite on any rank, no rank applies the
    update, and optimizer state and schedule stay as they were.
    """

    def __init__(self, model: PolicyModel, config: TrainerConfig, bf16: bool, total_updates: int, device: torch.device):
        """`model` is in host memory and moves to the device here. Schedule: see `make_scheduler`."""
        self._stage = config.zero_stage
        self._max_norm = config.max_grad_norm
        settings = deepspeed_config(config, bf16, device)
        if self._stage == 3:
            shard(model, settings)
        model.to(device)
        optimizer = make_optimizer(model, config)
        self._scheduler = make_scheduler(optimizer, config, total_updates)
        plugin = DeepSpeedPlugin(hf_ds_config=settings)
        # `cpu=True` would make accelerate fall back from DeepSpeed to DDP; the device comes from the environment.
        self._accelerator = Accelerator(deepspeed_plugin=plugin, step_scheduler_with_optimizer=False)
        unset_hf_deepspeed_config()  # or every model that transformers loads from here on would be sharded too
        self._engine, self._optimizer = self._accelerator.prepare(model, optimizer)
        if self._stage == 3:
            # The policy multiplies with the head's weight without calling the head.
            use_outside(model, model.hf.get_output_embeddings().parameters())
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = device
        if self._stage == 0 and bf16:
            _undo_trial_step(self._engine.optimizer)
            for parameter in self._parameters:
                parameter.grad_dtype = torch.float32  # gradients of micro-batches add up in fp32

    def forward(self, *args: Any, **options: Any) -> Any:
        """The model's forward pass."""
        return self._engine(*args, **options)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients; `last` marks the micro-batch after which `step` follows."""
        self._accelerator.gradient_state._set_sync_gradients(last)
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        self._engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self._engine.step()  # not a boundary: counts the micro-batch, changes no weight

    def step(self, scale: float = 1.0) -> tuple[bool, float]:
        """Clip, update and clear the gradients. Returns (applied, norm of the whole gradient before clipping).

        Not applied means that the gradient was not finite; the norm is then infinite. The same on all ranks.

        Args:
            scale: above 0, the same on all ranks; the gradient is `scale` times what was accumulated.
        """
        if self._stage == 0:
            return self._apply(self._clip(scale))
        with _scaled_gradients(self._engine.optimizer, scale):
            return self._apply()

    def _apply(self, norm: float | None = None) -> tuple[bool, float]:
        """The update, with the norm where DeepSpeed does not know it."""
        if norm is not None and not math.isfinite(norm):
            self._engine.zero_grad()
            return False, math.inf
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        if applied:
            self._scheduler.step()
        return applied, float(self._engine.get_global_grad_norm()) if norm is None else norm

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return float(self._scheduler.get_last_lr()[0])

    @property
    def optimizer(self) -> Any:
        """What DeepSpeed made of the optimizer; at stage 0 in fp32 torch's own."""
        return self._engine.optimizer

    @property
    def scheduled(self) -> int:
        """Applied updates, as the schedule of the learning rate counts them."""
        return int(self._scheduler.last_epoch)

    def resume_schedule(self, scheduled: int) -> None:
        """Set the learning rate to that of the configuration after so many applied updates."""
        resume_scheduler(self._scheduler, scheduled)

    def _clip(self, scale: float) -> float:
        """Stage 0, where DeepSpeed gives no norm in fp32 and applies a NaN. All ranks hold the same mean gradients."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = scale * float(nn.utils.get_total_norm(gradients))
        factor = scale * min(1.0, self._max_norm / (norm + 1e-6))  # as the other stages do
        if factor != 1:
            for gradient in gradients:
                gradient.mul_(factor)
        return norm


@contextmanager
def _scaled_gradients(optimizer: Any, scale: float) -> Iterator[None]:
    """What a sharded optimizer has accumulated counts `scale` times in norm, clipping and update."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    if isinstance(optimizer, BF16_Optimizer):  # bf16 at stage 1
        for gradients in optimizer.fp32_groups_gradients_flat:
            gradients.mul_(scale)
        yield
        return
    # The others take gradients for those of a loss times `loss_scale` and divide by it first, wherever they keep them.
    assert optimizer.loss_scale == 1.0, optimizer.loss_scale
    optimizer.loss_scale = 1 / scale
    try:
        yield
    finally:
        optimizer.loss_scale = 1.0


def _undo_trial_step(optimizer: Any) -> None:
    """DeepSpeed's optimizer of bf16 stage 0 allocates its state by a step on zero gradients, which counts as the first
    in Adam's bias correction and applies weight decay."""
    optimizer.optimizer.state.clear()
    with torch.no_grad():
        for masters, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, parameter in zip(masters, parameters, strict=True):
                master.copy_(parameter)


def deepspeed_config(config: TrainerConfig, bf16: bool, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's own configuration."""
    stage = config.zero_stage
    offload = {"device": "cpu", "pin_memory": device.type != "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # packed rows; the real sizes vary and DeepSpeed has no use for them
        "gradient_accumulation_steps": 1,  # boundaries are set by hand
        "gradient_clipping": config.max_grad_norm if stage else 0.0,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        # Gradients of micro-batches add up in fp32: in bf16 they would be off by percents after many of them. Stage 0
        # knows no dtype but the model's and is told by other means.
        "data_types": {"grad_accum_dtype": "bf16" if bf16 and stage == 0 else "fp32"},
        # Stages 0 and 1 reduce once in an update, what was added up in fp32; 2 and 3 every micro-batch, as computed.
        **({"communication_data_type": "fp32"} if stage < 2 else {}),
        "zero_optimization": {
            "stage": stage,
            "memory_efficient_linear": False,  # see sharding.ShardedLinear
            "stage3_param_persistence_threshold": 8192,  # elements: norms and biases stay whole
            **({"offload_optimizer": offload} if config.offload_optimizer else {}),
            **({"offload_param": offload} if config.offload_parameters else {}),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused one needs no compiler on the machine
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
