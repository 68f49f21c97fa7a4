"""The command line: `pipelinerl <command> [options] [overrides]`.

A command is one line in `COMMANDS`; its module is imported only when it is called, so that `--help` is quick. A
command takes its arguments and returns an exit code, or raises: this file turns errors into text and exit codes.
"""

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata

from pipelinerl.commands.output import say
from pipelinerl.config.hints import did_you_mean, nearest
from pipelinerl.errors import EXIT_BUG, EXIT_CONFIG, EXIT_DONE, EXIT_SIGINT, PipelineRLError


@dataclass(frozen=True, slots=True)
class Command:
    target: str  # "module:function", a function (list of arguments) -> exit code
    help: str


COMMANDS = {
    "train": Command("pipelinerl.commands.train:main", "train a model (--dry-run: only show what would be done)"),
    "plan": Command("pipelinerl.commands.plan:main", "show what a run comes to, who sits where, and whether it fits"),
    "parity": Command("pipelinerl.commands.parity:main", "measure whether the engine's logprobs are the trainer's"),
    "replay": Command(
        "pipelinerl.commands.replay:main", "do the recorded steps of a run again and compare every number"
    ),
    "eval": Command("pipelinerl.commands.eval:main", "evaluate a model on the held-out problems of a task"),
    "make-tiny": Command("pipelinerl.tiny.make:main", "make the tiny models of the quickstart"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code (`pipelinerl.errors` lists them). `argv` defaults to the process's."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except PipelineRLError as error:
        print(_as_text(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_SIGINT
    except Exception:
        traceback.print_exc()
        return EXIT_BUG


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        print(_help(), file=sys.stderr)
        return EXIT_CONFIG
    name, *rest = arguments
    if name in ("-h", "--help", "help"):
        say(_help())
        return EXIT_DONE
    if name == "--version":
        print(f"pipelinerl {metadata.version('pipelinerl')}")
        return EXIT_DONE
    if name not in COMMANDS:
        print(f"pipelinerl: error: {_unknown(name)}", file=sys.stderr)
        return EXIT_CONFIG
    module, _, function = COMMANDS[name].target.partition(":")
    run: Callable[[list[str]], int] = getattr(import_module(module), function)
    return run(rest)


def _unknown(name: str) -> str:
    if "=" in name or name == "--dry-run":
        return f"{name!r} is no command; did you mean: pipelinerl train {name}?"
    if name.startswith("-"):
        return f"unknown option {name!r}{did_you_mean(name, ['--help', '--version', '--dry-run'])}"
    best = nearest(name, COMMANDS)
    hint = f"did you mean {best}?" if best else f"the commands are {', '.join(COMMANDS)}"
    return f"unknown command {name!r}; {hint}"


def _as_text(error: PipelineRLError) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    if len(lines) == 1:
        return f"pipelinerl: error: {lines[0]}"
    return "\n".join([f"pipelinerl: error: {len(lines)} problems", *(f"  {line}" for line in lines)])


def _help() -> str:
    commands = "\n".join(f"  {name:<12} {command.help}" for name, command in COMMANDS.items())
    return f"""\
usage: pipelinerl <command> [options] [key=value ...]

Asynchronous RL training of language models with in-flight weight updates.

commands:
{commands}

options:
  --help       this text; pipelinerl <command> --help tells about a command
  --version    the version

examples:
  pipelinerl make-tiny && pipelinerl train         the quickstart, on a CPU
  pipelinerl train trainer.lr=3e-5 steps=50        with other settings
  pipelinerl parity --ablate                       may I trust the ratios, and what each fix is worth
  pipelinerl train experiment=math_7b_8gpu task.path=problems.jsonl --dry-run"""
