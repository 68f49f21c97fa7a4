"""Options and overrides of a command, told apart."""

from collections.abc import Collection, Sequence

from pipelinerl.config.hints import did_you_mean
from pipelinerl.errors import ConfigError


def split_options(arguments: Sequence[str], known: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """(options with their values, overrides); `--name` has the value "", `--name=value` its own.

    Raises ConfigError that names every option which is not `known`.
    """
    given = [argument for argument in arguments if argument.startswith("-")]
    options = {name: value for name, _, value in (argument.partition("=") for argument in given)}
    unknown = [f"unknown option {option!r}{did_you_mean(option, known)}" for option in sorted({*options} - {*known})]
    if unknown:
        raise ConfigError("\n".join(unknown))
    return options, [argument for argument in arguments if argument not in given]
