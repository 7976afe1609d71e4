"""Messages about wrong settings: the value and where it came from, what is allowed, and what the setting means.

What is allowed is read from the JSON schema of the configuration, the meaning from the `#:` comments of `config.py`: neither is
written twice, and every key has both.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from ccella_fast.errors import ConfigError, did_you_mean, nearest

_BOUNDS = {
    "exclusiveMinimum": "greater than {}", "minimum": "of at least {}", "exclusiveMaximum": "less than {}",
    "maximum": "of at most {}",
}  # fmt: skip


def explain(
    error: ValidationError, config: type[BaseModel], *, path: object, overrides: Mapping[str, str | None]
) -> ConfigError:
    """The ConfigError that describes the first error of a validation.

    Args:
        error: raised by `config.model_validate`.
        config: the class of the whole configuration.
        path: the file that was read, or None.
        overrides: dotted name -> how the user wrote the override, None if it was given in Python. The value of an override does
            not come from the file, which is then not named.
    """
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    field, place, message = ".".join(location), _find(location, config), first["msg"].removeprefix("Value error, ")
    origin = ""
    if (name := _override_of(field, message, overrides)) is not None:
        path, written = None, overrides[name]
        origin = f" (from {written:.60})" if written else ""
    if first["type"] == "extra_forbidden":
        fix = _similar_key(location[-1], place.section, config)
        return ConfigError(f"unknown key '{location[-1]}'{origin}", path=path, field=field, fix=fix)
    if first["type"] == "value_error":  # a sentence of our own validators
        fix = _allowed(place) if place.key else "make these settings consistent"
        if not field and "; " in message:  # a validator of the whole configuration ends its sentence with the fix
            message, fix = message.rsplit("; ", 1)
        return ConfigError(message + origin, path=path, field=field or None, fix=fix)
    needed = _in_words(place.schema)
    why = f"{field or 'the configuration'} must be {needed}, got {first['input']!r:.80}{origin}"
    return ConfigError(why, path=path, field=field or None, fix=_allowed(place))


def settings(config: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings."""
    for name, field in config.model_fields.items():
        section = _section_class(field.annotation)
        if section is None:
            yield prefix + name
        else:
            yield from settings(section, f"{prefix}{name}.")


def as_set_option(option: str, config: type[BaseModel], sections: Collection[str]) -> str | None:
    """How to give the setting whose name is that of an unknown option. None if none of these sections has such a setting."""
    name = option.lstrip("-").replace("-", "_")
    own = [dotted for dotted in settings(config) if dotted in {f"{section}.{name}" for section in sections}]
    return " or ".join(f"--set {dotted}=VALUE" for dotted in own) or None


class _Place(NamedTuple):
    """What the location of an error refers to."""

    section: type[BaseModel]
    key: str | None  # in that section; None if the location is a section
    default: Any
    whole: dict[str, Any]  # JSON schema of the key, and
    schema: dict[str, Any]  # of the part of its value that the location names


def _find(location: list[str], config: type[BaseModel]) -> _Place:
    section, rest, defaults = config, list(location), config().model_dump(mode="json")
    while rest and (inner := _section_class(_annotation(section, rest[0]))):
        section, defaults, rest = inner, defaults[rest[0]], rest[1:]
    if not rest or rest[0] not in section.model_fields:
        return _Place(section, None, None, {"type": "object"}, {"type": "object"})
    whole = schema = section.model_json_schema()["properties"][rest[0]]
    for part in rest[1:]:
        options = [option for option in schema.get("anyOf", [schema]) if option.get("type") == "array"]
        if not part.isdecimal() or not options:
            break
        entries = options[0].get("prefixItems")
        schema = entries[int(part)] if entries else options[0]["items"]
    return _Place(section, rest[0], defaults[rest[0]], whole, schema)


def _annotation(section: type[BaseModel], name: str) -> Any:
    return section.model_fields[name].annotation if name in section.model_fields else None


def _section_class(annotation: Any) -> type[BaseModel] | None:
    return annotation if inspect.isclass(annotation) and issubclass(annotation, BaseModel) else None


def _override_of(field: str, message: str, overrides: Mapping[str, str | None]) -> str | None:
    """The name of the override that set `field`, or something in it: one that the message names, if there is one.

    Without a field it must name it.
    """
    possible = [
        name
        for name in reversed(list(overrides))
        if f"{field}.".startswith(f"{name}.") or f"{name}.".startswith(f"{field}.") or (not field and name in message)
    ]
    named = [name for name in possible if re.search(rf"\b{name.rpartition('.')[2]}\b", message)]
    return next(iter(named or possible), None)


def _similar_key(word: str, section: type[BaseModel], config: type[BaseModel]) -> str:
    """The setting that was probably meant: of the same name in another section, or of a similar one here or elsewhere."""
    homes: dict[str, list[str]] = {}
    for dotted in settings(config):
        homes.setdefault(dotted.rpartition(".")[2], []).append(dotted)
    if word not in homes and (nearest(word, section.model_fields) or not nearest(word, homes)):
        return did_you_mean(word, section.model_fields)
    return f"did you mean {' or '.join(repr(dotted) for dotted in homes[nearest(word, homes) or word])}?"


def _allowed(place: _Place) -> str:
    """`give a number greater than 0: initial learning rate (default 0.0001)`."""
    if place.key is None:
        return "write it as {...}, with the settings in it"
    comment = _comment(place.section, place.key)
    return f"give {_in_words(place.whole)}{': ' if comment else ''}{comment} (default {json.dumps(place.default)})"


def _in_words(schema: dict[str, Any]) -> str:
    """A JSON schema as a noun: `a list of 3 entries, each a number greater than 0`."""
    if "anyOf" in schema:
        return " or ".join(_in_words(option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        values = [json.dumps(value) for value in schema.get("enum", [schema.get("const")])]
        return f"one of {', '.join(values)}" if len(values) > 1 else values[0]
    kind = schema.get("type", "object")
    if kind == "array":
        least, most = schema.get("minItems"), schema.get("maxItems")
        entries = "entries" if least is None else f"{least} entries" if least == most else f"at least {least} entries"
        return f"a list of {entries}, each {_in_words(schema.get('items') or schema['prefixItems'][0])}"
    bounds = " and ".join(words.format(schema[key]) for key, words in _BOUNDS.items() if key in schema)
    if "minimum" in schema and "maximum" in schema:
        bounds = f"from {schema['minimum']} to {schema['maximum']}"
    nouns = {
        "integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false", "null": "null",
        "object": "an object {...} of settings",
    }  # fmt: skip
    return f"{nouns[kind]} {bounds}".rstrip()


def _comment(section: type[BaseModel], name: str) -> str:
    """The `#:` comment of a setting: behind its field, or in the lines above it."""
    for owner in section.__mro__:
        if name not in vars(owner).get("__annotations__", {}):
            continue
        lines = inspect.getsource(owner).splitlines()
        number = next(index for index, line in enumerate(lines) if re.match(rf"    {name}: ", line))
        if "  #: " in lines[number]:
            return _as_text(lines[number].partition("  #: ")[2])
        above: list[str] = []
        while (line := lines[(number := number - 1)].strip()).startswith("#: "):
            above.insert(0, line.removeprefix("#: "))
        return _as_text(" ".join(above))
    return ""


def _as_text(comment: str) -> str:
    """A comment without the markup of the documentation."""
    return re.sub(r":doc:`/([\w/-]+)`", r"docs/\1.md", comment).replace("``", "")
