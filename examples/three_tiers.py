"""One prompt on its way through device, host and disk and back, with bytes that are compared.

python examples/three_tiers.py
"""

import tempfile

import torch

from tiertree import (
    FULL,
    CacheConfig,
    DeviceConfig,
    HostConfig,
    KVLayout,
    LoadBack,
    NoRoom,
    Prefetch,
    PrefixCache,
    StorageConfig,
)

PAGES = 32


def serve(cache: PrefixCache, tokens: range) -> tuple[int, torch.Tensor]:
    """Serve one request as an engine would. Returns the pages hit, and all KV pages of the prompt."""
    key = cache.key(tokens)
    prefetch = cache.prefetch(key)  # disk → host, refused where memory has all of it
    while isinstance(prefetch, Prefetch) and cache.settle(prefetch) is None:
        cache.poll()
    with cache.acquire(cache.match(key)) as lease:
        load = cache.load_back(lease)  # host → device, refused where there is nothing to load
        if isinstance(load, LoadBack):
            cache.drain()
        hit = lease.device_boundary
        slots = cache.allocate(key.pages - hit, lease)
        assert not isinstance(slots, NoRoom)
        assert cache.device_pools is not None
        memory = cache.device_pools[FULL].main.logical  # [page, layer, K or V, token, head, element]
        memory[torch.from_numpy(slots)] = torch.randn(len(slots), *memory.shape[1:])  # the "prefill"
        cache.insert(key, slots, lease)
        pages = memory[torch.tensor(lease.slots)].clone()
    cache.drain()  # an engine goes on and calls poll() between its steps; here every copy is waited for
    return hit, pages


def main() -> None:
    layout = KVLayout(layers=2, kv_heads=2, head_size=16, dtype="float32", page_size=16)
    with tempfile.TemporaryDirectory() as directory:
        config = CacheConfig(
            model="made-up",
            layout=layout,
            device=DeviceConfig(size=PAGES),  # room for one prompt,
            host=HostConfig(size=2 * PAGES),  # for two,
            storage=StorageConfig(path=directory, size="16MiB"),  # and for all of them
        )
        prompts = [range(start, start + 16 * PAGES) for start in (0, 1000, 2000)]
        with PrefixCache(config) as cache:
            computed = [serve(cache, prompt)[1] for prompt in prompts]
            for prompt, expected in zip(prompts, computed, strict=True):
                hit, found = serve(cache, prompt)
                same = torch.equal(found, expected)
                print(f"{hit} of {PAGES} pages hit, bytes {'equal' if same else 'DIFFERENT'}")
        with PrefixCache(config) as cache:  # a new process would find the same
            hit, found = serve(cache, prompts[0])
            print(f"after a restart: {hit} pages hit, bytes equal: {torch.equal(found, computed[0])}")


if __name__ == "__main__":
    main()
