"""Validation errors in the user's words: one line per problem, keys as they are written, the nearest valid key."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pipelinerl.config.hints import did_you_mean
from pipelinerl.config.keys import fields_of, is_union, kinds_with, known_keys
from pipelinerl.config.schema import RunConfig

_EXPECTED = {
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "int_type": "should be a whole number",
    "int_parsing": "should be a whole number",
    "int_from_float": "should be a whole number",
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
    "string_type": "should be text",
    "string_too_short": "should not be empty",
    "tuple_type": "should be a list, such as [0.9,0.95]",
}


def explain(error: ValidationError, data: Mapping[str, Any]) -> str:
    """All problems of `data`, one per line, in the order of the schema."""
    kinds = {name: section["kind"] for name, section in data.items() if _chosen(name, section)}
    return "\n".join(line for detail in error.errors() for line in _lines(detail, kinds))


def shown(value: object) -> str:
    """A value as it is written in an override."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if isinstance(value, str) else str(value)


def _chosen(name: str, section: object) -> bool:
    return is_union(name) and isinstance(section, Mapping) and isinstance(section.get("kind"), str)


def _lines(detail: ErrorDetails, kinds: Mapping[str, str]) -> Iterator[str]:
    key, value, context = _key(detail["loc"]), detail["input"], detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            yield from (_unknown(leaf, leaf_value, kinds) for leaf, leaf_value in _leaves(key, value))
        case "value_error":
            prefix = f"{key}." if key else ""
            yield from (prefix + line for line in str(context["error"]).splitlines())
        case "missing":
            yield _missing(detail["loc"], value)
        case "union_tag_not_found":
            yield f"{key}: required; choose an option of the group: {key}=..."
        case "union_tag_invalid":
            tags = re.findall(r"'([^']*)'", context["expected_tags"])
            yield f"{key}.kind = {shown(context['tag'])}: should be {_one_of(tags, context['tag'])}"
        case "literal_error":
            allowed = _allowed(key) or [context["expected"]]
            yield f"{key} = {shown(value)}: should be {_one_of(allowed, value)}"
        case "model_type" | "model_attributes_type":
            yield f"{key} = {shown(value)}: is a section; set {', '.join(_keys_below(key, kinds))}"
        case other:
            expected = _EXPECTED.get(other) or re.sub("^(Input|String) should", "should", detail["msg"])
            yield f"{key} = {shown(value)}: {expected}{_type_hint(other, value)}"


def _key(loc: tuple[str | int, ...]) -> str:
    """`("task", "sort", "digits")` -> `task.digits`: the kind of a union is not part of the key."""
    if len(loc) > 1 and is_union(str(loc[0])):
        loc = (loc[0], *loc[2:])
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")


def _leaves(key: str, value: object) -> Iterator[tuple[str, object]]:
    """The single values below an unknown key: `asnyc.max_lag=1` arrives as `asnyc = {"max_lag": 1}`."""
    if isinstance(value, Mapping) and value:
        for name, below in value.items():
            yield from _leaves(f"{key}.{name}", below)
    else:
        yield key, value


def _unknown(key: str, value: object, kinds: Mapping[str, str]) -> str:
    section = key.partition(".")[0]
    other_kinds = kinds_with(key)
    if other_kinds:
        chosen = f"{section}.kind={kinds.get(section)}"
        return f"{key} = {shown(value)}: no setting of {chosen}, only of {section}.kind={', '.join(other_kinds)}"
    candidates = set(known_keys(kinds))
    if "." not in key:
        candidates |= set(fields_of(RunConfig))
    return f"{key} = {shown(value)}: unknown key{did_you_mean(key, sorted(candidates))}"


def _missing(loc: tuple[str | int, ...], parent: object) -> str:
    key = _key(loc)
    if isinstance(loc[-1], int):
        return f"{_key(loc[:-1])} = {shown(parent)}: has too few values"
    field = known_keys().get(key)
    what = f" ({field.description})" if field is not None and field.description else ""
    return f"{key}: required; set {key}=...{what}"


def _allowed(key: str) -> list[Any]:
    """The values of a `Literal` key, from the schema, as typed there."""
    field = known_keys().get(key)
    if field is None:
        return []
    parts: Iterable[Any] = [field.annotation, *get_args(field.annotation)]
    return [value for part in parts if get_origin(part) is Literal for value in get_args(part)]


def _one_of(allowed: list[Any], value: object) -> str:
    names = [allowed_value if isinstance(allowed_value, str) else shown(allowed_value) for allowed_value in allowed]
    text = f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
    return text + (did_you_mean(value, names) if isinstance(value, str) else "")


def _keys_below(key: str, kinds: Mapping[str, str]) -> list[str]:
    return [known for known in known_keys(kinds) if known.startswith(f"{key}.")]


def _type_hint(error_type: str, value: object) -> str:
    if error_type == "string_type" and value is not None:
        return f"; quote it to make it text: '\"{value}\"'"
    if isinstance(value, str) and error_type in ("float_type", "int_type") and _is_number(value):
        return "; this is text, ${oc.decode:...} around an interpolation makes it a number"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
