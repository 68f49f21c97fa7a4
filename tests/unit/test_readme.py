"""What the README shows is what there is: its commands run, its files exist; the requirement files name no address."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from pipelinerl.commands.replay import main as replay
from pipelinerl.commands.train import KNOBS
from pipelinerl.config.load import load_config
from pipelinerl.errors import DataError

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))]


def shown_commands() -> list[str]:
    blocks = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)]
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_every_command_is_one_that_a_test_knows() -> None:
    kinds = ("pipelinerl train", "pipelinerl plan", "pipelinerl parity", "pipelinerl eval", "pipelinerl make-tiny")
    kinds += ("./scripts/", "pipelinerl replay outputs/", "jq -c ")
    kinds += (".venv/bin/python scripts/parity_ablation.py", ".venv/bin/python scripts/objectives.py")
    kinds += (".venv/bin/python scripts/bench/", "pipelinerl replay", "jq -c")
    assert [command for command in shown_commands() if not command.startswith(kinds)] == []


@pytest.mark.parametrize(
    "command",
    [
        c
        for c in shown_commands()
        if c.startswith(tuple(f"pipelinerl {n}" for n in ("train", "plan", "parity", "eval")))
    ],
)
def test_every_command_with_settings_composes(command: str) -> None:
    load_config([word for word in shlex.split(command)[2:] if not word.startswith("--")])


@pytest.mark.parametrize("command", [c for c in shown_commands() if c.startswith("pipelinerl replay")])
def test_every_replay_command_is_well_formed(command: str, tmp_path: Path) -> None:
    _, _, run, *options = shlex.split(command)
    with pytest.raises(DataError, match=r"journal\.jsonl"):  # the run is not here, and nothing else is wrong
        replay([str(tmp_path / run), *options])


@pytest.mark.parametrize("script", sorted({c.split()[0] for c in shown_commands() if c.startswith("./scripts/")}))
def test_every_script_is_there_and_parses(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o100, f"{script} is not executable"
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_every_linked_file_is_there() -> None:
    targets = [ROOT / target for target in re.findall(r"\]\(([^)]+)\)", README)]
    for page in (ROOT / "docs").glob("*.md"):
        targets += [page.parent / target for target in re.findall(r"\]\(([^)]+)\)", page.read_text())]
    assert targets and [target for target in targets if not target.exists()] == []


def test_the_first_settings_are_those_of_the_help_with_the_quickstarts_values() -> None:
    table = dict(re.findall(r"^\| `([a-z_.]+)` \| ([^|]+?) \|", README, flags=re.MULTILINE))
    assert list(table) == list(KNOBS)
    config = load_config()
    shown = {"steps": config.steps, "trainer.lr": config.trainer.lr, "async.max_lag": config.async_.lag_bound}
    shown |= {"batch.groups_per_step": config.batch.groups_per_step, "batch.group_size": config.batch.group_size}
    shown |= {"sampling.max_tokens": config.sampling.max_tokens, "sampling.temperature": config.sampling.temperature}
    for key, value in shown.items():
        assert float(table[key]) == value, key


def test_requirement_files_name_no_address_and_no_local_path() -> None:
    for path in (ROOT / "scripts" / "requirements").glob("*.txt"):
        assert not re.search(r"://|@ |^[./-]", path.read_text(), flags=re.MULTILINE), path.name
