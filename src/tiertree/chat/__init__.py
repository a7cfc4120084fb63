"""Multi-turn chats against an engine: what users say, clients that say it, what they measured.

workload ─▶ clients ──submit, step──▶ any engine: engines.Engine, plain.PlainEngine
               │
               ▼
            course ─▶ show, verdict        runs, child: the three runs of `tiertree demo`
"""

from .clients import Serving, converse
from .course import Course, Served, first_difference
from .workload import Workload

__all__ = ["Course", "Served", "Serving", "Workload", "converse", "first_difference"]
