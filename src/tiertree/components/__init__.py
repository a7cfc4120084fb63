"""The rules of each kind of attention state: the only place that tells the kinds apart."""

from .base import Component, Pages
from .mamba import Mamba
from .registry import register_kind
from .sliding_window import SlidingWindow

__all__ = ["Component", "Mamba", "Pages", "SlidingWindow", "register_kind"]
