"""The user's own data: one JSON object per line with `prompt` and `answer`; other keys are kept in `Problem.data`."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

from pipelinerl.config.schema import JsonlTask
from pipelinerl.errors import DataError
from pipelinerl.tasks.base import Env, Grade, Message, SingleTurnEnv, Split
from pipelinerl.tasks.scorers import parse_last_number
from pipelinerl.types import Problem


class JsonlProblems:
    """The task. Without `eval_path`, a row is held out by a hash of its prompt: the same rows for every seed, and
    equal prompts on the same side.

    `skipped` lists the rows that `on_bad_row=skip` left out, as "file:line: reason".
    Raises DataError for a bad row (unless skipped), an unreadable file, or an empty split.
    """

    name = "jsonl"

    def __init__(self, config: JsonlTask) -> None:
        self._config = config
        self.skipped: tuple[str, ...] = ()
        self._splits: dict[Split, list[Problem]] = {"train": [], "eval": []}
        if config.eval_path is None:
            self._split_one_file(Path(config.path))
        else:
            self._load_two_files(Path(config.path), Path(config.eval_path))

    @property
    def skipped_rows(self) -> int:
        return len(self.skipped)

    def problems(self, split: Split) -> Sequence[Problem]:
        """Rows of the split in file order; `Problem.id` is e.g. "train/17" for line 17."""
        return self._splits[split]

    def env(self, problem: Problem, grade: Grade) -> Env:
        messages = [Message("user", problem.data["prompt"])]
        if self._config.system_prompt is not None:
            messages.insert(0, Message("system", self._config.system_prompt))
        scorer = f"pipelinerl.tasks.scorers:{self._config.scorer}"
        return SingleTurnEnv(messages, scorer, {"answer": problem.data["answer"]}, grade)

    def _split_one_file(self, path: Path) -> None:
        for number, row in self._rows(path):
            self._add("eval" if _hash_fraction(row["prompt"]) < self._config.eval_fraction else "train", number, row)
        found = f"{path}: with task.eval_fraction={self._config.eval_fraction}"
        count = sum(map(len, self._splits.values()))
        if not self._splits["train"]:
            raise DataError(f"{found} none of its {count} rows is left to train on; add rows or lower eval_fraction")
        if not self._splits["eval"] and self._config.eval_fraction > 0:
            raise DataError(
                f"{found} none of its {count} rows is held out; add rows, raise eval_fraction, set it to 0 for no "
                "evaluation, or name held-out rows with task.eval_path"
            )

    def _load_two_files(self, path: Path, eval_path: Path) -> None:
        held_out: dict[str, int] = {}
        for number, row in self._rows(eval_path):
            held_out[row["prompt"]] = number
            self._add("eval", number, row)
        for number, row in self._rows(path):
            if row["prompt"] in held_out:
                same = f"{eval_path}:{held_out[row['prompt']]}"
                self._bad_row(f"{path}:{number}: the prompt is also held out in {same}; remove one of the two")
            else:
                self._add("train", number, row)
        if not self._splits["train"]:
            raise DataError(f"{path}: every usable row is also held out in {eval_path}; there is nothing to train on")

    def _add(self, split: Split, number: int, row: Mapping[str, Any]) -> None:
        self._splits[split].append(Problem(f"{split}/{number}", row))

    def _rows(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """(line number from 1, checked row) of each good row."""
        good = number = 0
        for number, line in enumerate(_lines(path), start=1):
            try:
                row = _parse(line, needs_number=self._config.scorer == "last_number")
            except ValueError as error:
                self._bad_row(f"{path}:{number}: {error}")
                continue
            good += 1
            yield number, row
        if not number:
            raise DataError(f'{path} is empty; it needs one {{"prompt": ..., "answer": ...}} object per line')
        if not good:
            raise DataError(f"{path}: none of its {number} rows is usable; the first: {self.skipped[-number]}")

    def _bad_row(self, reason: str) -> None:
        if self._config.on_bad_row == "error":
            raise DataError(f"{reason} (task.on_bad_row=skip leaves such rows out)")
        self.skipped += (reason,)


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; set task.path or task.eval_path") from error


def _parse(line: bytes, needs_number: bool) -> dict[str, Any]:
    """A row with `prompt` and `answer` as text. Raises ValueError saying what is wrong and what to do."""
    if not line.strip():
        raise ValueError("the line is empty; remove it")
    row = _load(line)
    if not isinstance(row, dict):
        raise ValueError(f'the row is a JSON {type(row).__name__}; write an object {{"prompt": ..., "answer": ...}}')
    for key in ("prompt", "answer"):
        if key not in row:
            raise ValueError(f"key {key!r} is missing; the row has {', '.join(map(repr, row)) or 'no keys'}")
    if not isinstance(row["prompt"], str) or not row["prompt"].strip():
        raise ValueError(f"'prompt' is {_show(row['prompt'])}; it must be a text that is not empty")
    answer = row["answer"]
    if not _is_answer(answer):
        raise ValueError(f"'answer' is {_show(answer)}; it must be a number or a text that is not empty")
    if needs_number and parse_last_number(str(answer)) is None:
        raise ValueError(f"'answer' {_show(answer)} has no number in it; give one or use task.scorer=exact_match")
    return {**row, "answer": str(answer)}


def _is_answer(value: object) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)  # 1e999 reads as inf


def _load(line: bytes) -> Any:
    try:
        return json.loads(line.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}; write one object per line") from error
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply; flatten the row") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; write a finite number")


def _show(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _hash_fraction(prompt: str) -> float:
    """A number in [0, 1) that depends on the prompt alone: sha256, since `hash` differs between processes."""
    return int.from_bytes(hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()[:6]) / 2**48
