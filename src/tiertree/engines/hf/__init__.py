"""Causal language models of transformers 5 on the cache, with no model code changed; needs the extra `hf`.

plan          what a model keeps, layer by layer
probe         what it computes, tried before it is served
sizing        the configuration of a cache for it
paged         transformers' cache classes over the device pools
runner        forward passes
adapters      LoRA
fingerprint   what a model and its weights are in keys
engine        HFEngine
tiny          small random models of each architecture

What an `HFEngine` is asked with (`Request`, `Sampling`, `Span`, `Limits`) and what it answers (`Reply`) can
be imported from here too.
"""

from ..request import Limits, Reply, Request, Sampling, Span
from .adapters import unwrapped
from .engine import HFEngine
from .fingerprint import adapter_digest, fingerprint
from .plan import Plan, make_plan
from .probe import UnsupportedModel
from .runner import HFRunner
from .sizing import cache_config
from .tiny import NAMES, tiny

__all__ = [
    "HFEngine",
    "HFRunner",
    "Limits",
    "Reply",
    "Request",
    "Sampling",
    "Span",
    "cache_config",
    "tiny",
    "NAMES",
    "Plan",
    "make_plan",
    "UnsupportedModel",
    "fingerprint",
    "adapter_digest",
    "unwrapped",
]
