"""What all tests share: Hypothesis profiles, and the optional trace."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# Pages that nobody owns are poisoned in all tests (see `tiertree.poison`); TIERTREE_DEBUG_POISON=0: in none.
os.environ.setdefault("TIERTREE_DEBUG_POISON", "1")

# A failure prints the blob that repeats it. No deadlines: nothing in the tests asserts on wall-clock time.
settings.register_profile("dev", print_blob=True, deadline=None)
# The same examples on every run, so that a change fails for what it changed.
settings.register_profile("ci", print_blob=True, deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def trace_path() -> Path:
    """The Mooncake conversation trace: $TIERTREE_TRACE, or ../shared/traces beside the repository."""
    beside = ROOT.parent / "shared" / "traces" / "mooncake_conversation.jsonl"
    path = Path(os.environ.get("TIERTREE_TRACE") or beside)
    if not path.is_file():
        pytest.skip(f"no trace at {path}; set TIERTREE_TRACE to mooncake_conversation.jsonl")
    return path
