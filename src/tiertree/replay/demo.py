"""The demo: a made-up workload and three tiers, each too small for it."""

from __future__ import annotations

from ..types import WritePolicy
from .options import ReplayOptions
from .trace import Request
from .workload import Conversations, conversations

BLOCK_TOKENS = 64
PAGE_BYTES = 32 << 10


def demo_requests(requests: int, seed: int) -> list[Request]:
    """`requests` turns of chat conversations behind one system prompt."""
    return conversations(Conversations(requests=requests), BLOCK_TOKENS, seed)


def demo_options(write_policy: WritePolicy, seed: int) -> ReplayOptions:
    """Real bytes through a device that holds a few conversations, a host a few more, and a disk most."""
    return ReplayOptions(
        device_pages=256,
        host_pages=768,
        disk_pages=4096,
        write_policy=write_policy,
        block_tokens=BLOCK_TOKENS,
        page_bytes=PAGE_BYTES,
        seed=seed,
    )
