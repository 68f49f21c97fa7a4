"""How runs end: the right exit code, one line of cause, no process left. Real processes, really killed.

Ctrl-C ends a run of test_main_job.py, SIGTERM and a full disk end those of test_faults.py.
"""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelinerl.errors import EXIT_BUDGET_SPENT, EXIT_RECOVERABLE, EXIT_SIGTERM
from tests.e2e.harness import TrainCommand, ledger_of, train_records

Start = Callable[..., TrainCommand]


@pytest.fixture
def start(tmp_path: Path, random_model: Path) -> Iterator[Start]:
    """Starts endless runs of a random model."""
    commands: list[TrainCommand] = []

    def start(*overrides: str) -> TrainCommand:
        sizes = ["steps=100000", "batch.groups_per_step=4", "batch.group_size=4", "eval.at_start=false"]
        sizes += ["parity.preflight=off"]
        command = TrainCommand(tmp_path / "run", [f"model.path={random_model}", *sizes, *overrides])
        commands.append(command)
        return command

    yield start
    for command in commands:
        command.close()


def test_sigterm_during_start_up_stops_cleanly(start: Start) -> None:
    run = start()
    run.wait_for_line("starting engines")
    run.process.terminate()
    assert run.exit_code(90) == EXIT_SIGTERM, run.output
    assert run.leftovers() == []


def test_an_engine_that_dies_again_and_again_is_retired_and_the_last_of_them_ends_the_run(start: Start) -> None:
    """Other processes that die are in test_recovery.py and test_faults.py."""
    sizes = ["engine.count=2", "engine.max_restarts=1", "trainer.warmup_steps=0", "metrics.plots=false"]
    run = start(*sizes, "reward.length_penalty=1")
    run.wait_for_step(2)
    actors = run.processes_named("ray::_AsyncHost")
    run.processes_named("VLLM::EngineCore")[0].kill()
    run.wait_until(lambda: set(run.processes_named("ray::_AsyncHost")) - set(actors), "another actor", 120)
    for process in set(run.processes_named("ray::_AsyncHost")) - set(actors):
        process.kill()
    run.wait_for_line("engine.max_restarts=1 are spent", 120)
    run.wait_for_step(len(train_records(run.run_dir)) + 3, 120)
    assert [record["fleet/engines"] for record in train_records(run.run_dir)[-2:]] == [1, 1]

    run.process_named("VLLM::EngineCore").kill()  # the trainer takes steps that no engine is there for
    run.wait_until(lambda: re.search(r"engine \d: serves version", run.output), "the other engine to be back", 150)
    run.wait_for_step(len(train_records(run.run_dir)) + 5, 120)
    run.process_named("VLLM::EngineCore").kill()
    assert run.exit_code(120) == EXIT_RECOVERABLE, run.output
    assert run.leftovers() == []
    [first, last] = re.findall(r"engine (\d): engine\.max_restarts=1 are spent", run.output)
    [error] = re.findall("^pipelinerl: error: (.*)$", run.output, re.MULTILINE)
    assert first != last and error.startswith(
        f"0 of 2 engines are left and engine.min_count=1 are needed: engine {last} died 2 times"
    )
    assert "Traceback" not in run.output
    ledger_of(run.run_dir)
    assert any(record.get("sync/params_changed", 0) > 0 for record in train_records(run.run_dir))


def test_weights_without_finite_logprobs_cost_steps_and_completions_and_then_the_run(start: Start) -> None:
    """Step 1 makes weights of 1e30. Step 2 trains on completions of before; then the engine gets them."""
    sizes = ["trainer.lr=1e30", "trainer.warmup_steps=0", "weights.every=2", "batch.max_dropped_groups_in_a_row=8"]
    sizes += ["sampling.max_tokens=64", "engine.max_model_len=128", "metrics.plots=false"]
    run = start(*sizes, "reward.length_penalty=1")
    assert run.exit_code(480) == EXIT_BUDGET_SPENT, run.output
    assert run.leftovers() == []
    errors = re.findall("^pipelinerl: error: (.*)$", run.output, re.MULTILINE)
    assert len(errors) == 1 and "Traceback" not in run.output, run.output
    assert errors[0].startswith("8 groups in a row were unusable (batch.max_dropped_groups_in_a_row), by reason: 8 err")
    assert re.search(r"the engine returned \d+ of \d+ logprobs that are not finite$", errors[0]), errors[0]

    first, second, *more = train_records(run.run_dir)
    assert first["optim/skipped"] == 0 and 0 < first["optim/grad_norm"] < math.inf
    assert all(record["optim/skipped"] == 1 and math.isnan(record["optim/loss"]) for record in (second, *more))
    ledger = ledger_of(run.run_dir)
    assert list(ledger["trained"]) == ["1"], "no weights were made of what is not finite"
    assert ledger["dropped"].keys() == {"not_finite", "errored"} and len(ledger["dropped"]["errored"]) >= 8
