"""Replays of request traces: what a cache of a given shape would hit, on real bytes if asked for.

trace, workload ──▶ Request ──▶ paging ──▶ driver ──▶ Report
                                keys,      PrefixCache, payload, clock, corrupt
                                numbers
"""

from .driver import Replay
from .options import ReplayOptions
from .report import Report
from .trace import Request, read_trace
from .workload import Conversations, conversations

__all__ = ["Conversations", "Replay", "ReplayOptions", "Report", "Request", "conversations", "read_trace"]
