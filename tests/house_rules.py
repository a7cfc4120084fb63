"""The limits of this code base as pure functions: each takes text or a syntax tree and returns complaints.

`test_house.py` runs every one of them on a snippet that breaks it, and then on the repository.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

LAYERS = (
    *("types", "validate", "components", "kvlayout", "kindconfig", "tierconfig", "config"),
    *("tree", "policy", "pools", "transfer", "storage"),
    *("events", "metrics", "treeview", "executor", "poison", "driver"),
    *("guard", "build", "lifecycle", "cache"),
    *("engines", "replay", "testing", "simulate", "server", "chat", "cli", "__main__"),
)
"""What stands directly in the package, each allowed to import only itself and what comes before it."""

DECIDING = ("types", "validate", "kvlayout", "tree", "components", "policy")
"""The layers that decide: no torch, no I/O, no clock, no thread, no randomness."""

IMPURE_MODULES = frozenset(
    (
        *("torch", "threading", "_thread", "multiprocessing", "concurrent", "asyncio", "queue", "signal"),
        *("os", "io", "pathlib", "shutil", "tempfile", "subprocess", "mmap", "fcntl", "logging"),
        *("socket", "ssl", "select", "selectors", "time", "datetime", "random", "secrets", "uuid"),
    )
)
IMPURE_CALLS = frozenset({"open", "print", "input", "exec", "eval", "__import__"})

EXECUTING_MODULES = frozenset(
    ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "code")
)
EXECUTING_CALLS = frozenset({"eval", "exec", "compile", "__import__"})
EXECUTING_METHODS = frozenset(
    ("torch.load", "torch.hub", "np.load", "numpy.load", "os.system", "os.popen", "importlib.import_module")
)

KIND_WORDS = frozenset({"SWA", "MAMBA", "swa", "mamba"})
KINDS_ALLOWED = ("types", "components", "engines", "replay", "simulate")
"""The layers that may tell the kinds apart (and the package's own list of public names)."""

UNFINISHED = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX", "HA" + "CK")) + r")\b")

FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 60

Function = ast.FunctionDef | ast.AsyncFunctionDef
Scope = Function | ast.ClassDef


class Module(NamedTuple):
    """One source file: its path below the package ("tree/radix.py"), text and syntax tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def package(self) -> tuple[str, ...]:
        """The dotted parts of the package the file is in: ("tiertree", "tree")."""
        return ("tiertree", *self.path.split("/")[:-1])

    @property
    def layer(self) -> str:
        """The part of `LAYERS` that the file belongs to; "" for the package's own __init__."""
        first = self.path.split("/")[0].removesuffix(".py")
        return "" if first == "__init__" else first


def parse(path: str, text: str) -> Module:
    """The module at `path`."""
    return Module(path, text, ast.parse(text))


def imported(module: Module) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything imported anywhere in the file, relative ones resolved."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.package[: len(module.package) - node.level + 1] if node.level else ()
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def layering(module: Module) -> list[str]:
    """Imports of a later layer, and files that stand in no layer."""
    if not module.layer:
        return []
    if module.layer not in LAYERS:
        return [f"{module.path}: {module.layer!r} is in no layer; give it a place in LAYERS"]
    complaints = []
    for line, name in imported(module):
        parts = name.split(".")
        if parts[0] != "tiertree":
            continue
        # Public names come from the package itself, which is made of everything up to the cache.
        target = parts[1] if len(parts) > 1 and parts[1] in LAYERS else "cache"
        if target != module.layer and LAYERS.index(target) >= LAYERS.index(module.layer):
            complaints.append(f"{module.path}:{line}: {module.layer} imports {name}, of a later layer")
    return complaints


def impurity(module: Module) -> list[str]:
    """Imports and calls that a layer which decides must do without."""
    if module.layer not in DECIDING:
        return []
    complaints = [
        f"{module.path}:{line}: {module.layer} imports {name}"
        for line, name in imported(module)
        if name.split(".")[0] in IMPURE_MODULES or name.startswith("numpy.random")
    ]
    for node in ast.walk(module.tree):
        match node:
            case ast.Call(func=ast.Name(id=name), lineno=line) if name in IMPURE_CALLS:
                complaints.append(f"{module.path}:{line}: {module.layer} calls {name}()")
            case ast.Attribute(value=ast.Name(id="np" | "numpy"), attr="random", lineno=line):
                complaints.append(f"{module.path}:{line}: {module.layer} uses numpy.random")
    return complaints


def executes_input(module: Module) -> list[str]:
    """Whatever could run what it reads: pickles, evaluated texts, code or shells made of strings."""
    complaints = [
        f"{module.path}:{line}: imports {name}"
        for line, name in imported(module)
        if name.split(".")[0] in EXECUTING_MODULES
    ]
    for node in ast.walk(module.tree):
        match node:
            case ast.Call(func=ast.Name(id=name), lineno=line) if name in EXECUTING_CALLS:
                complaints.append(f"{module.path}:{line}: calls {name}()")
            case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=name), lineno=line):
                if f"{owner}.{name}" in EXECUTING_METHODS:
                    complaints.append(f"{module.path}:{line}: calls {owner}.{name}()")
            case ast.keyword(arg="shell" | "allow_pickle" as name, value=value):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    complaints.append(f"{module.path}:{value.lineno}: passes {name}")
    return complaints


def unfinished(path: str, text: str) -> list[str]:
    """Notes of work left undone."""
    lines = enumerate(text.splitlines(), 1)
    return [f"{path}:{number}: {found[0]}" for number, line in lines if (found := UNFINISHED.search(line))]


def scopes(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Scope]]:
    """Every class and function below `node` with its qualified name, outermost first."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Scope):
            yield f"{prefix}{child.name}", child
            yield from scopes(child, f"{prefix}{child.name}.")
        else:
            yield from scopes(child, prefix)


def too_long(module: Module, exceptions: Collection[str]) -> list[str]:
    """Files and functions over their limits, but for "path" and "path:qualified.name" in `exceptions`."""
    sizes = {module.path: (len(module.text.splitlines()), FILE_LINES_MAX)}
    for name, node in scopes(module.tree):
        if isinstance(node, Function):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            sizes[f"{module.path}:{name}"] = (lines, FUNCTION_LINES_MAX)
    return [
        f"{place}: {lines} lines, at most {most}"
        for place, (lines, most) in sizes.items()
        if lines > most and place not in exceptions
    ]


def documented_methods(modules: Iterable[Module]) -> dict[str, set[str]]:
    """For every class by name: its own methods that have a docstring."""
    found: dict[str, set[str]] = {}
    for module in modules:
        for _, node in scopes(module.tree):
            if isinstance(node, ast.ClassDef):
                own = {
                    each.name for each in node.body if isinstance(each, Function) and ast.get_docstring(each)
                }
                found.setdefault(node.name, set()).update(own)
    return found


def undocumented(module: Module, documented: Mapping[str, set[str]]) -> list[str]:
    """Public classes, functions and methods without a docstring. A method may inherit that of a base class
    which the class names; property setters and overloads have none of their own."""
    complaints = []
    if module.tree.body and not ast.get_docstring(module.tree):
        complaints.append(f"{module.path}: module without docstring")

    def visit(body: list[ast.stmt], prefix: str, inherited: set[str]) -> None:
        for node in body:
            if not isinstance(node, Scope) or node.name.startswith("_"):
                continue
            decorators = [ast.unparse(each) for each in node.decorator_list]
            secondary = any(re.search(r"\.(setter|deleter)$|\boverload$", each) for each in decorators)
            if not (ast.get_docstring(node) or secondary or node.name in inherited):
                complaints.append(f"{module.path}:{node.lineno}: {prefix}{node.name} without docstring")
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
                visit(node.body, f"{node.name}.", set().union(*(documented.get(base, ()) for base in bases)))

    visit(module.tree.body, "", set())
    return complaints


def kinds_told_apart(module: Module) -> list[str]:
    """Uses of single kinds, by name or by text, outside the layers that may tell them apart."""
    if not module.layer or module.layer in KINDS_ALLOWED:
        return []
    complaints = []
    for node in ast.walk(module.tree):
        match node:
            case (
                ast.Name(id=word, lineno=line)
                | ast.Attribute(attr=word, lineno=line)
                | ast.alias(name=word, lineno=line)
                | ast.Constant(value=str(word), lineno=line)
            ) if word in KIND_WORDS:
                complaints.append(f"{module.path}:{line}: {word}")
    return complaints


def hides_faults(module: Module, exceptions: Collection[str]) -> list[str]:
    """Handlers of everything that do not raise again, outside "path:qualified.name" in `exceptions`."""
    complaints = []
    for name, scope in [("", module.tree), *scopes(module.tree)]:
        place = f"{module.path}:{name}"
        handlers = [node for node in own_nodes(scope) if isinstance(node, ast.ExceptHandler)]
        for handler in handlers if place not in exceptions else []:
            raises = any(isinstance(node, ast.Raise) for node in own_nodes(handler))
            if catches_everything(handler) and not raises:
                complaints.append(f"{place}: line {handler.lineno}: catches everything and goes on")
    return complaints


def catches_everything(handler: ast.ExceptHandler) -> bool:
    """Whether it is bare, or names Exception or BaseException."""
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    names = {ast.unparse(kind).removeprefix("builtins.") for kind in kinds if kind is not None}
    return handler.type is None or bool(names & {"Exception", "BaseException"})


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Everything below `node` that is not in a class or function of its own."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Scope):
            yield child
            yield from own_nodes(child)


def python_blocks(markdown: str) -> list[str]:
    """The contents of ```python fences, padded so that line numbers are those of the file."""
    found = re.finditer(r"^```python\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL)
    return ["\n" * markdown.count("\n", 0, each.start(1)) + each[1] for each in found]


def cli_words(parser: argparse.ArgumentParser) -> set[str]:
    """Every subcommand and long option of `parser`; help itself is left out."""
    words: set[str] = set()
    for action in parser._actions:
        words |= {option for option in action.option_strings if option.startswith("--")}
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                words |= {name} | cli_words(sub)
    return words - {"--help"}


def unmentioned(words: Iterable[str], text: str) -> list[str]:
    """Those of `words` that `text` has nowhere as a word of its own (--limit is not in --limits)."""
    return sorted(word for word in words if not re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text))


def dead_references(markdown: str, exists: Collection[str], tests: Collection[str]) -> list[str]:
    """Paths of this repository, and tests as `tests/file.py::test_name`, that are named but not there."""
    tops = "src|tests|docs|benchmarks|examples|\\.ci"
    complaints = []
    for path, test in re.findall(rf"(?<![\w/.])((?:{tops})/[\w./-]*\w)(?:::(\w+))?", markdown):
        if path not in exists:
            complaints.append(path)
        elif test and f"{path}::{test}" not in tests:
            complaints.append(f"{path}::{test}")
    return complaints


def numbers_without_command(markdown: str) -> list[str]:
    """Headings of sections that have a table but do not say which command made it."""
    sections = re.split(r"^#+ +(.*)$", markdown, flags=re.MULTILINE)
    command = re.compile(r"(make [a-z]+|tiertree [a-z]+|python3? \S+|benchmarks/\S+\.py|pytest )")
    return [
        heading
        for heading, body in zip(sections[1::2], sections[2::2], strict=True)
        if re.search(r"^\|", body, re.MULTILINE) and not command.search(body)
    ]
