"""What came of one run, and of many."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Violation:
    """Something that must not be. `kind` is the sort of it; `seconds` is when, in virtual time."""

    kind: str
    detail: str
    seconds: float


@dataclass(frozen=True, slots=True)
class RunReport:
    """One run. Equal plans give equal reports, on any machine."""

    seed: int
    requests: int
    operations: Mapping[str, int]
    """Actions of the cache by type."""
    faults: Mapping[str, int]
    """Faults done by name."""
    pages_verified: int
    """Pages whose bytes were compared with what they must be."""
    violations: tuple[Violation, ...]
    counts: Mapping[str, int]
    """What requests and operators did, and the cache's own counters."""
    digest: str
    """SHA-256 of every decision in order."""
    seconds: float
    """Virtual time from the first arrival to the end."""
    latencies: Mapping[int, float]
    """Virtual seconds from arrival to end, by number of request."""
    lines: tuple[str, ...] = ()
    """The last things that were decided."""


class Campaign:
    """Many runs added up, in the order in which they are added."""

    def __init__(self) -> None:
        self.runs = 0
        self.requests = 0
        self.pages_verified = 0
        self.seconds = 0.0
        self.operations: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.violations: list[tuple[int, Violation]] = []
        self._digest = hashlib.sha256()

    def add(self, run: RunReport) -> None:
        """One more run."""
        self.runs += 1
        self.requests += run.requests
        self.pages_verified += run.pages_verified
        self.seconds += run.seconds
        self.operations.update(run.operations)
        self.faults.update(run.faults)
        self.counts.update(run.counts)
        self.violations += [(run.seed, each) for each in run.violations]
        self._digest.update(f"{run.seed} {run.digest}\n".encode())

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON. `digest` is that of all runs."""
        return {
            "runs": self.runs,
            "requests": self.requests,
            "operations": sum(self.operations.values()),
            "operations_by_type": dict(sorted(self.operations.items())),
            "faults": dict(sorted(self.faults.items())),
            "pages_verified": self.pages_verified,
            "counts": dict(sorted(self.counts.items())),
            "virtual_seconds": round(self.seconds, 6),
            "violations": [{"seed": seed, **asdict(each)} for seed, each in self.violations],
            "digest": self._digest.hexdigest(),
        }
