"""The user's overrides, checked one by one and written so that Hydra composes them without judging keys.

Hydra knows two ways to set a value: `key=1` fails on unknown keys without a suggestion, `+key=1` accepts anything.
Here both become `++key=1` (set, whether or not it is there), and the schema judges all keys afterwards, at once.
"""

from collections.abc import Mapping, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from pipelinerl.config.hints import did_you_mean
from pipelinerl.errors import ConfigError, first_line


def prepare(overrides: Sequence[str], groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The overrides for Hydra. `groups` maps a config group to its options.

    Raises: ConfigError with one line per override that is not well-formed or names an unknown group option.
    """
    parser = OverridesParser.create()
    prepared, problems = [], []
    for text in overrides:
        try:
            prepared.append(_prepare_one(_parse(parser, text), text, groups))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return prepared


def _parse(parser: OverridesParser, text: str) -> Override:
    key, equals, value = text.partition("=")
    if (not equals and not text.startswith("~")) or not key.lstrip("+"):
        raise ConfigError(f"{text!r}: not a setting; write key=value, for example trainer.lr=1e-5")
    try:
        return parser.parse_override(text)
    except HydraException as error:
        reason = first_line(error)
        if not key.lstrip("+").replace(".", "").replace("_", "").replace("/", "").isalnum():
            raise ConfigError(f"{text!r}: {key!r} is no key ({reason}); write key=value") from error
        raise ConfigError(f"{key} = {value!r}: {reason}; quote special characters: '{key}=\"...\"'") from error


def _prepare_one(override: Override, text: str, groups: Mapping[str, Sequence[str]]) -> str:
    key, _, value_text = text.lstrip("+").partition("=")
    if override.is_delete():
        raise ConfigError(f"{text!r}: a setting cannot be removed; give it another value, null for none")
    if override.is_sweep_override():
        raise ConfigError(f"{key} = {value_text!r}: sweeps are not supported; start one run per value")
    if override.package is not None:
        raise ConfigError(f"{text!r}: '@' packages are not supported; write {override.key_or_group}=...")
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        raise ConfigError(f"{key} = {value_text!r}: Hydra's own settings have no effect; use run_dir=DIR for outputs")
    value = override.value()
    if "/" in key and key not in groups:
        raise ConfigError(f"{key} = {value_text!r}: no such group{did_you_mean(key, groups)} ({', '.join(groups)})")
    group = key.replace(".", "/")
    if group != key and group in groups and isinstance(value, str):
        raise ConfigError(f"{key} = {value_text!r}: is a section; its presets are the group {group}={value_text}")
    section, _, below = key.partition(".")
    if section in groups and (below == "kind" or (isinstance(value, dict) and "kind" in value)):
        options = ", ".join(groups[section])
        raise ConfigError(f"{key} = {value_text!r}: a kind is chosen by its group; {section}=OPTION ({options})")
    if key not in groups or isinstance(value, dict):
        return f"++{key}={value_text}"
    return f"{key}={_option(key, value_text.strip(), groups[key])}"


def _option(group: str, chosen: str, options: Sequence[str]) -> str:
    if chosen not in options:
        raise ConfigError(
            f"{group} = {chosen!r}: no such option of the group {group}{did_you_mean(chosen, options)} "
            f"({', '.join(options)})"
        )
    return chosen
