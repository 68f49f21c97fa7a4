"""Rollout files hold what was sampled, exactly, in the shape that jq and pandas expect."""

import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelinerl.errors import DataError
from pipelinerl.metrics.rollouts import GroupRecord, RolloutWriter, read_rollouts
from pipelinerl.types import (
    Completion,
    GroupMeta,
    Outcome,
    Rollout,
    RolloutGroup,
    RolloutMeta,
    Turn,
    VersionSpan,
)


def turn(tokens: list[int], logprobs: list[float], spans: tuple[VersionSpan, ...], text: str = "21") -> Turn:
    completion = Completion(np.array(tokens, np.int32), np.array(logprobs, np.float32), spans, "stop", text)
    return Turn(np.array([1, 2, 3], np.int32), completion)


def rollout(*turns: Turn, reward: float = 1.0, outcome: Outcome = Outcome.OK) -> Rollout:
    return Rollout(turns, reward, outcome, {"match": reward}, prompt_text="sort 12", detail="")


def one_turn(text: str = "21") -> Turn:
    return turn([7, 8, 9], [-0.1, -2.5, 0.0], (VersionSpan(4, 0, 2), VersionSpan(5, 2, 3)), text)


def record(group_id: int, *rollouts: Rollout) -> GroupRecord:
    group = RolloutGroup(group_id, f"train/{group_id}", rollouts)
    meta = GroupMeta(group_id, group.problem_id, 1, tuple(RolloutMeta.of(item) for item in rollouts), 0.5)
    return meta, group, [0.5 - index for index in range(len(rollouts))]


def test_single_turn_line_has_everything_at_the_top_level(tmp_path: Path) -> None:
    RolloutWriter(tmp_path, None).write(12, [record(3, rollout(one_turn()), rollout(one_turn("12"), reward=0.0))])
    lines = (tmp_path / "rollouts" / "step_000012.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {
        "step": 12, "group_id": 3, "problem_id": "train/3", "rollout": 1, "worker": 1, "reward": 0.0,
        "advantage": -0.5, "outcome": "ok", "detail": "", "components": {"match": 0.0}, "prompt": "sort 12",
        "completion": "12", "completion_tokens": 3, "finish_reason": "stop", "weight_versions": [[4, 0, 2], [5, 2, 3]],
        "prompt_ids": [1, 2, 3], "completion_ids": [7, 8, 9], "logprobs": [-0.1, -2.5, 0.0],
    }  # fmt: skip


def test_more_turns_are_kept_apart(tmp_path: Path) -> None:
    second = turn([10], [-1.0], (VersionSpan(5, 0, 1),), "final")
    RolloutWriter(tmp_path, None).write(1, [record(0, rollout(one_turn(), second))])
    [line] = read_rollouts(tmp_path, step=1)
    assert "completion_ids" not in line and line["completion"] == "final" and line["completion_tokens"] == 4
    assert [part["completion_ids"] for part in line["turns"]] == [[7, 8, 9], [10]]
    assert [part["weight_versions"] for part in line["turns"]] == [[[4, 0, 2], [5, 2, 3]], [[5, 0, 1]]]
    assert line["turns"][0]["context_ids"] == [1, 2, 3] and line["turns"][1]["completion"] == "final"


def test_an_episode_that_never_sampled_is_still_a_line(tmp_path: Path) -> None:
    RolloutWriter(tmp_path, None).write(1, [record(0, rollout(outcome=Outcome.ENV_ERROR, reward=math.nan))])
    [line] = read_rollouts(tmp_path)
    assert (line["outcome"], line["completion"], line["turns"]) == ("env_error", "", [])
    assert math.isnan(line["reward"]) and math.isnan(line["components"]["match"])


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_logprobs_read_back_to_the_same_float32(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    sampled = turn(list(range(len(values))), values, (VersionSpan(0, 0, len(values)),))
    RolloutWriter(run_dir, None).write(0, [record(0, rollout(sampled))])
    [line] = read_rollouts(run_dir)
    assert np.array(line["logprobs"], np.float32).tolist() == np.array(values, np.float32).tolist()


@pytest.mark.parametrize("text", ["nan", "line\nbreak \u2028", "\ud800 half a pair", "日本 🎲", '"quoted" \\'])
def test_hostile_text_comes_back_as_it_was(tmp_path: Path, text: str) -> None:
    RolloutWriter(tmp_path, None).write(0, [record(0, rollout(one_turn(text)))])
    assert [line["completion"] for line in read_rollouts(tmp_path)] == [text]
    (tmp_path / "rollouts" / "step_000000.jsonl").read_bytes().decode("utf-8")  # valid UTF-8 for jq


def test_limit_counts_groups_of_a_step(tmp_path: Path) -> None:
    writer = RolloutWriter(tmp_path, 3)
    groups = [record(index, rollout(one_turn())) for index in range(5)]
    writer.write(1, groups[:2])
    writer.write(1, groups[2:])
    writer.write(2, groups[4:])
    assert [(line["step"], line["group_id"]) for line in read_rollouts(tmp_path)] == [(1, 0), (1, 1), (1, 2), (2, 4)]


def test_limit_zero_writes_nothing(tmp_path: Path) -> None:
    RolloutWriter(tmp_path, 0).write(1, [record(0, rollout(one_turn()))])
    assert read_rollouts(tmp_path) == [] and not (tmp_path / "rollouts").exists()


def test_a_step_done_again_after_a_resume_replaces_the_first(tmp_path: Path) -> None:
    RolloutWriter(tmp_path, None).write(5, [record(0, rollout(one_turn()))])
    RolloutWriter(tmp_path, None).write(5, [record(9, rollout(one_turn()))])
    assert [line["group_id"] for line in read_rollouts(tmp_path, 5)] == [9]


def test_threads_do_not_mix_lines(tmp_path: Path) -> None:
    writer = RolloutWriter(tmp_path, None)
    calls = [(1, [record(index, *[rollout(one_turn())] * 4)]) for index in range(12)]
    threads = [threading.Thread(target=writer.write, args=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [(line["group_id"], line["rollout"]) for line in read_rollouts(tmp_path, 1)]
    assert sorted(found) == [(group, index) for group in range(12) for index in range(4)]
    assert all(found[at] == (found[at][0], at % 4) for at in range(48))  # a group's lines stay together


def test_a_step_that_was_not_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"step_000007\.jsonl does not exist"):
        read_rollouts(tmp_path, step=7)
