"""DeepSpeed, driven through accelerate: the one place that knows either of them.

DeepSpeed divides gradients by the number of ranks and, if asked, by the number of accumulation steps. The trainer's
loss already has the global token count as its denominator, so the first is undone by a factor `world_size` in the
loss (see step.py) and the second is never asked for (`scale_wrt_gas=False`).
"""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn
from transformers import get_scheduler

from pipelinerl.config.schema import TrainerConfig


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
    """A model with its optimizer and schedule, ready for micro-batches and steps."""

    def __init__(self, model: nn.Module, config: TrainerConfig, bf16: bool, total_steps: int, device: torch.device):
        optimizer = torch.optim.AdamW(
            _decay_groups(model, config.weight_decay), lr=config.lr, betas=config.betas, eps=config.eps
        )
        name = {"constant": "constant_with_warmup"}.get(config.schedule, config.schedule)
        scheduler = get_scheduler(name, optimizer, config.warmup_steps, num_training_steps=total_steps)
        plugin = DeepSpeedPlugin(hf_ds_config=_deepspeed_config(config, bf16))
        # `cpu=True` would make accelerate fall back from DeepSpeed to DDP; the device comes from the environment.
        self._accelerator = Accelerator(deepspeed_plugin=plugin, step_scheduler_with_optimizer=False)
        prepared = self._accelerator.prepare(model, optimizer, scheduler)
        self._engine, self._optimizer, self._scheduler = prepared
        self.device = device

    def forward(self, *args: Any) -> Any:
        """The model's forward pass."""
        return self._engine(*args)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients; `last` marks the micro-batch after which `step` follows."""
        self._accelerator.gradient_state._set_sync_gradients(last)
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        self._engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self._engine.step()  # not a boundary: counts the micro-batch, changes no weight

    def step(self) -> tuple[bool, float]:
        """Clip, update and clear the gradients. Returns (applied, norm of the whole gradient before clipping).

        Not applied means that a gradient was not finite on some rank: ZeRO stages 1 and 2 then leave the weights
        alone, on all ranks. (Stage 0 in fp32 would apply them.)
        """
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        if applied:
            self._scheduler.step()
        norm = self._engine.get_global_grad_norm()
        return applied, float("nan") if norm is None else float(norm)

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self._scheduler.get_last_lr()[0])


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only, not on norms and biases."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _deepspeed_config(config: TrainerConfig, bf16: bool) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # packed rows; the real sizes vary and DeepSpeed has no use for them
        "gradient_accumulation_steps": 1,  # boundaries are set by hand
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": bf16},
        # Gradients of micro-batches add up in fp32: in bf16 they would be off by percents after many of them.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
