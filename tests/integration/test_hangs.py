"""Hang reports of a run, on fakes: what is in them, and that they hide nothing. With real processes: tests/e2e."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelinerl import loop
from pipelinerl.errors import Stalled
from pipelinerl.hangs import HangReports
from pipelinerl.loop import train
from tests.unit.fakes import fake_run
from tests.unit.test_loop import STALL_SOON


async def test_a_stall_is_reported_with_what_the_driver_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "WATCH_INTERVAL_S", 0.01)
    said: list[str] = []
    hangs = HangReports(tmp_path, said.append)
    hangs.run = run = fake_run(tmp_path, *STALL_SOON, "cluster.stall_timeout_s=0.3")
    run.fleet.gate.close()
    with hangs.on_signal(), pytest.raises(Stalled):
        async with hangs.on_stall():
            await train(run)
    report = tmp_path / "hang_report" / "1"
    assert len(said) == 1 and str(report) in said[0] and "cluster.stall_timeout_s" in said[0]
    facts = json.loads((report / "facts.json").read_text())
    assert "no group and no step was finished" in facts["why"]
    assert (facts["groups_running"], facts["groups_ready"]) == (6, 0)
    assert facts["last_weight_update"]["version"] == 0 and facts["seconds_without_progress"] >= 0.3
    assert "==== driver, pid" in (report / "stacks.txt").read_text()


async def test_sigusr1_reports_and_the_run_goes_on_and_afterwards_it_does_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    hangs = HangReports(tmp_path, said.append)
    with hangs.on_signal():
        os.kill(os.getpid(), signal.SIGUSR1)
        async with asyncio.timeout(20):
            while not said:
                await asyncio.sleep(0.05)
    assert (tmp_path / "hang_report" / "1" / "stacks.txt").exists()
    os.kill(os.getpid(), signal.SIGUSR1)
    await asyncio.sleep(0.2)
    assert len(said) == 1, "the clean-up of a run is not ended by somebody who asks twice"


async def test_a_report_that_cannot_be_written_does_not_hide_the_stall(tmp_path: Path) -> None:
    (tmp_path / "hang_report").write_text("in the way")
    said: list[str] = []
    with pytest.raises(Stalled, match="nothing moves"):
        async with HangReports(tmp_path, said.append).on_stall():
            raise Stalled("nothing moves")
    assert len(said) == 1 and said[0].startswith("no hang report")


def test_the_driver_starts_without_the_heavy_libraries() -> None:
    heavy = "torch", "transformers", "vllm", "deepspeed", "wandb", "matplotlib"
    program = f"import pipelinerl.run, sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"
