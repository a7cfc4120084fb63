"""Seeded simulation: the real cache in a made-up world, where everything that can go wrong does."""

from .plan import FAULTS, HABITS, Plan, draw_plan
from .report import RunReport
from .run import simulate

__all__ = ["FAULTS", "HABITS", "Plan", "RunReport", "draw_plan", "simulate"]
