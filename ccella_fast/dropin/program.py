"""The program of a `forward`: its operations in order, without what a copy of a network may change and still be the same.

A block is recognized by what its own `forward` does, not by the name of its class: networks are copied into many repositories,
and changed there. `fingerprint` reads the source of a method and lists its operations in the order of their evaluation. Local
variables become numbers, an imported name becomes what it refers to, and a helper of the project its own program. Types,
documentation, assertions, and whether an operation has a line of its own do not count. Everything else does: an operation that
is added, left out, replaced or moved, another constant, or another attribute of the module gives another fingerprint. A method
that cannot be read with certainty has none.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import types
from typing import Any

from torch import nn

# Packages whose functions are known by their names. Functions of all others are read as well.
_NAMED = ("torch", "math", "builtins", "functools", "einops", "diffusers.utils", "numpy", "contextlib")


class _UnknownError(Exception):
    """The source cannot be read, or says something that is not understood."""


def fingerprint(owner: type, method: str = "forward") -> str | None:
    """Sixteen digits that stand for what `method` of the class does; None if its source cannot be read."""
    try:
        function = inspect.getattr_static(owner, method)
        program = _Reader(owner, function, ()).program()
    except (_UnknownError, AttributeError):
        return None
    return hashlib.sha256(program.encode()).hexdigest()[:16]


class _Reader:
    """Reads the program of one function of a class."""

    def __init__(self, owner: type, function: Any, callers: tuple[Any, ...]):
        function = function.__func__ if isinstance(function, staticmethod) else function
        if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__") or function in callers:
            raise _UnknownError
        self.owner, self.function, self.callers = owner, function, (*callers, function)
        self.tree = _source(function)
        self.lines: list[str] = []
        self.values: dict[str, str] = {}  # of local variables: the names of their values
        self.count = 0

    def program(self) -> str:
        """The operations, one a line."""
        arguments = self.tree.args
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            self.values[argument.arg] = self.number()
        for rest in (arguments.vararg, arguments.kwarg):
            if rest is not None:
                self.values[rest.arg] = self.number()
        defaults = [self.value(each) for each in (*arguments.defaults, *filter(None, arguments.kw_defaults))]
        kinds = [len(arguments.args), len(arguments.kwonlyargs), bool(arguments.vararg), bool(arguments.kwarg)]
        self.emit(f"arguments {kinds} {defaults} {[self.value(each) for each in self.tree.decorator_list]}")
        is_method = any(self.function in vars(cls).values() for cls in self.owner.__mro__)
        if arguments.args and is_method:
            self.values[arguments.args[0].arg] = "self"
        self.block(self.tree.body)
        return "\n".join(self.lines)

    def number(self) -> str:
        self.count += 1
        return f"%{self.count}"

    def emit(self, operation: str) -> str:
        """Add an operation and return the name of its result."""
        result = self.number()
        self.lines.append(f"{result} {operation}")
        return result

    # Statements

    def block(self, statements: list[ast.stmt]) -> bool:
        """Read statements; whether they end in a return or an exception."""
        return any([self.statement(each) for each in statements])  # noqa: C419 (all are read)

    def statement(self, node: ast.stmt) -> bool:
        """Read a statement; whether nothing after it is reached."""
        if isinstance(node, (ast.Pass, ast.Assert)) or _is_documentation(node) or _only_raises(node):
            return False
        if isinstance(node, ast.Expr):
            self.value(node.value)
        elif isinstance(node, ast.Assign):
            value = node.value
            for target in node.targets:
                self.assign(target, value)
        elif isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self.assign(node.target, node.value)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            left, right = self.value(node.target), self.value(node.value)
            self.values[node.target.id] = self.emit(f"{type(node.op).__name__}= {left} {right}")
        elif isinstance(node, ast.Delete) and all(isinstance(each, ast.Name) for each in node.targets):
            for name in node.targets:
                self.values.pop(name.id, None)  # type: ignore[attr-defined]
        elif isinstance(node, ast.If):
            return self.branches(node)
        elif isinstance(node, (ast.While, ast.For)) and not node.orelse:
            self.loop(node)
        elif isinstance(node, ast.With) and all(each.optional_vars is None for each in node.items):
            self.emit(f"with {[self.value(each.context_expr) for each in node.items]}")
            ends = self.block(node.body)
            self.emit("end")
            return ends
        elif isinstance(node, ast.Return):
            self.emit("return" if node.value is None else f"return {self.value(node.value)}")
            return True
        else:
            raise _UnknownError
        return False

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts):
            for each, item in zip(target.elts, [self.value(item) for item in value.elts], strict=True):
                self.bind(each, item)
        else:
            self.bind(target, self.value(value))

    def bind(self, target: ast.expr, value: str) -> None:
        if isinstance(target, ast.Name):
            self.values[target.id] = value
        elif isinstance(target, ast.Tuple):
            whole = self.emit(f"unpack {len(target.elts)} {value}")
            for index, each in enumerate(target.elts):
                self.bind(each, f"{whole}:{index}")
        elif isinstance(target, (ast.Subscript, ast.Attribute)):
            self.emit(f"store {self.value(target.value)} {self.place(target)} {value}")
        else:
            raise _UnknownError

    def place(self, target: ast.Subscript | ast.Attribute) -> str:
        return f".{target.attr}" if isinstance(target, ast.Attribute) else f"[{self.value(target.slice)}]"

    def branches(self, node: ast.If) -> bool:
        condition = self.emit(f"if {self.value(node.test)}")
        before = dict(self.values)
        first_ends = self.block(node.body)
        first, self.values = self.values, dict(before)
        self.emit("else")
        second_ends = self.block(node.orelse)
        self.emit("end")
        if second_ends:
            self.values = first
        elif not first_ends:
            self.merge(condition, first)
        return first_ends and second_ends

    def merge(self, condition: str, others: dict[str, str]) -> None:
        for name in dict.fromkeys((*others, *self.values)):
            both = others.get(name, "unset"), self.values.get(name, "unset")
            if both[0] != both[1]:
                self.values[name] = _either(condition, *both)

    def loop(self, node: ast.While | ast.For) -> None:
        over = self.value(node.iter) if isinstance(node, ast.For) else ""
        assigned = [
            each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
        ]
        carried = [name for name in dict.fromkeys(assigned) if name in self.values]
        for name in carried:
            self.values[name] = self.emit(f"before {self.values[name]}")
        if isinstance(node, ast.For):
            if not isinstance(node.target, ast.Name):
                raise _UnknownError
            self.values[node.target.id] = self.emit(f"for {over}")
        else:
            self.emit(f"while {self.value(node.test)}")
        heads = {name: self.values[name] for name in carried}
        self.block(node.body)
        self.emit("end " + " ".join(self.values.get(name, "unset") for name in carried))
        self.values.update(heads)

    # Expressions

    def value(self, node: ast.AST) -> str:
        """The name of the value of an expression, after the operations that compute it."""
        method = getattr(self, f"_{type(node).__name__.lower()}", None)
        if method is None:
            raise _UnknownError
        return method(node)

    def _constant(self, node: ast.Constant) -> str:
        return repr(node.value)

    def _name(self, node: ast.Name) -> str:
        if node.id in self.values:
            return self.values[node.id]
        names = self.function.__globals__
        if node.id in self.function.__code__.co_freevars:
            raise _UnknownError
        if node.id in names:
            return self.thing(names[node.id], node.id)
        return f"builtins.{node.id}"

    def thing(self, value: Any, name: str) -> str:
        """What a global name refers to."""
        if isinstance(value, types.ModuleType):
            return value.__name__
        if value is None:  # an optional import
            return name
        if isinstance(value, (bool, int, float, str)):
            return repr(value)
        full = f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', None)}"
        if full.startswith(tuple(f"{package}." for package in _NAMED)):
            return full
        return self.helper(value)

    def helper(self, function: Any) -> str:
        return "{" + _Reader(self.owner, function, self.callers).program() + "}"

    def _attribute(self, node: ast.Attribute) -> str:
        value = self.value(node.value)
        if value == "super":
            return self.inherited(node.attr)
        if value == "self":
            member = inspect.getattr_static(self.owner, node.attr, None)
            is_own = isinstance(member, (types.FunctionType, staticmethod)) and not hasattr(nn.Module, node.attr)
            if is_own:
                return self.helper(member)
        return f"{value}.{node.attr}"

    def inherited(self, name: str) -> str:
        """The method that `super()` refers to."""
        classes = iter(self.owner.__mro__)
        if not any(
            self.function in vars(cls).values() for cls in classes
        ):  # now at the class that defines the function
            raise _UnknownError
        return self.thing(next((vars(cls)[name] for cls in classes if name in vars(cls)), None), "nothing")

    def _call(self, node: ast.Call) -> str:
        if isinstance(node.func, ast.Name) and node.func.id == "super":
            if node.args and self.function not in vars(self.argument_of_super(node)).values():
                raise _UnknownError
            return "super"
        function = self.value(node.func)
        arguments = [self.value(each) for each in node.args]
        named = [f"{each.arg}={self.value(each.value)}" for each in node.keywords]
        return self.emit(f"{function}({', '.join([*arguments, *sorted(named)])})")

    def argument_of_super(self, node: ast.Call) -> type:
        """The class in `super(Block, self)`."""
        first = node.args[0]
        found = self.function.__globals__.get(first.id) if isinstance(first, ast.Name) else None
        if not isinstance(found, type):
            raise _UnknownError
        return found

    def _starred(self, node: ast.Starred) -> str:
        return f"*{self.value(node.value)}"

    def _binop(self, node: ast.BinOp) -> str:
        return self.emit(f"{type(node.op).__name__} {self.value(node.left)} {self.value(node.right)}")

    def _unaryop(self, node: ast.UnaryOp) -> str:
        return self.emit(f"{type(node.op).__name__} {self.value(node.operand)}")

    def _compare(self, node: ast.Compare) -> str:
        operators = " ".join(type(each).__name__ for each in node.ops)
        return self.emit(f"{operators} {self.value(node.left)} {[self.value(each) for each in node.comparators]}")

    def _boolop(self, node: ast.BoolOp) -> str:
        parts = []
        for each in node.values:
            self.emit("part")
            parts.append(self.value(each))
        return self.emit(f"{type(node.op).__name__} {parts}")

    def _ifexp(self, node: ast.IfExp) -> str:
        condition = self.emit(f"if {self.value(node.test)}")
        first = self.value(node.body)
        self.emit("else")
        second = self.value(node.orelse)
        self.emit("end")
        return _either(condition, first, second)

    def _subscript(self, node: ast.Subscript) -> str:
        return self.emit(f"{self.value(node.value)} {self.place(node)}")

    def _slice(self, node: ast.Slice) -> str:
        return ":".join("" if each is None else self.value(each) for each in (node.lower, node.upper, node.step))

    def _tuple(self, node: ast.Tuple) -> str:
        return f"({', '.join(self.value(each) for each in node.elts)},)"

    def _list(self, node: ast.List) -> str:
        return self.emit(f"list {[self.value(each) for each in node.elts]}")

    def _dict(self, node: ast.Dict) -> str:
        keys = ["**" if key is None else self.value(key) for key in node.keys]
        return self.emit(f"dict {keys} {[self.value(each) for each in node.values]}")


def _either(condition: str, first: str, second: str) -> str:
    return f"({condition} ? {first} : {second})"


def _is_documentation(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _only_raises(node: ast.stmt) -> bool:
    """Whether a statement does nothing but check and raise."""
    raises = isinstance(node, ast.If) and not node.orelse and all(isinstance(each, ast.Raise) for each in node.body)
    return raises or isinstance(node, ast.Raise)


def _source(function: types.FunctionType) -> ast.FunctionDef:
    """The syntax tree of a function, if it is that of the code which runs: its file may have changed since the import."""
    code = function.__code__
    try:
        lines, _ = inspect.findsource(code)
        trees, codes = _functions("".join(lines), code.co_filename)
    except (OSError, SyntaxError, ValueError) as error:
        raise _UnknownError from error
    tree, compiled = trees.get(code.co_firstlineno), codes.get((code.co_qualname, code.co_firstlineno))
    if tree is None or compiled is None or _essence(compiled) != _essence(code):
        raise _UnknownError
    return tree


@functools.lru_cache(maxsize=16)
def _functions(source: str, path: str) -> tuple[dict[int, ast.FunctionDef], dict[tuple[str, int], types.CodeType]]:
    """The functions of a file: their syntax trees by line, and their code by name and line."""
    module = ast.parse(source)
    definitions = [each for each in ast.walk(module) if isinstance(each, ast.FunctionDef)]
    trees = {min(each.lineno, *(d.lineno for d in each.decorator_list), each.lineno): each for each in definitions}
    codes, found = [compile(module, path, "exec", dont_inherit=True)], {}
    while codes:
        code = codes.pop()
        found[code.co_qualname, code.co_firstlineno] = code
        codes += [each for each in code.co_consts if inspect.iscode(each)]
    return trees, found


def _essence(code: types.CodeType) -> tuple[Any, ...]:
    constants = [repr(each) for each in code.co_consts if not inspect.iscode(each)]
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants
