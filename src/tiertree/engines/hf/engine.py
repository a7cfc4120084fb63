"""`HFEngine`: an engine for one model of transformers, with a cache of its own."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

from transformers import PreTrainedModel

from ...cache import PrefixCache
from ...config import CacheConfig
from ...tree.key import NAMESPACE_BYTES_MAX, check_namespace
from ...types import ConfigError
from ..engine import Engine
from ..request import Limits, Request
from .adapters import Adapters, unwrapped
from .fingerprint import adapter_digest, fingerprint
from .probe import check_inference
from .runner import HFRunner
from .sizing import Identity, by_default, check_fit, filled

_ADAPTED = "lora:"
_PLAIN = "plain"


class HFEngine(Engine):
    """Serves `model`, any causal language model of transformers that can be kept in pages, or one that peft
    has wrapped, over a cache that it opens and closes. `config` may leave out layout, kinds, model and
    revision, which are read from the model, if its sizes are in pages; sizes in bytes need `cache_config`.
    None: what that gives by default; `limits` None: the usual ones, in chunks of whole pages. Requests are
    kept within the positions of the model. A request ends at its `stop` tokens only: the engine does not know
    the model's own end (`model.generation_config.eos_token_id`); give it as `stop=[…]`. Serving switches
    adapters of peft in place and leaves them switched, without gradients: a caller who trains between steps
    sets his own again (peft's `set_adapter`). Raises ConfigError for a config that does not fit,
    UnsupportedModel for a model that cannot be kept. O(bytes of the weights)."""

    def __init__(
        self,
        model: Any,
        config: CacheConfig | None = None,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model: PreTrainedModel = unwrapped(model)
        known = Identity.of(self.model)
        self.plan = known.plan
        self._fingerprint = known.model
        if config is None:
            config = by_default(known)
        elif config.layout is None:
            config = filled(known, config)
        check_fit(known, config)
        self._adapters = Adapters(self.model)
        self._digests: dict[str, str] = {}
        if limits is None:
            limits = Limits(chunk_tokens=-(-Limits().chunk_tokens // config.page_size) * config.page_size)
        if (most := self.plan.max_tokens) is not None:
            limits = replace(limits, max_tokens=min(limits.max_tokens, most))
        cache = PrefixCache(config, clock=clock).open()
        try:
            assert cache.device_pools is not None
            runner = HFRunner(self.model, self.plan, cache.device_pools, self._adapters)
            super().__init__(cache, runner, limits, clock)
        except BaseException:
            cache.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self, deadline_s: float = 10.0) -> tuple[int, ...]:
        """End everybody, and close the cache: wait up to `deadline_s` seconds for what is being written.
        Returns the operations that were abandoned. Idempotent."""
        try:
            self.abort_all()
        finally:
            abandoned = self.cache.close(deadline_s)
        return abandoned

    def scope(self, request: Request) -> str:
        """See `Engine`: requests with different adapters share nothing, whatever their namespaces."""
        name, namespace = request.adapter, request.namespace
        check_namespace(namespace)
        self._adapters.check(name)
        if name:
            if name not in self._digests:
                self._digests[name] = adapter_digest(self._adapters, name)
            return _fitting(f"{_ADAPTED}{self._digests[name]}", namespace)
        # What a tenant calls itself never looks like the namespace of an adapter.
        return _fitting(_PLAIN, namespace) if namespace.startswith((_ADAPTED, _PLAIN)) else namespace

    def weights_changed(self) -> None:
        """The model's weights, or its adapters', are others than before: never again hit what the old ones
        computed. What makes a model compute something else beside its weights (its config, its attention
        kernel) needs a new engine: raises ConfigError if it is another, UnsupportedModel in training mode,
        RuntimeError while requests are being served. O(bytes of the weights)."""
        if self.busy:
            raise RuntimeError("weights_changed: requests are being served; finish or abort them first")
        model, revision = fingerprint(self.model)
        if model != self._fingerprint:
            raise ConfigError("model: its config, dtype or attention kernel is another; make a new engine")
        check_inference(self.model.named_modules())
        self._adapters.refresh()
        self._digests.clear()
        self.cache.invalidate(revision)


def _fitting(scope: str, namespace: str) -> str:
    """`namespace` within `scope`; a digest stands for one that would get too long."""
    whole = f"{scope}:{namespace}"
    data = whole.encode("utf-8", "surrogatepass")
    return whole if len(data) <= NAMESPACE_BYTES_MAX else f"{scope}#{hashlib.sha256(data).hexdigest()}"
