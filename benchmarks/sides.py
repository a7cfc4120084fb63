"""The sides that are compared: SGLang's unified radix cache (two tree cores) and tiertree.

Each side makes its own key from one `array('q')` of tokens, owns slots, and offers the same few calls.
The wrappers add the same one Python call to everybody. SGLang counts lengths in tokens and wants one
slot per token, tiertree counts pages; `insert`, `match` and `evict` here take and return tokens.

SGLang runs on a machine without GPU: its kernels are absent, so a stand-in module that refuses every
call takes the name `sgl_kernel`, and its allocator is replaced by one that only counts, which is the
cheapest it could be. Nothing else of it is touched.

Import `common` first: it pins the threads and finds `src/`.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import logging
import os
import sys
import types
import warnings
from array import array
from collections.abc import Callable
from typing import Any, Protocol


class Side(Protocol):
    """What `tree.py` and `replay.py` ask of a contender."""

    name: str

    def key(self, tokens: array[int]) -> Any:
        """The side's own key for `tokens`."""

    def slots(self, tokens: int) -> Any:
        """Slots for `tokens` tokens, from the side's own allocator."""

    def insert(self, key: Any, slots: Any) -> Any:
        """Store `key`."""

    def match(self, key: Any) -> Any:
        """Find the longest stored prefix of `key`."""

    def evict(self, tokens: int) -> Any:
        """Free `tokens` tokens, least recently used first."""

    def matched(self, result: Any) -> int:
        """Tokens that a `match` found."""

    def evicted(self, result: Any) -> int:
        """Tokens that an `evict` freed."""

    def serve(self, key: Any) -> int:
        """One request of a replay from match to unlock; returns the tokens that hit."""


class _RefusingKernels(types.ModuleType):
    """Stands in for `sgl_kernel`: anything may be imported from it, nothing may be called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_args: Any, **_kwargs: Any) -> None:
            raise NotImplementedError(f"sgl_kernel.{name} needs a GPU build")

        return refuse


def import_sglang() -> str | None:
    """Make SGLang importable here. Returns why it is not, or None when it is."""
    if importlib.util.find_spec("sglang") is None:
        return "sglang is not installed in this environment"
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    if importlib.util.find_spec("sgl_kernel") is None:
        sys.modules["sgl_kernel"] = _RefusingKernels("sgl_kernel")
    # A CUDA build of torchvision beside a CPU build of torch fails while it registers fake kernels.
    registrations = "torchvision._meta_registrations"
    sys.modules.setdefault(registrations, types.ModuleType(registrations))
    try:
        import sglang.srt.mem_cache.unified_radix_cache  # noqa: F401
    except ImportError as error:
        return f"sglang does not import: {error}"
    return None


class CountingAllocator:
    """The cheapest token allocator there can be: it hands out views of one tensor and counts."""

    device = "cpu"

    def __init__(self, tokens: int, page_size: int, longest: int) -> None:
        import torch

        self.page_size = page_size
        self.size = self.size_full = tokens
        self._free = tokens
        self._indices = torch.arange(longest, dtype=torch.int64)

    def available_size(self) -> int:
        """Tokens that are free."""
        return self._free

    def alloc(self, tokens: int) -> Any:
        """A view of `tokens` indices; what they say does not matter to a tree."""
        self._free -= tokens
        return self._indices[:tokens]

    def row(self, hit: int, length: int) -> Any:
        """Indices of a whole request of `length` tokens, of which all but the first `hit` are taken now."""
        self._free -= length - hit
        return self._indices[:length]

    def free(self, indices: Any) -> None:
        """Count `indices` as free again."""
        self._free += len(indices)

    def free_segment(self, indices: Any, start_pos: int = 0) -> None:
        """As `free`."""
        self._free += len(indices)

    def free_page_ids(self, pages: Any) -> None:
        """As `free`, by page."""
        self._free += len(pages) * self.page_size

    def free_group_begin(self) -> None:
        """Nothing to group."""

    def free_group_end(self) -> None:
        """Nothing to group."""


class SGLang:
    """SGLang's UnifiedRadixCache with FULL attention only, over one of its tree cores."""

    def __init__(self, core: str, page_size: int, tokens: int, longest: int) -> None:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.radix_cache import RadixKey
        from sglang.srt.mem_cache.unified_cache.components import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
        from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

        set_global_server_args_for_scheduler(ServerArgs(model_path="none", page_size=page_size))
        self.name = f"sglang-{core}"
        self.page_size = page_size
        self.allocator = CountingAllocator(tokens, page_size, longest)
        self.cache = UnifiedRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=None,
                token_to_kv_pool_allocator=self.allocator,
                page_size=page_size,
                tree_core_backend=core,
                tree_components=(ComponentType.FULL,),
            )
        )
        kind = type(self.cache.tree_core).__name__
        if ("Rust" in kind) != (core == "rust"):
            raise RuntimeError(f"asked SGLang for its {core} core, got {kind}")
        self._insert, self._match, self._evict = InsertParams, MatchPrefixParams, EvictParams
        self.key: Callable[[array[int]], Any] = RadixKey

    def slots(self, tokens: int) -> Any:
        return self.allocator.alloc(tokens)

    def insert(self, key: Any, slots: Any) -> Any:
        return self.cache.insert(self._insert(key=key, value=slots))

    def match(self, key: Any) -> Any:
        return self.cache.match_prefix(self._match(key=key))

    def evict(self, tokens: int) -> Any:
        return self.cache.evict(self._evict(num_tokens=tokens))

    def matched(self, result: Any) -> int:
        return int(result.device_prefix_len)

    def evicted(self, result: Any) -> int:
        return int(result.num_tokens_evicted)

    def serve(self, key: Any) -> int:
        cache, allocator, length = self.cache, self.allocator, len(key)
        found = cache.match_prefix(self._match(key=key))
        hit: int = found.device_prefix_len
        lock = cache.inc_lock_ref(found.last_device_node)
        missing = length - hit
        short = missing - allocator.available_size()
        if short > 0:
            cache.evict(self._evict(num_tokens=short))
            if allocator.available_size() < missing:
                raise RuntimeError("the request does not fit; give the replay more pages")
        row = allocator.row(hit, length)
        cache.insert(self._insert(key=key, value=row, prev_prefix_len=hit))
        cache.dec_lock_ref(found.last_device_node, lock.to_dec_params())
        return hit


class Tiertree:
    """tiertree's PrefixCache without bytes, on its device tier alone, made of `package` (None: the one that
    is found). `options` are further fields of CacheConfig."""

    def __init__(
        self, page_size: int, tokens: int, name: str = "tiertree", package: Any = None, **options: Any
    ) -> None:
        made_of = package or importlib.import_module("tiertree")
        self.name = name
        self.page_size = page_size
        device = made_of.DeviceConfig(size=-(-tokens // page_size))
        self.cache = made_of.PrefixCache(made_of.CacheConfig(page_size=page_size, device=device, **options))
        self.cache.open()
        self.key: Callable[[array[int]], Any] = self.cache.key

    def close(self) -> None:
        """Give back what the cache holds."""
        self.cache.close()

    def slots(self, tokens: int) -> Any:
        return self.cache.allocate(tokens // self.page_size)

    def insert(self, key: Any, slots: Any) -> Any:
        return self.cache.insert(key, slots)

    def match(self, key: Any) -> Any:
        return self.cache.match(key)

    def evict(self, tokens: int) -> Any:
        return self.cache.evict(tokens // self.page_size)

    def matched(self, result: Any) -> int:
        return int(result.device_boundary) * self.page_size

    def evicted(self, result: Any) -> int:
        return int(result.freed) * self.page_size

    def serve(self, key: Any) -> int:
        cache = self.cache
        lease = cache.acquire(cache.match(key))
        hit: int = lease.device_boundary
        slots = cache.allocate(key.pages - hit, lease=lease)
        cache.insert(key, slots, lease=lease)
        lease.release()
        return hit * self.page_size


def available_sides(page_size: int, tokens: int, longest: int, only: str | None = None) -> list[Any]:
    """Fresh, empty sides with room for `tokens` tokens; says on stdout which cannot take part and why.

    `longest` is the most tokens that one sequence will have. `only` names sides, comma-separated.
    """
    wanted = only.split(",") if only else ["sglang-rust", "sglang-python", "tiertree"]
    sides: list[Any] = []
    if any(name.startswith("sglang") for name in wanted):
        problem = import_sglang()
        if problem is not None:
            print(f"without SGLang: {problem}", flush=True)
        else:
            cores = [core for core in ("rust", "python") if f"sglang-{core}" in wanted]
            sides += [SGLang(core, page_size, tokens, longest) for core in cores]
    if "tiertree" in wanted:
        if importlib.util.find_spec("tiertree.cache") is None:
            print("without tiertree: tiertree.cache does not exist", flush=True)
        else:
            sides.append(Tiertree(page_size, tokens))
    if not sides:
        raise SystemExit("nobody to measure")
    return sides
