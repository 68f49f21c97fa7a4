"""`pipelinerl replay`: does a fresh trainer reproduce what a run recorded?"""

from pathlib import Path

from pipelinerl.commands.options import split_options
from pipelinerl.commands.output import say
from pipelinerl.errors import EXIT_DONE, ConfigError

OPTIONS = ("--until", "--from-checkpoint", "--tolerance", "--help", "-h")


def main(arguments: list[str]) -> int:
    """Run `pipelinerl replay` and return its exit code: 0 when everything was reproduced, 1 when something was not.

    Raises: ConfigError for wrong options, DataError when the run is not recorded.
    """
    options, runs = split_options(arguments, OPTIONS)
    if {"--help", "-h"} & options.keys():
        say(_help())
        return EXIT_DONE
    if len(runs) != 1:
        raise ConfigError(f"pipelinerl replay takes one run directory, not {len(runs)}")
    until, start = (_step(options, name) for name in ("--until", "--from-checkpoint"))
    tolerance = _tolerance(options)
    from pipelinerl.replay import replay

    return replay(Path(runs[0]), until, start, tolerance)


def _step(options: dict[str, str], name: str) -> int | None:
    if name not in options:
        return None
    if not options[name].isdecimal():
        raise ConfigError(f"{name}={options[name]}: give the number of a step")
    return int(options[name])


def _tolerance(options: dict[str, str]) -> float:
    text = options.get("--tolerance", "0")
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ConfigError(f"--tolerance={text}: give a relative difference, from 0 up to 1")
    return value


def _help() -> str:
    return """\
usage: pipelinerl replay RUN [--until=STEP] [--from-checkpoint=STEP] [--tolerance=REL]

Give the recorded batches of a run (RUN/batches) to a fresh trainer with the same settings and ranks, without engines,
and compare every number that the trainer reports with RUN/metrics.jsonl. Exit code 0: all are the same, 1: the step and
metric that it names are not.

options:
  --until=STEP            the last step; without it the last recorded one
  --from-checkpoint=STEP  begin after this step, from RUN/checkpoints; without it where the run began
  --tolerance=REL         relative difference that is allowed; 0, to the last bit, holds on a CPU
  --help                  this text

examples:
  pipelinerl replay outputs/quickstart
  pipelinerl replay outputs/quickstart --from-checkpoint=50 --until=60"""
