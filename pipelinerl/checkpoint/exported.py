"""Models that a run has exported: `<run_dir>/model` at its end, `<run_dir>/exports/step_N` on the way."""

from dataclasses import dataclass
from pathlib import Path

from pipelinerl.errors import ConfigError

MODEL_FILE = "config.json"  # what makes a directory a model; exports get their names when they are whole
RUN_FILE = "config.yaml"


@dataclass(frozen=True, slots=True)
class Exported:
    """A model directory and the directory of the run that made it."""

    model: Path
    run_dir: Path


def exported_model(path: Path) -> Exported:
    """The newest exported model of the run directory `path`, or the exported model that `path` itself is.

    Raises ConfigError when there is none; says what `path` is instead.
    """
    if (path / MODEL_FILE).is_file():
        runs = [folder for folder in (path.parent, path.parent.parent) if (folder / RUN_FILE).is_file()]
        if not runs:
            raise ConfigError(f"{path} is a model, but not one in a run directory; use model.path={path}")
        return Exported(path, runs[0])
    if not (path / RUN_FILE).is_file():
        raise ConfigError(f"{path} is no run directory: it has no {RUN_FILE}; to evaluate a model use model.path=...")
    models = [folder for folder in (path / "model", *path.glob("exports/step_*")) if (folder / MODEL_FILE).is_file()]
    if not models:
        raise ConfigError(
            f"{path} has no exported model yet: model/ is written at the end of a run, exports/ every "
            "checkpoint.export_every steps"
        )
    return Exported(max(models, key=_age), path)


def _age(model: Path) -> tuple[float, str]:
    """Later is newer. By the clock, for a run that was resumed may have gone beyond its model/."""
    return (model / MODEL_FILE).stat().st_mtime, model.name
