"""Where a run goes on from: what `resume=auto|never|PATH` comes to."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelinerl.checkpoint.driver_state import DriverState
from pipelinerl.checkpoint.manifest import MANIFEST, verify
from pipelinerl.checkpoint.saver import CONFIG
from pipelinerl.checkpoint.store import FOLDER, newest_whole
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import ConfigError

NOT_COMPARED = ("run_dir", "resume", "name")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that is whole."""

    path: Path
    state: DriverState
    config: Mapping[str, Any]  # of the run that made it, as `RunConfig.dump` gives it

    @property
    def step(self) -> int:
        """Optimizer steps that were done."""
        return self.state.step

    def changes(self, config: RunConfig) -> list[str]:
        """`key: old -> new` for every setting that is not what it was.

        Raises ConfigError for one that the weights of the checkpoint do not fit.
        """
        before, now = dict(flat(self.config)), dict(flat(config.dump()))
        if before.get("model.path") != now["model.path"]:
            raise ConfigError(
                f"model.path={now['model.path']}, but {self.path} holds the weights of {before.get('model.path')}; "
                "use that model, or resume=never"
            )
        keys = sorted(key for key in before.keys() | now.keys() if key.split(".")[0] not in NOT_COMPARED)
        return [f"{k}: {before.get(k)} -> {now.get(k)}" for k in keys if before.get(k) != now.get(k)]


def find_checkpoint(config: RunConfig, tell: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to go on from; None for a fresh run. Damaged ones are named through `tell`.

    Raises ConfigError when `resume` names none, DataError when all there are are damaged.
    """
    if config.resume == "never" or (config.resume == "auto" and config.run_dir is None):
        return None
    if config.resume == "auto":
        assert config.run_dir is not None
        path = newest_whole(Path(config.run_dir) / FOLDER, tell)
        return None if path is None else read_checkpoint(path)
    return read_checkpoint(_named(Path(config.resume), tell))


def read_checkpoint(path: Path) -> Checkpoint:
    """The driver's part of a checkpoint that was verified."""
    return Checkpoint(path, DriverState.read(path), yaml.safe_load((path / CONFIG).read_text()))


def _named(path: Path, tell: Callable[[str], None]) -> Path:
    """The checkpoint that `path` is, or the newest of the run that it is."""
    if (path / MANIFEST).is_file():
        verify(path)
        return path
    found = newest_whole(path if path.name == FOLDER else path / FOLDER, tell)
    if found is None:
        raise ConfigError(
            f"resume={path}: neither a checkpoint nor a run directory with one; use auto, never or a path"
        )
    return found


def flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(`section.key`, value) of every setting."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
