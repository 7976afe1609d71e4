"""The directive `deepspeed-keys`: the rows of `ccella_fast.training.deepspeed_keys.KEYS` as three tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from ccella_fast.training import deepspeed_keys
from ccella_fast.training.deepspeed_keys import KEYS, WHERE, Key


class DeepSpeedKeys(SphinxDirective):
    """A table of the keys that act, one of those with a single value, and one of those that are refused."""

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(deepspeed_keys.__file__)
        return self.parse_text_to_nodes("\n".join(page_lines()), allow_section_headings=True)


def page_lines() -> Iterator[str]:
    """The page as reStructuredText."""
    acting, fixed, refused = [], [], []
    for name, key in KEYS.items():
        if key.kind is None:
            refused.append((f"``{name}``", key.text, key.fix))
        elif key.fixed is not Key("").fixed:
            fixed.append((f"``{name}``", f"``{json.dumps(key.fixed)}``", key.text))
        else:
            acting.append((f"``{name}``", key.kind.words, _what(key)))
    yield from _table("Keys that act", ("key", "value", "what it does"), acting)
    yield from _table("Keys with one value", ("key", "value", "because"), fixed)
    yield from _table("Keys that are refused", ("key", "because", "what to do"), refused)


def _what(key: Key) -> str:
    parts = [key.text]
    if key.where != WHERE:
        parts.append(f"ZeRO stage {deepspeed_keys.stages(key)} only")
    if key.needs:
        parts.append(f"with ``{key.needs}``")
    if key.default is not Key("").default:
        parts.append(f"default ``{json.dumps(key.default)}``")
    return "; ".join(parts)


def _table(title: str, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    options = ["   :header-rows: 1", "   :widths: 42 18 40", "   :class: deepspeed-keys"]
    yield from (title, "-" * len(title), "", ".. list-table::", *options, "")
    for row in (head, *rows):
        for cell, mark in zip(row, ["   * - ", *["     - "] * 2], strict=True):
            yield mark + cell
    yield ""


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("deepspeed-keys", DeepSpeedKeys)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
