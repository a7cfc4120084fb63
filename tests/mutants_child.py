"""What `mutants` does in its children: runs an area's tests with every statement marked, or with a fault.

A child is a fork that has torch, numpy, hypothesis and pytest already, but nothing of tiertree: that it
imports itself, from the syntax trees that it is given. No file is ever changed.
"""

from __future__ import annotations

import ast
import builtins
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import mutations
import numpy
import pytest
import rich.live
import torch
import xxhash
from mutations import Mutation

PRELOADED = (hypothesis, numpy, pytest, rich.live, torch, xxhash)
"""What every child has before it starts; all but tiertree, which it imports with its fault."""

ROOT = Path(__file__).resolve().parent.parent
TEST_CPU_SECONDS = 8.0
"""Time of a processor that a test has at least, beside several times what it took in the survey."""
TEST_SECONDS = 60.0
"""The same by the clock: a test may wait for something that never comes."""
SLOWER = 5
QUICK = 60
"""So many tests are tried before all the others, so that their files alone need collecting."""
MEMORY_BYTES = 6 << 30


@dataclass(frozen=True)
class Area:
    """A part of the code, and the tests that must notice what is wrong in it."""

    name: str
    folders: tuple[str, ...]
    files: tuple[str, ...]
    tests: str

    def sources(self) -> dict[str, str]:
        """The text of every file, by path below the package."""
        return mutations.read(ROOT, self.folders, self.files)

    def test_files(self) -> list[str]:
        """The files of its tests."""
        paths = [ROOT / "tests" / f"test_{name}.py" for name in self.tests.split()]
        return [str(path) for path in paths if path.exists()]


class Planted(importlib.abc.MetaPathFinder):
    """Finds some modules of the package, and gives each the syntax tree that it is to have."""

    def __init__(self, trees: dict[str, ast.Module]) -> None:
        self.trees = {module_name(path): (package_file(path), tree) for path, tree in trees.items()}

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        """The spec of a changed module; None for all others."""
        if name not in self.trees:
            return None
        file, tree = self.trees[name]
        loader = importlib.machinery.SourceFileLoader(name, str(file))
        code = compile(tree, str(file), "exec", dont_inherit=True)
        loader.get_code = lambda _: code  # type: ignore[method-assign]
        return importlib.util.spec_from_file_location(name, file, loader=loader)


def package_file(path: str) -> Path:
    """Where a file of the package is."""
    return ROOT / "src" / "tiertree" / path


def module_name(path: str) -> str:
    """The name under which a file of the package is imported."""
    return "tiertree." + path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


class Watch:
    """Runs the tests of `order` alone, and in that order; each may take a multiple of the seconds that are
    beside it, or its process ends. None: all, without limits. Remembers the first that fails."""

    def __init__(self, order: dict[str, float] | None = None) -> None:
        self.order = order
        self.failed = ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """All files have been collected."""
        if self.order is not None:
            place = {name: at for at, name in enumerate(self.order)}
            items[:] = sorted((i for i in items if i.nodeid in place), key=lambda i: place[i.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins."""
        if self.order is not None:
            wind_up(SLOWER * self.order[nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A phase of a test is over."""
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        """A file has been collected, or cannot be."""
        if report.failed and not self.failed:
            self.failed = report.nodeid


class Surveyor(Watch):
    """Writes down which statements each test runs, and how much time of a processor it takes."""

    def __init__(self, marks: bytearray) -> None:
        super().__init__()
        self.marks = marks
        self.always: list[int] | None = None
        self.tests: dict[str, tuple[float, list[int]]] = {}

    def take(self) -> list[int]:
        """The statements that ran since it was asked last."""
        found: list[int] = numpy.flatnonzero(numpy.frombuffer(bytes(self.marks), numpy.uint8)).tolist()
        self.marks[:] = bytes(len(self.marks))
        return found

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins; what ran before the first one ran while modules were imported."""
        super().pytest_runtest_logstart(nodeid)
        found = self.take()
        if self.always is None:
            self.always = found
        self.began = time.process_time()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """A test is over."""
        self.tests[nodeid] = (time.process_time() - self.began, self.take())


def wind_up(more: float) -> None:
    """Give this process its time for one test: `more` seconds of a processor than the least."""
    signal.setitimer(signal.ITIMER_PROF, TEST_CPU_SECONDS + more)
    signal.setitimer(signal.ITIMER_REAL, TEST_SECONDS + more)


def settle_in(home: Path) -> None:
    """Make this child a group of its own, with a place for its files, without a voice, and bounded."""
    os.setsid()
    os.chdir(home)
    os.environ.update(CI="1", TMPDIR=str(home), OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT / "src"))
    tempfile.tempdir = None
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    log = os.open(home / "log", os.O_WRONLY | os.O_CREAT)
    for number in (1, 2):
        os.dup2(log, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
    hypothesis.settings.register_profile(
        "mutants",
        deadline=None,
        derandomize=True,
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
    )


def run_tests(files: Sequence[str], watch: Watch) -> int:
    """What pytest says of the tests in `files`."""
    flags = ["-x", "-q", "--tb=no", "--no-header", "-p", "no:cacheprovider", "--hypothesis-profile=mutants"]
    return int(pytest.main(["-c", str(ROOT / "pyproject.toml"), *flags, *files], [watch]))


def survey(area: Area, home: Path) -> int:
    """The life of the child that looks around: leaves `home`/survey; 1 if a test fails."""
    settle_in(home)
    trees: dict[str, ast.Module] = {}
    first: dict[str, int] = {}
    total = 0
    for path, text in area.sources().items():
        first[path] = total
        trees[path], count = mutations.marked(text, total)
        total += count
    surveyor = Surveyor(bytearray(total))
    builtins.__marks__ = surveyor.marks  # type: ignore[attr-defined]
    sys.meta_path.insert(0, Planted(trees))
    if run_tests(area.test_files(), surveyor):
        (home / "failed").write_text(surveyor.failed)
        return 1
    found = {"first": first, "always": surveyor.always, "tests": surveyor.tests}
    (home / "survey").write_text(json.dumps(found))
    return 0


def be_tested(mutation: Mutation, tests: dict[str, float], home: Path) -> int:
    """The life of a child with a fault: 1 if a test noticed, 0 if none did. The test is named in
    `home`/failed."""
    settle_in(home)
    wind_up(SLOWER)
    text = package_file(mutation.path).read_text()
    sys.meta_path.insert(0, Planted({mutation.path: mutations.mutated(text, mutation)}))
    items = list(tests.items())
    for part in (dict(items[:QUICK]), dict(items[QUICK:])):
        watch = Watch(part)
        code = run_tests(sorted({str(ROOT / name.split("::")[0]) for name in part}), watch) if part else 0
        if code:
            (home / "failed").write_text(watch.failed or f"pytest: {code}")
            return 1
    return 0
