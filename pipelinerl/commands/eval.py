"""`pipelinerl eval`: what can this model do on the held-out problems?"""

from pathlib import Path
from typing import TYPE_CHECKING

from pipelinerl.commands.options import split_options
from pipelinerl.commands.output import say
from pipelinerl.errors import EXIT_DONE, ConfigError

if TYPE_CHECKING:
    from pipelinerl.config.schema import RunConfig

OPTIONS = ("--checkpoint", "--help", "-h")


def main(arguments: list[str]) -> int:
    """Run `pipelinerl eval` and return its exit code.

    Raises: ConfigError for wrong options or settings, EnvironmentProblem when this machine cannot run them.
    """
    options, overrides = split_options(arguments, OPTIONS)
    if {"--help", "-h"} & options.keys():
        say(_help())
        return EXIT_DONE
    from pipelinerl.cluster.fit import require_fit
    from pipelinerl.cluster.placement import Demand
    from pipelinerl.config.load import load_config
    from pipelinerl.config.preflight import preflight

    config = _of_run(options["--checkpoint"], overrides) if "--checkpoint" in options else load_config(overrides)
    # Whether training had an engine for evaluations makes no difference: here all engines evaluate.
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"engine": "shared"})})
    preflight(config)
    require_fit(config, Demand.of(config, trainer=False))
    from pipelinerl.appraise import appraise

    return appraise(config)


def _of_run(checkpoint: str, overrides: list[str]) -> "RunConfig":
    """The configuration of the run that made the model, with that model as the policy."""
    from pipelinerl.checkpoint.exported import exported_model
    from pipelinerl.config.load import load_run_config

    if not checkpoint:
        raise ConfigError("--checkpoint: name a run directory, --checkpoint=outputs/RUN")
    for override in overrides:
        if override.lstrip("+").partition("=")[0] in ("model", "model.path"):
            raise ConfigError(f"{override} with --checkpoint={checkpoint}: both name the model; keep one")
    found = exported_model(Path(checkpoint))
    say(f"model {found.model}, settings of {found.run_dir}")
    config = load_run_config(found.run_dir, overrides)
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(found.model.resolve())})})


def _help() -> str:
    return """\
usage: pipelinerl eval [--checkpoint=RUN] [key=value ...]

Sample the held-out problems of the task with model.path and report avg@k and pass@k with 95% intervals. Starts engines
only. Takes the same settings as pipelinerl train; all engine.count engines evaluate.
Writes eval.json and evals/version_000000.jsonl, a line per problem, to run_dir (outputs/eval-<name>-<time>).

options:
  --checkpoint=RUN    the newest exported model of the run directory RUN, with the settings of that run; or
                      RUN/model, RUN/exports/step_N. Overrides are then of single values
  --help              this text

settings: eval.samples (k), eval.temperature, eval.pass_reward, sampling.max_tokens, task, model.path, seed

examples:
  pipelinerl eval --checkpoint=outputs/mine
  pipelinerl eval --checkpoint=outputs/mine eval.samples=8 eval.temperature=0.8
  pipelinerl eval model.path=models/tiny
  pipelinerl eval model.path=Qwen/Qwen2.5-0.5B-Instruct task=jsonl task.path=problems.jsonl"""
