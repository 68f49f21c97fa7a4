"""The directory of a run: made once, with the resolved configuration in it."""

import time
from pathlib import Path

import yaml

from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import ConfigError, EnvironmentProblem


def new_run_dir(config: RunConfig, prefix: str, results: tuple[str, ...]) -> Path:
    """Make `config.run_dir`, or outputs/<prefix><name>-<time>, and write the resolved config into it.

    Raises ConfigError when it holds one of `results` already: nothing is overwritten.
    """
    run_dir = Path(config.run_dir or f"outputs/{prefix}{config.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if any((run_dir / result).exists() for result in results):
        raise ConfigError(f"run_dir={run_dir} holds a run already; choose another run_dir, or move that one away")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(yaml.safe_dump(config.dump(), sort_keys=False))
    except OSError as error:
        raise EnvironmentProblem(f"run_dir={run_dir}: {error.strerror}; choose another run_dir") from error
    return run_dir
