"""The main job as a newcomer runs it, shortened: two scripts, a run directory, a model that other programs load."""

import json
import math
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipelinerl.config.schema import SortTask
from pipelinerl.errors import EXIT_SIGINT
from pipelinerl.metrics.evals import read_evaluation
from pipelinerl.metrics.log import read_metrics
from pipelinerl.metrics.rollouts import read_rollouts
from pipelinerl.tasks.registry import build_task
from tests.e2e.harness import TrainCommand, ledger_of

ROOT = Path(__file__).parents[2]
STEPS = 12


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run directory and output of `scripts/quickstart.sh`, started from another directory."""
    folder = tmp_path_factory.mktemp("quickstart")
    overrides = [f"steps={STEPS}", f"run_dir={folder / 'run'}", "metrics.rollout_groups_per_step=null"]
    done = subprocess.run(
        [ROOT / "scripts" / "quickstart.sh", *overrides], cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run", done.stdout


def of_kind(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] == kind]


def test_the_quickstart_leaves_everything_it_promises(quickstart: tuple[Path, str]) -> None:
    run_dir, output = quickstart
    for name in ("config.yaml", "settings.json", "metrics.jsonl", "plots/reward.png", "model/model.safetensors"):
        assert (run_dir / name).is_file(), name
    assert list(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert sum(f"/{STEPS}  reward" in line for line in output.splitlines()) == STEPS  # one plain line per step
    assert "wandb sync" in output and "Traceback" not in output
    engine = json.loads((run_dir / "settings.json").read_text())["engines"][0]
    assert engine["logprobs_mode"] == "processed_logprobs" and engine["head_dtype"] == "float32"
    assert not engine["prefix_caching"] and not engine["async_scheduling"]


def test_the_quickstart_measures_what_it_did(quickstart: tuple[Path, str]) -> None:
    run_dir, _ = quickstart
    steps, evaluations = of_kind(run_dir, "train"), of_kind(run_dir, "eval")
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert [record["step"] for record in evaluations] == [0, STEPS]
    assert all(record["staleness/max"] <= 2 for record in steps)
    assert max(record["staleness/max"] for record in steps) > 0, "generation overlaps training"
    assert steps[0]["mismatch/abs_logprob_mean"] < 1e-4 and steps[0]["mismatch/tokens"] > 1000
    assert all(record.get("mismatch/abs_logprob_mean", 0) < 1e-4 for record in steps), "old KV is not mismatch"
    assert all(record["optim/skipped"] == 0 for record in steps)
    assert [record["sync/bytes"] > 1e6 for record in steps if "sync/bytes" in record].count(True) > len(steps) / 2


def test_every_trained_completion_is_on_file_with_its_provenance(quickstart: tuple[Path, str]) -> None:
    run_dir, _ = quickstart
    rows = read_rollouts(run_dir)
    groups = [row["group_id"] for row in rows]
    assert groups == sorted(groups) and len(rows) == STEPS * 64 * 8, "prompts are trained on in order of admission"
    for row in rows:
        spans = row["weight_versions"]
        assert spans[0][1] == 0 and spans[-1][2] == len(row["completion_ids"]) == len(row["logprobs"])
        assert all(end == start for (_, _, end), (_, start, _) in pairwise(spans))
        assert all(0 <= row["step"] - 1 - version <= 2 for version, _, _ in spans)
        assert all(logprob <= 0 for logprob in row["logprobs"])
        assert row["outcome"] != "ok" or row["reward"] in (0.0, 1.0)


def test_the_exported_model_reproduces_the_reported_accuracy(quickstart: tuple[Path, str]) -> None:
    """With transformers alone; an engine loads it in the next test."""
    run_dir, _ = quickstart
    reported = of_kind(run_dir, "eval")[-1]["eval/sort/accuracy"]
    assert transformers_accuracy(run_dir / "model") == pytest.approx(reported, abs=2 / 256)  # near ties, greedy


def test_the_eval_command_reproduces_the_last_evaluation_of_the_run(quickstart: tuple[Path, str]) -> None:
    run_dir, _ = quickstart
    command = TrainCommand(run_dir.parent / "evaluated", [f"--checkpoint={run_dir}"], command="eval")
    try:
        assert command.exit_code(480) == 0, command.output
        assert command.leftovers() == []
        assert "\n  avg@1 " in command.output and "Traceback" not in command.output
    finally:
        command.close()
    assert not (command.run_dir / "logs" / "trainer_rank_0.log").exists()  # engines only
    reported, measured = read_evaluation(run_dir, STEPS), read_evaluation(command.run_dir, 0)
    assert [row["problem_id"] for row in measured] == [row["problem_id"] for row in reported]
    pairs = list(zip(measured, reported, strict=True))
    assert sum(m["rewards"] != r["rewards"] for m, r in pairs) <= 2  # near ties among 256 greedy completions
    figure = json.loads((command.run_dir / "eval.json").read_text())["figures"]["avg@1"]
    assert figure["value"] == sum(row["rewards"][0] for row in measured) / 256
    assert figure["low"] < figure["value"] < figure["high"] and figure["problems"] == 256


def eval_problems() -> tuple[list[str], list[str]]:
    problems = build_task(SortTask(), seed=0).problems("eval")
    return [f"sort {p.data['digits']}" for p in problems], [p.data["answer"] for p in problems]


def transformers_accuracy(model_dir: Path) -> float:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    questions, answers = eval_problems()
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    outputs = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(text == answer for text, answer in zip(texts, answers, strict=True)) / len(answers)


def test_the_users_data_one_step_off_on_two_ranks_in_bf16_until_ctrl_c(
    quickstart: tuple[Path, str], tmp_path: Path
) -> None:
    """Fewer problems than a batch, and one of them has no room for an answer: it is counted, and the run goes on."""
    examples = (ROOT / "pipelinerl" / "tasks" / "data" / "word_problems.jsonl").read_text().splitlines()[:5]
    data = tmp_path / "mine.jsonl"
    data.write_text("\n".join([*examples, json.dumps({"prompt": "count " + "1 " * 600, "answer": "600"})]) + "\n")
    overrides = [
        "async.mode=one_step_off",
        "algo=reinforce_is",
        "task=jsonl",
        f"task.path={data}",
        "task.eval_fraction=0",
        f"model.path={ROOT / 'models' / 'tiny'}",
        "model.dtype=bfloat16",
        "trainer.ranks=2",
        "steps=100000",
        "batch.groups_per_step=8",
        "batch.group_size=4",
        "engine.max_model_len=512",
        "sampling.max_tokens=32",
        "eval.at_start=false",
        "parity.preflight=off",
        "metrics.wandb.mode=disabled",
    ]
    run = TrainCommand(tmp_path / "run", overrides)
    try:
        run.wait_for_step(3)
        assert any("grader_child" in title for title in run.leftovers(grace_s=0)), "the harness sees all processes"
        run.interrupt_group()
        assert run.exit_code(120) == EXIT_SIGINT, run.output
        assert run.leftovers() == []
        assert "Traceback" not in run.output
    finally:
        run.close()
    assert (run.run_dir / "plots" / "reward.png").exists()
    steps = of_kind(run.run_dir, "train")
    assert all(math.isfinite(value) for record in steps for name, value in record.items() if name != "kind")
    assert [record["staleness/max"] for record in steps] == [0, *[1] * (len(steps) - 1)]
    assert all(record["staleness/multi_version_frac"] == record["outcome/env_error"] == 0 for record in steps)
    for record in steps[:1]:  # those that the weights being trained have sampled
        assert record["mismatch/tokens"] == record["completion/tokens_sum"]
        assert 0 < record["mismatch/abs_logprob_mean"] < 2e-2  # bf16 kernels differ; a wrong head would give 0.1
    ledger = ledger_of(run.run_dir)
    assert {len(tickets) for tickets in ledger["trained"].values()} == {8} and len(ledger["trained"]) == len(steps)
    assert set(ledger["dropped"]) == {"prompt_too_long"}
    assert sum(record.get("groups/prompt_too_long", 0) for record in steps) > 0
    rows = read_rollouts(run.run_dir)
    assert all(row["problem_id"].startswith("train/") and "<|user|>" in row["prompt"] for row in rows)
    assert len({row["problem_id"] for row in rows}) <= 5
