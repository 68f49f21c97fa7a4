"""The learning rate over the updates of a run, worked out by hand, and which parameters decay."""

import math

import pytest
import torch
from torch import nn

from pipelinerl.config.schema import TrainerConfig
from pipelinerl.trainer.optimizer import make_optimizer, make_scheduler


def model() -> nn.Module:
    return nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2), nn.LayerNorm(2))


def rates(updates: int, **trainer: object) -> list[float]:
    config = TrainerConfig.model_validate({"lr": 8.0, **trainer})
    optimizer = make_optimizer(model(), config)
    scheduler = make_scheduler(optimizer, config, updates)
    found = []
    for _ in range(updates):
        found.append(float(optimizer.param_groups[-1]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0, 4, 8, 8, 8, 8]),
        ("linear", [0, 4, 8, 6, 4, 2]),
        ("cosine", [0, 4, 8, 4 + 4 * math.sqrt(0.5), 4, 4 - 4 * math.sqrt(0.5)]),
    ],
)
def test_rates_after_a_warm_up_of_two_of_six_updates(schedule: str, expected: list[float]) -> None:
    assert rates(6, schedule=schedule, warmup_steps=2) == pytest.approx(expected)


def test_without_a_warm_up_the_first_update_has_the_full_rate() -> None:
    assert rates(2, schedule="linear") == [8, 4]


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_only_matrices_decay(name: str) -> None:
    trained = model()
    config = TrainerConfig.model_validate({"optimizer": name, "weight_decay": 0.5})
    decay = {
        id(parameter): group["weight_decay"]
        for group in make_optimizer(trained, config).param_groups
        for parameter in group["params"]
    }
    assert {name: decay[id(p)] for name, p in trained.named_parameters()} == {
        "0.weight": 0.5,
        "1.weight": 0.5,
        "1.bias": 0,
        "2.weight": 0,
        "2.bias": 0,
    }


def test_frozen_parameters_are_not_the_optimizers() -> None:
    trained = model()
    trained[0].requires_grad_(False)  # type: ignore[index]
    groups = make_optimizer(trained, TrainerConfig()).param_groups
    assert sum(len(group["params"]) for group in groups) == 4


def test_momentum_and_betas_are_the_configured_ones() -> None:
    def of(name: str) -> torch.optim.Optimizer:
        return make_optimizer(model(), TrainerConfig.model_validate({"optimizer": name, "betas": (0.6, 0.7)}))

    assert of("sgd").param_groups[0]["momentum"] == 0.6
    assert isinstance(of("adamw"), torch.optim.AdamW) and of("adamw").param_groups[0]["betas"] == (0.6, 0.7)
    assert isinstance(of("adam"), torch.optim.Adam) and not isinstance(of("adam"), torch.optim.AdamW)
