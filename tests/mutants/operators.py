"""Small changes of a Python file, one at a time, like those made by a typing mistake or a lost line."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import NamedTuple

SWAPS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
LOG_METHODS = {"debug", "info", "warning", "error", "exception"}


class Mutant(NamedTuple):
    """One change of one file.

    Attributes:
        file: Path below the root of the repository.
        line: Line number of the change.
        old: The text before the change, for the report.
        new: The text after the change.
        text: The whole changed file.
        name: The name of a hand-made change; empty for a generated one.
        tests: The tests to run, if they differ from those of the file.
    """

    file: str
    line: int
    old: str
    new: str
    text: str
    name: str = ""
    tests: tuple[str, ...] = ()


def mutants(file: str, text: str) -> list[Mutant]:
    """All changes of the file that compile, in the order of its syntax tree."""
    source = text.encode()  # ast counts columns in bytes
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node: ast.AST) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    found = []
    for node in _relevant_nodes(ast.parse(source)):
        for start, end, new in _edits(node, source, span):
            changed = (source[:start] + new.encode() + source[end:]).decode()
            try:
                compile(changed, file, "exec", dont_inherit=True)
            except SyntaxError:  # for example **{} before *args
                continue
            line, replaced = source.count(b"\n", 0, start), source[start:end].decode()
            whole_lines = text.splitlines()[line].strip(), changed.splitlines()[line].strip()
            found.append(Mutant(file, line + 1, *((replaced, new) if "\n" in replaced else whole_lines), changed))
    return found


def _relevant_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that determine behavior: annotations, assertions and the text of messages are left out."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr) or _is_log_call(node):
        return
    yield node
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _relevant_nodes(child)


def _is_log_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOG_METHODS


def _is_text(node: ast.AST) -> bool:
    """Whether an operand is text, for which a swapped operator raises TypeError, which no test can miss."""
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _edits(node: ast.AST, source: bytes, span) -> Iterator[tuple[int, int, str]]:
    """(start, end, new text) of each change at this node, in bytes of the source."""
    match node:
        case ast.Compare(left=left, ops=ops, comparators=right):
            yield from _swap(zip([left, *right], ops, right, strict=False), source, span)
        case ast.BoolOp(op=op, values=values):
            yield from _swap(((a, op, b) for a, b in zip(values, values[1:], strict=False)), source, span)
        case ast.BinOp(left=left, op=op, right=right) if not _is_text(left) and not _is_text(right):
            yield from _swap([(left, op, right)], source, span)
        case ast.AugAssign(target=target, op=op, value=value):
            yield from _swap([(target, op, value)], source, span)
        case ast.UnaryOp(op=ast.Not()):
            start, _ = span(node)
            yield start, start + len("not "), ""
        case ast.Constant(value=bool(value)):
            yield *span(node), str(not value)
        case ast.Constant(value=int(value)):
            yield *span(node), str(value + 1)
        case ast.Constant(value=float(value)):
            yield *span(node), str(value * 2 or 1.0)
        case ast.Call(func=ast.Name(id=name)) if name in NAMES:
            yield *span(node.func), NAMES[name]
        case ast.Expr(value=ast.Call()) if not _is_log_call(node.value):
            yield *span(node), "pass"
        case ast.If(test=test) | ast.IfExp(test=test):
            start, end = span(test)
            yield start, end, f"not ({source[start:end].decode()})"
        case ast.Continue():
            yield *span(node), "break"
        case ast.keyword(arg=str(name)) if name != "strict":  # strict= of zip only asserts
            yield *span(node), "**{}"


def _swap(triples, source: bytes, span) -> Iterator[tuple[int, int, str]]:
    for left, op, right in triples:
        old, new = SWAPS.get(type(op), ("", ""))
        start, end = span(left)[1], span(right)[0]
        between = source[start:end].decode()
        if old and between.strip(" ()\n\\") in (old, f"{old}="):
            yield start, end, between.replace(old, new, 1)
