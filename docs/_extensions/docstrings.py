"""Docstrings as the code writes them, for reStructuredText.

An indented block after a blank line, a formula or a table of names, keeps its line breaks instead of being flowed as a
quotation. An asterisk is a product or an unpacking, never emphasis. Citations of the method become links.
"""

from __future__ import annotations

import re

from sphinx.application import Sphinx


def convert(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    result: list[str] = []
    literal = False
    for line in lines:
        indented = line.startswith(" ")
        if line.strip():
            starts = indented and bool(result) and not result[-1].strip()
            if starts and not literal and not _previous(result).startswith(" "):
                if not _previous(result).endswith("::"):
                    result += ["::", ""]
                literal = True
            literal = literal and indented
        result.append(line if literal else link_method(_escape(line)))
    lines[:] = result


def link_method(text: str) -> str:
    return text.replace("docs/explanation/method.md", ":doc:`/explanation/method`")


def _previous(lines: list[str]) -> str:
    return next((line for line in reversed(lines) if line.strip()), "")


def _escape(line: str) -> str:
    """Asterisks outside of `code`."""
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(part if part.startswith("`") else part.replace("*", r"\*") for part in parts)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", convert, priority=100)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
