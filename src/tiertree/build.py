"""From a configuration to the parts of a cache: the tree, the pools, the executor, the disk tier."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import torch

from .config import CacheConfig
from .executor import Executor, MetadataExecutor, PoolExecutor
from .policy.eviction import make_policy
from .pools.group import PoolGroup
from .storage.base import Storage
from .storage.disk import DiskStorage
from .transfer.cpu import CpuEngine
from .transfer.cuda import CudaEngine
from .transfer.engine import TransferEngine
from .tree.core import Core
from .tree.journal import Journal
from .tree.key import KeyMaker
from .tree.ledger import Ledger
from .tree.partial import Partial
from .tree.rules import Rules
from .types import ConfigError, Tier


def fingerprint(config: CacheConfig, revision: str) -> bytes:
    """What every page hash is rooted in, besides namespace and page shape: the model and its weights."""
    return hashlib.sha256(json.dumps([config.model, revision]).encode()).digest()


def make_core(config: CacheConfig) -> Core:
    """The tree that `config` describes. Raises ConfigError for an unknown eviction policy."""
    ledgers = (Ledger(config.device_pages), Ledger(config.host_pages))
    size = config.page_size
    rules = Rules(
        write_policy=config.write_policy,
        selective_hits=config.selective_hits,
        load_back_pages_min=-(-config.load_back.min_tokens // size),
        load_back_pages_max=config.load_back.max_pages,
        prefetch_pages_min=-(-config.prefetch.min_tokens // size),
        prefetch_pages_in_flight_max=config.prefetch.max_pages_in_flight,
        op_deadline_seconds=config.op_deadline_seconds,
        operations_max=config.max_operations,
        breaker_failures=config.breaker.failures,
        breaker_base_seconds=config.breaker.base_seconds,
        breaker_max_seconds=config.breaker.max_seconds,
    )
    policy = make_policy(config.eviction)
    device, host = config.kind_pages(Tier.DEVICE), config.kind_pages(Tier.HOST)
    partials = tuple(
        Partial(index, each.rules, size, (Ledger(device[each.kind]), Ledger(host.get(each.kind, 0))), policy)
        for index, each in enumerate(config.kinds)
    )
    return Core(
        KeyMaker(size, config.unit_bits, config.bigram),
        ledgers,
        policy,
        rules,
        fingerprint(config, config.revision),
        Journal(config.events_max) if config.events else None,
        partials,
    )


def make_pools(config: CacheConfig) -> tuple[PoolGroup | None, PoolGroup | None]:
    """Device and host pools; None where there are no bytes, or no such tier."""
    if config.layout is None:
        return None, None
    try:
        torch.device(config.device.torch_device)
    except RuntimeError as error:
        raise ConfigError(f"device.torch_device: {config.device.torch_device!r}: {error}") from None
    device = PoolGroup.build(
        config.layouts,
        config.sidecars,
        order=config.device.order,
        pages=config.kind_pages(Tier.DEVICE),
        device=config.device.torch_device,
    )
    if config.host is None:
        return device, None
    host = PoolGroup.build(
        config.layouts,
        config.sidecars,
        order=config.host.order,
        pages=config.kind_pages(Tier.HOST),
        pinned=True,
    )
    return device, host


def make_executor(config: CacheConfig, device: PoolGroup | None, host: PoolGroup | None) -> Executor:
    """What moves the bytes of these pools; without pools, an executor that moves none."""
    if device is None:
        return MetadataExecutor()

    def engine(notify: Callable[[], None]) -> TransferEngine:
        if torch.device(config.device.torch_device).type == "cuda":
            return CudaEngine(config.device.torch_device, notify, capacity=config.max_operations)
        return CpuEngine(notify, threads=config.transfer_threads, capacity=config.max_operations)

    return PoolExecutor(device, host, engine, config.storage_threads, config.max_operations, config.shard)


def open_storage(config: CacheConfig) -> Storage | None:
    """The disk tier that `config` names, opened. Raises StorageLocked, StorageError."""
    chosen = config.storage
    if chosen is None:
        return None
    return DiskStorage(
        chosen.path,
        capacity_bytes=chosen.size_bytes,
        segment_bytes=chosen.segment_bytes,
        durability=chosen.durability,
    )
