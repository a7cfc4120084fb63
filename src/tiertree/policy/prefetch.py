"""How long a prefetch may keep a request waiting. Pure arithmetic, no clock."""

from __future__ import annotations

import math

from ..types import StopRule


def patience_seconds(
    rule: StopRule, base_seconds: float, per_1024_tokens_seconds: float, tokens: int
) -> float:
    """Seconds after its start until a prefetch of `tokens` stops waiting: 0 for best_effort, infinity
    for wait_complete (its operation has a deadline of its own), base + per-1,024-tokens for timeout."""
    if rule is StopRule.BEST_EFFORT:
        return 0.0
    if rule is StopRule.WAIT_COMPLETE:
        return math.inf
    return base_seconds + per_1024_tokens_seconds * tokens / 1024
