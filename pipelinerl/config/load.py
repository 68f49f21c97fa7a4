"""Overrides -> Hydra -> schema. No `DictConfig` and no exception of Hydra leaves this file."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from pipelinerl.config.explain import explain, shown
from pipelinerl.config.files import conf_dir, group_options
from pipelinerl.config.keys import defaults, fields_of, section_types
from pipelinerl.config.overrides import prepare
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import ConfigError, first_line

MISSING = "???"


def load_config(overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a run from overrides as given on the command line: `["task=sort", "trainer.lr=1e-5"]`.

    Without `experiment=...` the quickstart is meant. Relative paths in it are relative to the working directory.

    Raises: ConfigError with one line per problem (all of them at once), each with key, value and what would be
    right; EnvironmentProblem when `conf/` is not there.
    """
    groups = group_options()
    data = _compose(prepare(overrides, groups), tuple(groups))
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, data)) from error


def load_run_config(run_dir: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration that a run left in `run_dir`, with overrides of single values; a run directory of its own.

    Raises ConfigError as `load_config` does, and for a group: its presets are settled in what the run left.
    """
    path = run_dir / "config.yaml"
    try:
        data = yaml.safe_load(path.read_text()) | {"run_dir": None, "resume": "auto"}
    except (OSError, YAMLError, TypeError) as error:
        raise ConfigError(f"{path}: not the configuration of a run ({first_line(error)})") from error
    parser, groups = OverridesParser.create(), group_options()
    for text in prepare(overrides, groups):
        override = parser.parse_override(text)
        if override.key_or_group in groups and not isinstance(override.value(), dict):
            raise ConfigError(f"{text}: a group, and {path} has settled it; override single values, section.key=value")
        _set(data, override.key_or_group, override.value())
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, data)) from error


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for name in sections:
        if not isinstance(data.setdefault(name, {}), dict):
            raise ConfigError(f"{key} = {shown(value)}: {name} is no section")
        data = data[name]
    if isinstance(value, dict) and isinstance(data.get(last), dict):
        value = data[last] | value
    data[last] = value


def _compose(overrides: list[str], groups: tuple[str, ...]) -> dict[str, Any]:
    _store_defaults(groups)
    with _hydra_errors_explained(), initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        config = compose("config", overrides=overrides)
        data = _resolved(config)
    assert isinstance(data, dict)
    return data


def _resolved(config: DictConfig) -> Any:
    """Plain data with interpolations resolved and values still missing left out: the schema says what is required."""
    try:
        return _without_missing(OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        raise ConfigError(f"{key} = {shown(_raw(config, key))}: {first_line(error)}") from error


def _raw(config: DictConfig, key: str) -> Any:
    """The value of `key` as written, interpolations and all."""
    node: Any = OmegaConf.to_container(config, resolve=False)
    for part in key.replace("[", ".").replace("]", "").split("."):
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node


def _without_missing(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_missing(value) for key, value in node.items() if value != MISSING}
    return node


@cache  # the store is one for the process
def _store_defaults(groups: tuple[str, ...]) -> None:
    """Put the schema's defaults where the files in `conf/` can start from them.

    `run_defaults` holds everything that is no group; `<group>_defaults` a group's section; for a section that
    depends on its kind, `<kind>_defaults`. With all keys present, the files only say what differs.
    """
    store = ConfigStore.instance()
    run = defaults(RunConfig)
    store.store(name="run_defaults", node={key: value for key, value in run.items() if key not in groups})
    for name, field in fields_of(RunConfig).items():
        if name in groups:
            for kind, section in section_types(field).items():
                store.store(group=name, name=f"{kind or name}_defaults", node=defaults(section))


@contextmanager
def _hydra_errors_explained() -> Iterator[None]:
    try:
        yield
    except YAMLError as error:  # its text names file and line, over several lines
        raise ConfigError("not readable as YAML: " + " ".join(str(error).split())) from error
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__
        detail = f" ({first_line(cause)})" if isinstance(cause, OmegaConfBaseException) else ""
        raise ConfigError(f"{first_line(error)}{detail}") from error
