"""Causal language models of transformers 5 on the cache, with no model code changed; needs the extra `hf`.

plan          what a model keeps, layer by layer
sizing        the configuration of a cache for it
paged         transformers' cache classes over the device pools
runner        forward passes
adapters      LoRA
fingerprint   what a model and its weights are in keys
engine        HFEngine
tiny          small random models of each architecture
"""

from .adapters import unwrapped
from .engine import HFEngine
from .fingerprint import adapter_digest, fingerprint
from .plan import Plan, UnsupportedModel, make_plan
from .runner import HFRunner
from .sizing import cache_config
from .tiny import NAMES, tiny

__all__ = [
    "HFEngine",
    "HFRunner",
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
