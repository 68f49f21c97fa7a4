"""metrics.jsonl is strict, survives a crash, and outlives its mirrors."""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from pipelinerl.errors import DataError, EnvironmentProblem
from pipelinerl.metrics.log import Kind, MetricsLog, read_metrics


class Recorder:
    def __init__(self, fail_at: int | None = None, fail_close: bool = False) -> None:
        self.seen: list[tuple[Kind, int, dict[str, float]]] = []
        self.calls = self.closed = 0
        self.fail_at, self.fail_close = fail_at, fail_close

    def write(self, kind: Kind, step: int, values: Mapping[str, float]) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise ConnectionResetError("server gone")
        self.seen.append((kind, step, dict(values)))

    def close(self) -> None:
        self.closed += 1
        if self.fail_close:
            raise OSError("already dead")


@pytest.fixture
def open_log() -> Iterator[Callable[..., MetricsLog]]:
    """MetricsLog, closed when the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda *args: stack.enter_context(contextlib.closing(MetricsLog(*args)))


def test_lines_are_on_disk_at_once_and_strict_json(tmp_path: Path, open_log: Callable[..., MetricsLog]) -> None:
    log = open_log(tmp_path)
    log.log("train", 1, {"reward/mean": 0.5, "policy/ess": math.nan, "optim/grad_norm": math.inf, "x": -math.inf})

    def refuse(literal: str) -> None:
        raise AssertionError(f"{literal} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)  # before close()
    assert list(line)[:3] == ["kind", "step", "time/elapsed_s"]
    assert (line["policy/ess"], line["optim/grad_norm"], line["x"]) == ("nan", "inf", "-inf")
    [record] = read_metrics(log.path)
    assert (record["kind"], record["step"], record["reward/mean"]) == ("train", 1, 0.5)
    assert math.isnan(record["policy/ess"]) and record["optim/grad_norm"] == math.inf and record["x"] == -math.inf


def test_sinks_see_numbers_and_the_elapsed_time(tmp_path: Path, open_log: Callable[..., MetricsLog]) -> None:
    sink = Recorder()
    log = open_log(tmp_path, [sink])
    log.log("eval", 0, {"eval/sort/accuracy": 0.25})
    [(kind, step, values)] = sink.seen
    assert (kind, step, values["eval/sort/accuracy"]) == ("eval", 0, 0.25)
    assert values["time/elapsed_s"] >= 0


def test_a_failing_sink_is_switched_off_with_one_warning(
    tmp_path: Path, open_log: Callable[..., MetricsLog], caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = Recorder(fail_at=2, fail_close=True), Recorder()
    log = open_log(tmp_path, [bad, good])
    with caplog.at_level(logging.WARNING):
        for step in range(4):
            log.log("train", step, {"reward/mean": 0.0})
    assert bad.calls == 2 and [step for _, step, _ in good.seen] == [0, 1, 2, 3]
    [warning] = caplog.records
    assert "Recorder switched off: ConnectionResetError: server gone" in warning.getMessage()
    log.close()
    log.close()
    assert (bad.closed, good.closed) == (1, 1)
    assert [record["step"] for record in read_metrics(log.path)] == [0, 1, 2, 3]


def test_a_torn_last_line_is_left_out_and_repaired_on_resume(
    tmp_path: Path, open_log: Callable[..., MetricsLog]
) -> None:
    log = open_log(tmp_path)
    log.log("train", 1, {"reward/mean": 0.5})
    log.close()
    with log.path.open("ab") as file:
        file.write(b'{"kind": "train", "step": 2, "rew')
    assert [record["step"] for record in read_metrics(log.path)] == [1]
    resumed = open_log(tmp_path)
    resumed.log("train", 2, {"reward/mean": 0.6})
    assert [(record["step"], record["reward/mean"]) for record in read_metrics(log.path)] == [(1, 0.5), (2, 0.6)]


def test_a_complete_last_line_without_newline_is_kept_on_resume(
    tmp_path: Path, open_log: Callable[..., MetricsLog]
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "time/elapsed_s": 30.0}')
    resumed = open_log(tmp_path)
    resumed.log("train", 2, {})
    records = read_metrics(resumed.path)
    assert [record["step"] for record in records] == [1, 2]
    assert records[1]["time/elapsed_s"] >= 30.0  # time goes on where the first life ended


def test_damage_before_the_last_line_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\nnonsense\n{"kind": "train", "step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)
    with pytest.raises(DataError, match="cannot read"):
        read_metrics(tmp_path / "absent.jsonl")


def test_a_full_disk_ends_the_run_and_names_the_file(tmp_path: Path, open_log: Callable[..., MetricsLog]) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = open_log(tmp_path)
    with pytest.raises(EnvironmentProblem, match=r"cannot write .*metrics\.jsonl: No space left"):
        log.log("train", 1, {"reward/mean": 0.5})
    log.close()


def test_a_run_directory_that_is_a_file_is_an_environment_problem(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(EnvironmentProblem, match=r"cannot open .*metrics\.jsonl"):
        MetricsLog(tmp_path / "run")


def test_reserved_names_are_refused(tmp_path: Path, open_log: Callable[..., MetricsLog]) -> None:
    with pytest.raises(AssertionError, match="reserved"):
        open_log(tmp_path).log("train", 1, {"step": 3.0})
