"""The keys a user may set, read off the schema. Keys are written as the user writes them: `async.max_lag`."""

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic.fields import FieldInfo

from pipelinerl.config.schema import RunConfig, Section


def is_union(name: str) -> bool:
    """True for the sections whose keys depend on their `kind` (task, algo)."""
    field = RunConfig.model_fields.get(name)
    return field is not None and field.discriminator is not None


def section_types(field: FieldInfo) -> dict[str | None, type[Section]]:
    """The section classes a field accepts, by `kind` (None where there is only one); empty for a plain value."""
    annotations = (field.annotation, *get_args(field.annotation))
    types = [t for t in annotations if isinstance(t, type) and issubclass(t, Section)]
    return {t.model_fields["kind"].default if "kind" in t.model_fields else None: t for t in types}


def fields_of(section: type[Section]) -> dict[str, FieldInfo]:
    """Fields by the name the user writes (the alias where there is one)."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def known_keys(kinds: Mapping[str, str] | None = None) -> dict[str, FieldInfo]:
    """Dotted key -> field, for every single value. `kinds` (`{"task": "sort"}`) leaves the other kinds' keys out."""
    return dict(_walk(RunConfig, "", kinds or {}))


def _walk(section: type[Section], prefix: str, kinds: Mapping[str, str]) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in fields_of(section).items():
        types = section_types(field)
        if not types:
            yield prefix + name, field
        for kind, section_type in types.items():
            if kind is None or kinds.get(name, kind) == kind:
                yield from _walk(section_type, f"{prefix}{name}.", {})


def kinds_with(key: str) -> list[str]:
    """The kinds of a union section that know `key`: `task.digits` -> `["sort"]`."""
    section, _, rest = key.partition(".")
    if not is_union(section):
        return []
    kinds = [kind for kind in section_types(RunConfig.model_fields[section]) if kind is not None]
    return [kind for kind in kinds if f"{section}.{rest}" in known_keys({section: kind})]


def defaults(section: type[Section]) -> dict[str, Any]:
    """The defaults of a section as plain data for Hydra; a value the user must give is `???`, as Hydra writes it."""
    data: dict[str, Any] = {}
    for name, field in fields_of(section).items():
        if not field.is_required():
            value = field.get_default()
            data[name] = value.model_dump(by_alias=True) if isinstance(value, Section) else value
        elif not section_types(field):
            data[name] = "???"
    return data
