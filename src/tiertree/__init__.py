"""tiertree: a hierarchical prefix KV cache for LLM inference. One radix tree over three tiers of memory."""

from .cache import PrefixCache
from .config import (
    CacheConfig,
    DeviceConfig,
    HostConfig,
    KVLayout,
    LoadBackConfig,
    MemoryOrder,
    PrefetchConfig,
    SidecarConfig,
    StorageConfig,
)
from .driver import Evicted
from .events import AllBlocksCleared, BlockRemoved, BlockStored, EventsLost
from .metrics import Stats, TierStats
from .tree.fetch import Prefetch
from .tree.insert import Inserted
from .tree.key import Key
from .tree.lease import Lease, Match
from .tree.load import LoadBack, Progress
from .types import (
    FULL,
    CacheClosed,
    ConfigError,
    ForeignObject,
    ForkedCache,
    InvalidNamespace,
    InvalidSlots,
    InvalidTokens,
    InvariantViolated,
    LeaseReleased,
    NoRoom,
    Refused,
    StaleMatch,
    StopRule,
    StorageError,
    StorageLocked,
    Tier,
    TiertreeError,
    TraceError,
    WritePolicy,
    WrongThread,
)

__all__ = [
    "FULL",
    "AllBlocksCleared",
    "BlockRemoved",
    "BlockStored",
    "CacheClosed",
    "CacheConfig",
    "ConfigError",
    "DeviceConfig",
    "Evicted",
    "EventsLost",
    "ForeignObject",
    "ForkedCache",
    "HostConfig",
    "Inserted",
    "InvalidNamespace",
    "InvalidSlots",
    "InvalidTokens",
    "InvariantViolated",
    "KVLayout",
    "Key",
    "Lease",
    "LeaseReleased",
    "LoadBack",
    "LoadBackConfig",
    "Match",
    "MemoryOrder",
    "NoRoom",
    "Prefetch",
    "PrefetchConfig",
    "PrefixCache",
    "Progress",
    "Refused",
    "SidecarConfig",
    "StaleMatch",
    "Stats",
    "StopRule",
    "StorageConfig",
    "StorageError",
    "StorageLocked",
    "Tier",
    "TierStats",
    "TiertreeError",
    "TraceError",
    "WritePolicy",
    "WrongThread",
]
