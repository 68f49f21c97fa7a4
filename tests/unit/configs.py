"""Configurations for tests of what is done with them: composed once by Hydra, then changed key by key."""

from copy import deepcopy
from functools import cache
from typing import Any

import yaml
from pydantic import ValidationError

from pipelinerl.config.explain import explain
from pipelinerl.config.files import group_options
from pipelinerl.config.load import load_config
from pipelinerl.config.schema import RunConfig


def config_of(*overrides: str) -> RunConfig:
    """As `load_config`, for overrides that are right: `config_of("algo=cispo", "trainer.lr=1e-5")`."""
    return RunConfig.model_validate(_data(overrides))


def problems_of(*overrides: str) -> list[str]:
    """What `load_config` says about overrides of known keys, line by line; empty when it takes them."""
    data = _data(overrides)
    try:
        RunConfig.model_validate(data)
    except ValidationError as error:
        return explain(error, data).splitlines()
    return []


def _data(overrides: tuple[str, ...]) -> dict[str, Any]:
    """Options of groups go through Hydra, single keys do not: a composition takes a tenth of a second."""
    options = tuple(override for override in overrides if override.partition("=")[0] in group_options())
    data = deepcopy(_composed(options))
    for override in overrides:
        if override not in options:
            path, _, value = override.partition("=")
            *sections, key = path.split(".")
            section = data
            for name in sections:
                section = section[name]
            section[key] = yaml.safe_load(value)
    return data


@cache
def _composed(options: tuple[str, ...]) -> dict[str, Any]:
    return load_config(options).dump()
