"""`pipelinerl parity`: may I trust the ratios of this model and configuration?"""

from pipelinerl.commands.options import split_options
from pipelinerl.commands.output import say
from pipelinerl.errors import EXIT_DONE

OPTIONS = ("--ablate", "--bisect", "--help", "-h")


def main(arguments: list[str]) -> int:
    """Run `pipelinerl parity` and return its exit code: 0 when parity holds, 1 when it does not.

    Raises: ConfigError for wrong options or settings, EnvironmentProblem when this machine cannot run them.
    """
    options, overrides = split_options(arguments, OPTIONS)
    if {"--help", "-h"} & options.keys():
        say(_help())
        return EXIT_DONE
    from pipelinerl.cluster.fit import require_fit
    from pipelinerl.config.load import load_config
    from pipelinerl.config.preflight import preflight
    from pipelinerl.parity.ablation import cases_named

    cases = cases_named(options["--ablate"]) if "--ablate" in options else ()
    config = load_config(overrides)
    preflight(config)
    require_fit(config)
    from pipelinerl.examine import examine

    return examine(config, cases, bisect="--bisect" in options)


def _help() -> str:
    return """\
usage: pipelinerl parity [--ablate[=CASES]] [--bisect] [key=value ...]

Sample with the engines as training would, through an in-flight weight update, re-score the same tokens with the
trainer, and say whether the policy ratios can be trusted; if not, which layer is at fault (semantic, inference path,
objective), what to change and what that gains. Takes the same settings as pipelinerl train.
Writes parity.json and plots to run_dir (outputs/parity-<name>-<time>). Exit code 0: parity holds, 1: it does not.

options:
  --ablate    switch one setting at a time away from the four fixes and rank the effects; a new engine for most cases
              --ablate=raw_logprobs,update_abort does only these; an unknown name lists them all
  --bisect    compare the hidden states of engine and trainer block by block (needs engine.enforce_eager=true)
  --help      this text

limits: parity.max_abs_mean, parity.max_k3, parity.max_mult_prob_error, parity.max_frac_out, parity.max_clip_rate

examples:
  pipelinerl parity
  pipelinerl parity --ablate model.dtype=bfloat16
  pipelinerl parity engine.logprobs_mode=raw_logprobs
  pipelinerl parity --bisect model.path=Qwen/Qwen2.5-0.5B-Instruct task=jsonl task.path=problems.jsonl"""
