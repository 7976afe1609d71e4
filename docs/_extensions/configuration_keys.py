"""The directive `configuration-keys`: every key of `ccella_fast.config.Config` with its type, default and meaning.

The meaning is the `#:` comment of the field, which Sphinx's own analyzer reads from the source. A key without one is an error,
so that no setting stays undocumented. Each key becomes a `confval` that other pages can refer to: {confval}`training.lr`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Iterator

from docutils import nodes
from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from ccella_fast import config
from ccella_fast.config_section import Section
from docstrings import link_method

logger = logging.getLogger(__name__)
_PLACE = "ccella_fast/config.py"


class ConfigurationKeys(SphinxDirective):
    """One section of the page for each section of the configuration; keys outside any section come first."""

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(config.__file__)
        sections = _sections()
        lines = list(_keys(config.Config, "", skip=sections))
        for name, section in sections.items():
            lines += [f".. _configuration-{name}:", "", f"``{name}``", "-" * (len(name) + 4), ""]
            lines += [
                *link_method(inspect.cleandoc(section.__doc__ or "")).splitlines(),
                "",
                *_keys(section, f"{name}."),
            ]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def _sections() -> dict[str, type[BaseModel]]:
    fields = config.Config.model_fields
    return {name: field.annotation for name, field in fields.items() if _is_section(field.annotation)}


def _is_section(annotation: object) -> bool:
    return inspect.isclass(annotation) and issubclass(annotation, BaseModel)


def _keys(model: type[BaseModel], prefix: str, *, skip: Collection[str] = ()) -> Iterator[str]:
    comments = _comments(model)
    types = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        if name in skip:
            continue
        if _is_section(field.annotation) and field.annotation not in _sections().values():
            yield from _keys(field.annotation, f"{prefix}{name}.")
            continue
        if name not in comments:
            logger.warning("%s.%s has no #: comment that says what it means", model.__name__, name, location=_PLACE)
        yield f".. confval:: {prefix}{name}"
        yield f"   :type: {_type(types[name])}"
        if field.default is not PydanticUndefined and not isinstance(field.default, BaseModel):
            yield f"   :default: ``{json.dumps(to_jsonable_python(field.default))}``"
        yield ""
        yield from (f"   {link_method(line)}" for line in comments.get(name, []))
        yield ""


def _comments(model: type[BaseModel]) -> dict[str, list[str]]:
    """By field, from the class and those that it inherits from."""
    result: dict[str, list[str]] = {}
    for base in reversed(model.__mro__):
        if issubclass(base, Section) and base is not Section:
            analyzer = ModuleAnalyzer.for_module(base.__module__)
            analyzer.analyze()
            result |= {name: text for (owner, name), text in analyzer.attr_docs.items() if owner == base.__qualname__}
    return result


def _type(schema: dict) -> str:
    """A JSON schema in words: `integer, above 0`."""
    if "anyOf" in schema:
        return " or ".join(_type(option) for option in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(f"``{json.dumps(value)}``" for value in schema["enum"])
    if "const" in schema:
        return f"always ``{json.dumps(schema['const'])}``"
    if "$ref" in schema:
        return "the keys of the section ``augmentation``"
    if schema["type"] == "array":
        least, most = schema.get("minItems"), schema.get("maxItems")
        items = _type(schema.get("items") or schema["prefixItems"][0])
        return f"list of {least}: {items}" if least is not None and least == most else f"list of: {items}"
    bounds = [f"{words} {schema[key]:g}" for key, words in _BOUNDS.items() if key in schema]
    return ", ".join([schema["type"], *([" and ".join(bounds)] if bounds else [])])


_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("configuration-keys", ConfigurationKeys)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
