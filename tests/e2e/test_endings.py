"""How runs end: the right exit code, one line of cause, no process left. Real processes, really killed."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelinerl.errors import EXIT_RECOVERABLE, EXIT_SIGINT, EXIT_SIGTERM
from tests.e2e.harness import TrainCommand

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


def test_ctrl_c_stops_cleanly_and_keeps_what_there_is(start: Start) -> None:
    run = start()
    run.wait_for_step(3)
    assert any("grader_child" in title for title in run.leftovers(grace_s=0)), "the harness sees all processes"
    run.interrupt_group()
    assert run.exit_code(60) == EXIT_SIGINT, run.output
    assert run.leftovers() == []
    assert (run.run_dir / "plots" / "reward.png").exists()
    assert "Traceback" not in run.output


def test_sigterm_during_start_up_stops_cleanly(start: Start) -> None:
    run = start()
    run.wait_for_line("starting engines")
    run.process.terminate()
    assert run.exit_code(90) == EXIT_SIGTERM, run.output
    assert run.leftovers() == []


@pytest.mark.parametrize(
    ("victim", "cause"),
    [
        ("VLLM::EngineCore", "engine 0"),
        ("grader_child", "grader"),
        ("ray::_SyncHost", "trainer rank 0"),
    ],
)
def test_without_restarts_a_killed_process_ends_the_run_with_its_name(start: Start, victim: str, cause: str) -> None:
    run = start("engine.max_restarts=0", "trainer.max_restarts=0")
    run.wait_for_step(2)
    run.process_named(victim).kill()
    assert run.exit_code(90) == EXIT_RECOVERABLE, run.output
    assert run.leftovers() == []
    errors = [line for line in run.output.splitlines() if line.startswith("pipelinerl: error:")]
    assert len(errors) == 1 and cause in errors[0], run.output
