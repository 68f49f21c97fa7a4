"""`pipelinerl train`: load, check and start a run. Heavy imports happen only when the run starts."""

from pipelinerl.commands.options import split_options
from pipelinerl.commands.output import say
from pipelinerl.config.files import group_options
from pipelinerl.errors import EXIT_DONE

OPTIONS = ("--dry-run", "--help", "-h")

# The ten settings to know first, as the help lists them.
KNOBS = (
    "steps",
    "batch.groups_per_step",
    "batch.group_size",
    "sampling.max_tokens",
    "sampling.temperature",
    "trainer.lr",
    "async.max_lag",
    "engine.count",
    "trainer.ranks",
    "run_dir",
)


def main(arguments: list[str]) -> int:
    """Run `pipelinerl train` and return its exit code.

    Raises: ConfigError for wrong options or settings, EnvironmentProblem when this machine cannot run them.
    """
    options, overrides = split_options(arguments, OPTIONS)
    if {"--help", "-h"} & options.keys():
        say(_help())
        return EXIT_DONE
    return _train(overrides, dry_run="--dry-run" in options)


def _train(overrides: list[str], dry_run: bool) -> int:
    from pipelinerl.config.load import load_config

    config = load_config(overrides)
    if dry_run:
        from pipelinerl.commands.plan import show_plan

        show_plan(config)
        return EXIT_DONE

    from pipelinerl.cluster.fit import require_fit
    from pipelinerl.config.preflight import preflight

    preflight(config)
    require_fit(config)
    from pipelinerl.run import run

    return run(config)


def _help() -> str:
    groups = "\n".join(f"  {group:<16} {', '.join(options)}" for group, options in group_options().items())
    knobs = "\n".join(f"  {knob:<40} {about}" for knob, about in _knobs())
    return f"""\
usage: pipelinerl train [--dry-run] [key=value ...]

Train a model by asynchronous RL. Without an experiment this is experiment=quickstart: a tiny model on a CPU.
Settings are overrides of the files in conf/: group=option takes a file, section.key=value sets one value.

options:
  --dry-run    check the settings, show what they come to, start nothing
  --help       this text

groups and their options:
{groups}

the first ten settings, as the quickstart has them:
{knobs}

examples:
  pipelinerl train
  pipelinerl train algo=reinforce_is trainer.lr=3e-5 async.max_lag=4
  pipelinerl train algo=ppo_clip algo/correction=icepop algo.advantage=grpo
  pipelinerl train async.mode=sync run_dir=outputs/on_policy
  pipelinerl train task=jsonl task.path=rows.jsonl model.path=Qwen/Qwen2.5-0.5B-Instruct --dry-run"""


def _knobs() -> list[tuple[str, str]]:
    """The first settings with the quickstart's values, and what each is."""
    from pipelinerl.config.explain import shown
    from pipelinerl.config.keys import known_keys
    from pipelinerl.config.load import load_config

    data, fields = load_config().dump(), known_keys()
    rows = []
    for knob in KNOBS:
        value = data
        for part in knob.split("."):
            value = value[part]
        rows.append((f"{knob}={shown(value).strip(chr(39))}", fields[knob].description or ""))
    return rows
