"""The user's own rows: what is read, what is refused and with which words."""

import json
from pathlib import Path
from typing import Any

import pytest

import pipelinerl.tasks
from pipelinerl.config.schema import JsonlTask
from pipelinerl.errors import DataError
from pipelinerl.tasks.base import Message
from pipelinerl.tasks.jsonl import JsonlProblems

WORD_PROBLEMS = Path(pipelinerl.tasks.__path__[0]) / "data" / "word_problems.jsonl"
GOOD = '{"prompt": "1+1?", "answer": 2}'


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return path


def load(path: Path, **settings: Any) -> JsonlProblems:
    return JsonlProblems(JsonlTask(path=str(path), **{"eval_fraction": 0.0, **settings}))


def rows(count: int) -> list[str]:
    return [json.dumps({"prompt": f"question {i}?", "answer": i}) for i in range(count)]


def test_rows_become_problems_with_line_numbers_and_extra_keys(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl", '{"prompt": "1+1?", "answer": 2, "level": "easy"}', '{"prompt": "Pi?", "answer": 3.14}'
    )
    first, second = load(path).problems("train")
    assert (first.id, dict(first.data)) == ("train/1", {"prompt": "1+1?", "answer": "2", "level": "easy"})
    assert (second.id, second.data["answer"]) == ("train/2", "3.14")


def test_windows_line_ends_and_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + GOOD.encode() + b"\r", '{"prompt": "é?", "answer": "7"}')
    assert [p.data["prompt"] for p in load(path).problems("train")] == ["1+1?", "é?"]


BAD_ROWS = [
    ("{'prompt': 1}", "not JSON"),
    ('{"prompt": "a", "answer": 1', "not JSON"),
    ("", "line is empty"),
    ("[1, 2]", "JSON list"),
    ('{"answer": 1}', "'prompt' is missing; the row has 'answer'"),
    ('{"prompt": "a", "response": 1}', "'answer' is missing; the row has 'prompt', 'response'"),
    ("{}", "the row has no keys"),
    ('{"prompt": 7, "answer": 1}', "'prompt' is 7"),
    ('{"prompt": "  ", "answer": 1}', "'prompt' is \"  \""),
    ('{"prompt": [{"role": "user"}], "answer": 1}', "'prompt' is"),
    ('{"prompt": "a", "answer": ""}', "'answer' is"),
    ('{"prompt": "a", "answer": null}', "'answer' is null"),
    ('{"prompt": "a", "answer": true}', "'answer' is true"),
    ('{"prompt": "a", "answer": NaN}', "NaN is not JSON"),
    ('{"prompt": "a", "answer": 1e999}', "'answer' is Infinity"),
    ('{"prompt": "a", "answer": "none"}', "has no number in it; give one or use task.scorer=exact_match"),
    (b'{"prompt": "\xff", "answer": 1}', "byte 12 is not UTF-8"),
    ("[" * 100_000, "nested too deeply"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_ROWS, ids=[reason for _, reason in BAD_ROWS])
def test_a_bad_row_is_an_error_with_file_and_line_or_skipped_and_counted(
    tmp_path: Path, line: str | bytes, reason: str
) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD, line, GOOD)
    with pytest.raises(DataError) as caught:
        load(path)
    text = str(caught.value)
    assert text.startswith(f"{path}:2: ") and reason in text and "task.on_bad_row=skip" in text and "\n" not in text

    task = load(path, on_bad_row="skip")
    assert [p.id for p in task.problems("train")] == ["train/1", "train/3"]
    assert task.skipped_rows == 1
    assert task.skipped[0].startswith(f"{path}:2: ") and reason in task.skipped[0]


def test_an_answer_without_number_suits_exact_match(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"prompt": "Capital of France?", "answer": "Paris"}')
    assert load(path, scorer="exact_match").problems("train")[0].data["answer"] == "Paris"


def test_files_without_usable_rows_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none.jsonl: No such file"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"cannot read .*directory"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"empty.jsonl is empty"):
        load(write(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match=r"none of its 2 rows is usable; the first: .*bad.jsonl:1: not JSON"):
        load(write(tmp_path / "bad.jsonl", "nonsense", "{}"), on_bad_row="skip")


def test_held_out_rows_depend_on_the_prompt_alone(tmp_path: Path) -> None:
    lines = rows(400)
    path, reverse = write(tmp_path / "a.jsonl", *lines), write(tmp_path / "b.jsonl", *reversed(lines))
    task, other = load(path, eval_fraction=0.25), load(reverse, eval_fraction=0.25)
    held_out = {p.data["prompt"] for p in task.problems("eval")}
    assert held_out == {p.data["prompt"] for p in other.problems("eval")}
    assert not held_out & {p.data["prompt"] for p in task.problems("train")}
    assert len(task.problems("train")) + len(held_out) == 400
    assert 65 <= len(held_out) <= 135  # 100 expected; 4 standard deviations of sqrt(400/4*3/4) = 8.7


def test_a_file_too_small_for_its_eval_fraction_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD)
    with pytest.raises(DataError, match=r"eval_fraction=1e-06 none of its 1 rows is held out.*task.eval_path"):
        load(path, eval_fraction=1e-6)
    with pytest.raises(DataError, match=r"none of its 1 rows is left to train on"):
        load(path, eval_fraction=0.999999)
    assert load(path, eval_fraction=0.0).problems("eval") == []


def test_an_eval_file_is_the_eval_split(tmp_path: Path) -> None:
    train, held_out = write(tmp_path / "train.jsonl", *rows(30)), write(tmp_path / "eval.jsonl", GOOD)
    task = load(train, eval_path=str(held_out), eval_fraction=0.1)
    assert len(task.problems("train")) == 30
    assert [(p.id, p.data["prompt"]) for p in task.problems("eval")] == [("eval/1", "1+1?")]


def test_a_training_row_that_is_also_held_out_is_a_bad_row(tmp_path: Path) -> None:
    train, held_out = write(tmp_path / "train.jsonl", *rows(2), GOOD), write(tmp_path / "eval.jsonl", GOOD)
    with pytest.raises(DataError, match=r"train.jsonl:3: the prompt is also held out in .*eval.jsonl:1"):
        load(train, eval_path=str(held_out))
    task = load(train, eval_path=str(held_out), on_bad_row="skip")
    assert len(task.problems("train")) == 2 and task.skipped_rows == 1
    with pytest.raises(DataError, match="nothing to train on"):
        load(held_out, eval_path=str(held_out), on_bad_row="skip")


async def test_a_system_prompt_comes_first(tmp_path: Path) -> None:
    async def grade(scorer: str, kwargs: Any) -> Any:
        raise AssertionError("not graded here")

    task = load(write(tmp_path / "rows.jsonl", GOOD), system_prompt="Be brief.")
    messages = await task.env(task.problems("train")[0], grade).start()
    assert messages == (Message("system", "Be brief."), Message("user", "1+1?"))


def test_the_shipped_word_problems_are_right() -> None:
    raw = [json.loads(line) for line in WORD_PROBLEMS.read_text().splitlines()]
    assert len({row["prompt"] for row in raw}) == len(raw) >= 60
    for row in raw:
        assert eval(row["expression"], {"__builtins__": {}}) == row["answer"], row["prompt"]
    task = load(WORD_PROBLEMS, eval_fraction=0.1)
    assert len(task.problems("train")) > len(task.problems("eval")) >= 3
