"""One small change of a program at a time, made in its syntax tree: what `mutants` plants in the code.

    a < b      a <= b, not a < b        x = f()       (dropped)            n[a:b]     n[:b], n[a:], n[:0]
    a and b    a or b                   return x      return None          break      continue
    a + 1      a - 1, a + 2, a + 0      not x         x                    min(a, b)  max(a, b)

Left alone is what no test ought to notice: docstrings, annotations, decorators, assertions, how an object
prints, and the texts of errors.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

COMPARED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
COMPUTED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
TURNED = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
"""Comparisons whose swap is their negation already."""

SWAPPED = {"min": "max", "max": "min", "any": "all", "all": "any"}
PRINTING = ("__repr__", "__str__")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Place = tuple[str, int | None]
"""Where a node hangs in its parent: the field, and the index if that is a list."""
Way = tuple[Place, ...]


@dataclass(frozen=True)
class Mutation:
    """One change: file and line, the statement before and after, and how to make it again. `statement` is
    the number that `marked` gives it, −1 for what is outside of functions."""

    path: str
    line: int
    statement: int
    before: str
    after: str
    way: Way
    variant: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.before}  ->  {self.after}"


def mutations(path: str, text: str) -> list[Mutation]:
    """Every change that can be made of the file at `path` whose source is `text`, in its order."""
    tree = ast.parse(text)
    numbers = {id(each): number for number, each in enumerate(_statements(tree))}
    found: list[Mutation] = []
    for way, function in list(_places(tree)):
        node = _at(tree, way)
        for variant in range(len(_variants(node, function))):
            statement = _statement(tree, way)
            shown = _at(tree, statement)
            before = _shown(shown)
            original = _plant(tree, way, variant)
            after = _shown(_at(tree, statement))
            _put(tree, way, original)
            if before != after:
                line = getattr(node, "lineno", 0) or shown.lineno
                number = numbers.get(id(shown), -1)
                found.append(Mutation(path, line, number, before, after, way, variant))
    return found


def mutated(text: str, mutation: Mutation) -> ast.Module:
    """The syntax tree of `text` with one change made."""
    tree = ast.parse(text)
    _plant(tree, mutation.way, mutation.variant)
    return ast.fix_missing_locations(tree)


def marked(text: str, first: int) -> tuple[ast.Module, int]:
    """The syntax tree of `text` in which every statement inside a function is preceded by
    `__marks__[n] = 1`, its number counted from `first`; and how many there are."""
    tree = ast.parse(text)
    numbers = {id(each): first + number for number, each in enumerate(_statements(tree))}
    for node in list(ast.walk(tree)):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list) and any(id(each) in numbers for each in block):
                setattr(node, field, [more for each in block for more in _with_mark(each, numbers)])
    return ast.fix_missing_locations(tree), len(numbers)


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Every statement inside a function, docstrings apart."""

    def visit(node: ast.AST, inside: bool) -> Iterator[ast.stmt]:
        for child in ast.iter_child_nodes(node):
            text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if inside and isinstance(child, ast.stmt) and not text:
                yield child
            yield from visit(child, inside or isinstance(child, Function))

    return visit(tree, False)


def _with_mark(statement: ast.stmt, numbers: dict[int, int]) -> list[ast.stmt]:
    if id(statement) not in numbers:
        return [statement]
    return [*ast.parse(f"__marks__[{numbers[id(statement)]}] = 1").body, statement]


def read(root: Path, folders: tuple[str, ...], files: tuple[str, ...]) -> dict[str, str]:
    """The sources of the package below `root` that are in `folders` or are `files`, by path."""
    package = root / "src" / "tiertree"
    paths = [path for folder in folders for path in sorted((package / folder).glob("*.py"))]
    paths += [package / file for file in files]
    return {path.relative_to(package).as_posix(): path.read_text() for path in paths}


# -- where -----------------------------------------------------------------------------------------


def _places(tree: ast.Module) -> Iterator[tuple[Way, Function | None]]:
    """The way to every node that may be changed, and the function it is in."""

    def visit(node: ast.AST, way: Way, function: Function | None) -> Iterator[tuple[Way, Function | None]]:
        yield way, function
        inside = node if isinstance(node, Function) else function
        for field, value in ast.iter_fields(node):
            if _left_alone(node, field):
                continue
            if isinstance(value, ast.AST):
                yield from visit(value, (*way, (field, None)), inside)
            elif isinstance(value, list):
                for index, each in enumerate(value):
                    if isinstance(each, ast.AST) and not _skipped(each):
                        yield from visit(each, (*way, (field, index)), inside)

    yield from visit(tree, (), None)


def _left_alone(node: ast.AST, field: str) -> bool:
    return field in ("annotation", "returns", "decorator_list", "exc", "msg", "ctx", "bases", "type_params")


def _skipped(node: ast.AST) -> bool:
    """Whether nothing in it is to be changed: imports, texts, assertions, what is for the type checker."""
    match node:
        case ast.Import() | ast.ImportFrom() | ast.Assert() | ast.JoinedStr():
            return True
        case ast.Expr(value=ast.Constant()):
            return True
        case ast.FunctionDef(name=name):
            return name in PRINTING
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
        case ast.Assign(targets=[ast.Name(id=name)]):
            return name in ("__slots__", "__all__")
    return False


def _at(tree: ast.AST, way: Way) -> ast.AST:
    for field, index in way:
        value = getattr(tree, field)
        tree = value if index is None else value[index]
    return tree


def _statement(tree: ast.AST, way: Way) -> Way:
    """The way to the innermost statement that a node is in."""
    for length in range(len(way), 0, -1):
        if isinstance(_at(tree, way[:length]), ast.stmt):
            return way[:length]
    return ()


def _shown(node: ast.AST) -> str:
    """A statement on one line; of one with a body its head."""
    text = ast.unparse(node)
    return text.split("\n")[0] if hasattr(node, "body") else " ".join(text.split())


def _plant(tree: ast.AST, way: Way, variant: int) -> ast.AST:
    """Make one change in `tree`; returns the node that was there."""
    function = None
    for length in range(len(way)):
        above = _at(tree, way[:length])
        function = above if isinstance(above, Function) else function
    node = _at(tree, way)
    made = _variants(node, function)[variant](copy.deepcopy(node))
    _put(tree, way, ast.copy_location(made, node))
    return node


def _put(tree: ast.AST, way: Way, node: ast.AST) -> None:
    parent, (field, index) = _at(tree, way[:-1]), way[-1]
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


# -- what ------------------------------------------------------------------------------------------


def _variants(node: ast.AST, function: Function | None) -> list[Callable[[ast.AST], ast.AST]]:
    """What can be made of `node`, which is in `function`; each takes a copy of it."""
    made: list[Callable[[ast.AST], ast.AST]] = []
    match node:
        case ast.Compare(ops=ops):
            made += [_compare(at) for at, op in enumerate(ops) if type(op) in COMPARED]
        case ast.BoolOp():
            made.append(_bool_op)
        case ast.UnaryOp(op=ast.Not()):
            made.append(lambda each: each.operand)
        case ast.BinOp(op=op) if type(op) in COMPUTED and not _is_text(node):
            made.append(_operator)
        case ast.AugAssign(op=op) if type(op) in COMPUTED:
            made += [_operator, _dropped]
        case ast.Constant(value=bool()):
            made.append(lambda each: ast.Constant(not each.value))
        case ast.Constant(value=int() | float()):
            made += [lambda each: ast.Constant(each.value + 1), lambda each: ast.Constant(each.value - 1)]
        case ast.Assign() | ast.Expr(value=ast.Call()) | ast.Delete() | ast.Raise() if function:
            made.append(_dropped)
        case ast.AnnAssign(value=ast.AST()) if function:
            made.append(_dropped)
        case ast.Return(value=ast.AST()):
            made += _returns(function)
        case ast.Call(func=ast.Name(id=name)) if name in SWAPPED:
            made.append(_swap_call)
        case ast.Break():
            made.append(lambda _: ast.Continue())
        case ast.Continue():
            made.append(lambda _: ast.Break())
        case ast.Slice():
            made += _slices(node)
    match node:
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test) if not _turned(test):
            made.append(_negate)
        case ast.comprehension(ifs=ifs):
            made += [_negate_if(at) for at, test in enumerate(ifs) if not _turned(test)]
    return made


def _is_text(node: ast.BinOp) -> bool:
    """Whether an operand is a text or a tuple of types, which the operators in question do not fit."""
    sides = (node.left, node.right)
    return any(
        isinstance(side, ast.JoinedStr) or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in sides
    )


def _turned(test: ast.expr) -> bool:
    """Whether another change negates this condition already, or it never changes."""
    match test:
        case ast.Compare(ops=[op]):
            return isinstance(op, TURNED)
        case ast.UnaryOp(op=ast.Not()) | ast.Constant():
            return True
    return False


def _compare(at: int) -> Callable[[ast.AST], ast.AST]:
    def make(node: ast.Compare) -> ast.AST:
        node.ops[at] = COMPARED[type(node.ops[at])]()
        return node

    return make


def _bool_op(node: ast.BoolOp) -> ast.AST:
    node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    return node


def _operator(node: ast.BinOp | ast.AugAssign) -> ast.AST:
    node.op = COMPUTED[type(node.op)]()
    return node


def _dropped(_: ast.AST) -> ast.AST:
    return ast.Pass()


def _negate(node: ast.If | ast.While | ast.IfExp) -> ast.AST:
    node.test = ast.UnaryOp(ast.Not(), node.test)
    return node


def _negate_if(at: int) -> Callable[[ast.AST], ast.AST]:
    def make(node: ast.comprehension) -> ast.AST:
        node.ifs[at] = ast.UnaryOp(ast.Not(), node.ifs[at])
        return node

    return make


def _returns(function: Function | None) -> list[Callable[[ast.AST], ast.AST]]:
    """`return None`; from a function that says it answers with a bool, each of the two instead."""
    truth = function is not None and function.returns is not None and ast.unparse(function.returns) == "bool"
    values: list[object] = [True, False] if truth else [None]
    return [lambda _, value=value: ast.Return(ast.Constant(value)) for value in values]


def _swap_call(node: ast.Call) -> ast.AST:
    node.func = ast.Name(SWAPPED[node.func.id], ast.Load())
    return node


def _slices(node: ast.Slice) -> list[Callable[[ast.AST], ast.AST]]:
    """Without its first bound, without its second, and empty."""
    made: list[Callable[[ast.AST], ast.AST]] = []
    if node.lower is not None:
        made.append(lambda each: ast.Slice(None, each.upper, each.step))
    if node.upper is not None:
        made.append(lambda each: ast.Slice(each.lower, None, each.step))
    made.append(lambda _: ast.Slice(None, ast.Constant(0), None))
    return made
