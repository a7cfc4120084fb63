"""CacheConfig: what it accepts, what it makes of it, and that what it refuses is named."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiertree.components import Mamba, SlidingWindow
from tiertree.config import (
    Attention,
    CacheConfig,
    DeviceConfig,
    Durability,
    HostConfig,
    KindConfig,
    KVLayout,
    LoadBackConfig,
    MemoryOrder,
    PrefetchConfig,
    SidecarConfig,
    StateLayout,
    StorageConfig,
    pages_of,
    parse_bytes,
)
from tiertree.types import FULL, MAMBA, SWA, ConfigError, StopRule, Tier, WritePolicy

LAYOUT = {"layers": 2, "kv_heads": 3, "head_size": 4}  # 2 × 2 planes × 16 entries × 3 × 4 × 2 B = 1,536 B

TOML = """
page_size = 32
unit_bits = 64
bigram = true
write_policy = "write_through_selective"
selective_hits = 2
model = "tiny"
op_deadline_seconds = 5

[device]
size = 100
torch_device = "cpu"

[host]
size = "1MiB"
order = "page_first"

[storage]
path = "pages"
size = "1.5GiB"
segment_size = "64 MiB"
durability = "none"

[layout]
layers = 2
kv_heads = 3
head_size = 4

[[sidecars]]
name = "draft"
layout = { layers = 1, kv_heads = 1, head_size = 4, dtype = "float32", attention = "mla" }

[[sidecars]]
name = "conv"
kind = "mamba"
layout = { layers = 3, elements = 8, dtype = "float16" }

[[kinds]]
device = "12KiB"
host = 40

[kinds.rules]
kind = "swa"
window = 100
checkpoint_tokens = 320

[kinds.layout]
layers = 4
kv_heads = 3
head_size = 4

[[kinds]]
device = 8
host = "1KiB"
rules = { kind = "mamba", states_per_path = 4 }
layout = { layers = 3, elements = 9 }

[prefetch]
stop_rule = "best_effort"

[load_back]
max_pages = 7
"""


def layout(**changes: Any) -> KVLayout:
    return KVLayout(**{**LAYOUT, **changes})


def test_every_value_of_a_toml_file_arrives(tmp_path: Path) -> None:
    path = tmp_path / "cache.toml"
    path.write_text(TOML)
    config = CacheConfig.from_toml(path)
    draft = KVLayout(
        layers=1, kv_heads=1, head_size=4, dtype="float32", attention=Attention.MLA, page_size=32
    )
    assert config == CacheConfig(
        page_size=32,
        unit_bits=64,
        bigram=True,
        write_policy=WritePolicy.WRITE_THROUGH_SELECTIVE,
        selective_hits=2,
        model="tiny",
        op_deadline_seconds=5,
        device=DeviceConfig(size=100),
        host=HostConfig(size="1MiB", order=MemoryOrder.PAGE_FIRST),
        storage=StorageConfig(path="pages", size="1.5GiB", segment_size="64 MiB", durability=Durability.NONE),
        layout=layout(page_size=32),
        sidecars=(
            SidecarConfig(name="draft", layout=draft),
            SidecarConfig(name="conv", kind=MAMBA, layout=StateLayout(layers=3, elements=8, dtype="float16")),
        ),
        kinds=(
            KindConfig(
                rules=SlidingWindow(window=100, checkpoint_tokens=320),
                device="12KiB",
                host=40,
                layout=layout(layers=4, page_size=32),
            ),
            KindConfig(
                rules=Mamba(states_per_path=4),
                device=8,
                host="1KiB",
                layout=StateLayout(layers=3, elements=9),
            ),
        ),
        prefetch=PrefetchConfig(stop_rule=StopRule.BEST_EFFORT),
        load_back=LoadBackConfig(max_pages=7),
    )
    assert config.storage is not None
    assert config.storage.size_bytes == 3 << 29
    assert config.storage.segment_bytes == 64 << 20
    assert config.slot_bytes == {FULL: 3072 + 512, SWA: 6144, MAMBA: 108 + 48}
    assert list(config.layouts) == [FULL, SWA, MAMBA]
    assert config.device_pages == 100
    assert config.host_pages == (1 << 20) // 3584
    assert config.kind_pages(Tier.DEVICE) == {FULL: 100, SWA: 2, MAMBA: 8}
    assert config.kind_pages(Tier.HOST) == {FULL: config.host_pages, SWA: 40, MAMBA: 1024 // 156}


def test_defaults_are_the_documented_ones() -> None:
    config = CacheConfig(device=DeviceConfig(size=8))
    assert (config.page_size, config.unit_bits, config.bigram) == (16, 32, False)
    assert (config.write_policy, config.selective_hits) == (WritePolicy.WRITE_THROUGH, 1)
    assert (config.host, config.storage, config.layout, config.host_pages) == (None, None, None, 0)
    assert (config.device.order, config.slot_bytes, config.layouts) == (MemoryOrder.LAYER_FIRST, {}, {})
    assert (config.kinds, config.kind_pages(Tier.HOST)) == ((), {FULL: 0})
    assert config.prefetch == PrefetchConfig(
        stop_rule=StopRule.TIMEOUT, min_tokens=256, base_seconds=1.0, per_1024_tokens_seconds=0.25
    )
    assert config.load_back == LoadBackConfig(min_tokens=10, max_pages=None)


def test_it_is_frozen() -> None:
    config = CacheConfig(device=DeviceConfig(size=8))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.page_size = 1  # type: ignore[misc]


def test_enums_may_be_given_as_text() -> None:
    config = CacheConfig.from_mapping({"device": {"size": 1}, "write_policy": "write_back"})
    assert config.write_policy is WritePolicy.WRITE_BACK


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1B", 1), ("2KiB", 2048), ("40GiB", 40 << 30), ("1.5 TiB", 3 << 39), ("0.3KiB", 307), (7, 7)],
)
def test_parse_bytes(text: int | str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "40", "40GB", "gib", "-1KiB", "1e3B", "0B", "0.5B", "9999999TiB", 0, -1, True, 1.5, None]
)
def test_parse_bytes_refuses(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"^host\.size: .*allowed: "):
        parse_bytes(text, "host.size")


@given(count=st.integers(1, 1 << 20), unit=st.sampled_from(["B", "KiB", "MiB", "GiB", "TiB"]))
def test_whole_numbers_of_bytes_are_exact(count: int, unit: str) -> None:
    assert parse_bytes(f"{count}{unit}") == count * 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit)


def test_page_bytes_and_descriptor() -> None:
    assert layout().page_bytes == 1536
    assert layout(attention="mla").page_bytes == 768
    assert layout(tokens_per_entry=4, dtype="float8_e4m3fn").page_bytes == 1536 // 4 // 2
    changes: list[dict[str, Any]] = [{}, {"page_size": 32}, {"tokens_per_entry": 2}, {"layers": 3}]
    changes += [{"kv_heads": 1}, {"head_size": 5}, {"dtype": "float16"}, {"attention": "mla"}]
    assert len({layout(**change).descriptor() for change in changes}) == len(changes)
    assert layout().descriptor() == layout().descriptor(MemoryOrder.LAYER_FIRST)
    assert layout().descriptor() != layout().descriptor(MemoryOrder.PAGE_FIRST)


def test_a_state_is_a_page_of_one_entry() -> None:
    state = StateLayout(layers=3, elements=10)
    assert (state.planes, state.entries, state.kv_heads, state.head_size) == (1, 1, 1, 10)
    assert (state.itemsize, state.page_bytes) == (4, 120)
    others = [StateLayout(layers=2, elements=15), StateLayout(layers=3, elements=10, dtype="int8")]
    same_bytes = KVLayout(layers=3, kv_heads=1, head_size=10, dtype="float32", attention="mla", page_size=1)
    assert len({each.descriptor() for each in (state, *others, same_bytes)}) == 4
    assert {state.descriptor(order) for order in MemoryOrder} == {state.descriptor()}


def test_kinds_without_bytes_have_pages_alone() -> None:
    kinds = (KindConfig(rules=SlidingWindow(window=8, name="wide"), device=3),)
    config = CacheConfig(device=DeviceConfig(size=9), kinds=kinds)
    assert config.kind_pages(Tier.DEVICE) == {FULL: 9, "wide": 3}
    assert config.kind_pages(Tier.HOST) == {FULL: 0, "wide": 0}
    assert (config.layouts, config.slot_bytes) == ({}, {})
    assert hash(config) == hash(dataclasses.replace(config))


def test_pages_of_counts_sidecars_and_rounds_down() -> None:
    sidecar = SidecarConfig(name="draft", layout=layout(layers=1))
    assert pages_of(5, None) == 5
    assert pages_of("1536B", layout()) == 1
    assert pages_of("4607B", layout(), [sidecar]) == 1
    assert pages_of("4608B", layout(), [sidecar]) == 2


def refuse(values: dict[str, Any], *parts: str) -> None:
    """`values` (device added) must be refused with a message that has every one of `parts`."""
    with pytest.raises(ConfigError) as caught:
        CacheConfig.from_mapping({"device": {"size": 4}, **values})
    for part in parts:
        assert part in str(caught.value)


STORAGE = {"path": "p", "size": "1MiB"}
HOST = {"size": 8}
STATE = {"layers": 2, "elements": 21}  # 168 B
SWA_RULES = {"kind": "swa", "window": 20}
WINDOW = {"device": 4, "rules": SWA_RULES}


def named(name: str) -> dict[str, Any]:
    """A kind of that name."""
    return {**WINDOW, "rules": {**SWA_RULES, "name": name}}


def sidecar(**changes: Any) -> dict[str, Any]:
    """A sidecar of FULL, with some fields replaced."""
    return {"name": "a", "layout": LAYOUT, **changes}


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"page_sise": 16}, ["page_sise: ", "did you mean 'page_size'?", "allowed: device, host, storage"]),
        ({"device": {"size": 4, "torchdevice": "cpu"}}, ["device.torchdevice: ", "'torch_device'"]),
        ({"layout": {**LAYOUT, "heads": 1}}, ["layout.heads: ", "'kv_heads'", "tokens_per_entry"]),
        ({"host": {}}, ["host.size: is missing"]),
        ({"layout": {"layers": 1}}, ["layout.kv_heads: is missing", "kv_heads, head_size"]),
        ({"sidecars": [{"name": "a"}]}, ["sidecars[0].layout: is missing"]),
        ({"host": 8}, ["host: 8", "a table"]),
        ({"prefetch": None}, ["prefetch: None", "PrefetchConfig"]),
        ({"device": None}, ["device: None"]),
        ({"sidecars": {"name": "a"}}, ["sidecars", "[[sidecars]]"]),
        ({"sidecars": ["draft"]}, ["sidecars[0]: 'draft'", "a table"]),
    ],
)
def test_unknown_missing_and_misplaced_keys_are_refused(values: dict[str, Any], parts: list[str]) -> None:
    refuse(values, *parts)


@pytest.mark.parametrize("bad", [0, -1, True, 1.0, "16", None, 1 << 63])
@pytest.mark.parametrize(
    "name",
    ["page_size", "selective_hits", "max_operations", "events_max", "transfer_threads", "storage_threads"],
)
def test_integers_are_integers_of_at_least_one(name: str, bad: Any) -> None:
    refuse({name: bad}, f"{name}: {bad!r}", "allowed: an integer of at least 1")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.1, 0, True, "1s", None])
def test_a_deadline_is_finite_and_above_zero(bad: Any) -> None:
    refuse({"op_deadline_seconds": bad}, f"op_deadline_seconds: {bad!r}", "finite seconds above 0")


@pytest.mark.parametrize("name", ["base_seconds", "per_1024_tokens_seconds"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1, False, "1"])
def test_durations_are_finite_and_not_negative(name: str, bad: Any) -> None:
    refuse({"prefetch": {name: bad}}, f"prefetch.{name}: {bad!r}", "finite seconds of at least 0")


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"unit_bits": 16}, ["unit_bits: 16", "32, 64"]),
        ({"unit_bits": 64.0}, ["unit_bits: 64.0", "32, 64"]),
        ({"bigram": 1}, ["bigram: 1", "False, True"]),
        ({"model": 3}, ["model: 3", "text"]),
        ({"eviction": ""}, ["eviction: ''", "not empty"]),
        ({"write_policy": "write_thru"}, ["write_policy: 'write_thru'", "write_back", "did you mean"]),
        ({"write_policy": True}, ["write_policy: True", "write_through_selective"]),
        ({"device": {"size": -1}}, ["device.size: -1", "40GiB"]),
        ({"device": {"size": True}}, ["device.size: True"]),
        ({"device": {"size": "4 GB"}}, ["device.size: '4 GB'", "GiB"]),
        ({"device": {"size": 1, "torch_device": ""}}, ["device.torch_device: ''"]),
        ({"host": {"size": 8, "order": "page"}}, ["host.order: 'page'", "page_first_direct"]),
        ({"layout": {**LAYOUT, "dtype": "float64"}}, ["layout.dtype: 'float64'", "bfloat16"]),
        ({"layout": {**LAYOUT, "attention": "gqa"}}, ["layout.attention: 'gqa'", "mha, mla"]),
        ({"layout": {**LAYOUT, "layers": 0}}, ["layout.layers: 0"]),
        ({"layout": {**LAYOUT, "tokens_per_entry": 3}}, ["layout.tokens_per_entry: 3", "a divisor of"]),
        ({"load_back": {"min_tokens": -1}}, ["load_back.min_tokens: -1", "at least 0"]),
        ({"load_back": {"max_pages": 0}}, ["load_back.max_pages: 0"]),
        ({"prefetch": {"stop_rule": "never"}}, ["prefetch.stop_rule: 'never'", "wait_complete"]),
        ({"transfer_threads": 1000}, ["transfer_threads: 1000", "at most 256"]),
    ],
)
def test_wrong_values_are_refused_by_name(values: dict[str, Any], parts: list[str]) -> None:
    refuse(values, *parts)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"bigram": True}, ["bigram: ", "unit_bits 64"]),
        ({"device": {"size": "1GiB"}}, ["device.size: ", "no layout"]),
        ({"host": {"size": "1GiB"}}, ["host.size: ", "no layout"]),
        ({"device": {"size": "1535B"}, "layout": LAYOUT}, ["device.size: ", "at least 1536 bytes"]),
        ({"storage": STORAGE, "layout": LAYOUT}, ["storage: ", "only with a host"]),
        ({"storage": STORAGE, "host": HOST}, ["storage: ", "only with a layout"]),
        (
            {"storage": {"path": "p", "size": "1KiB"}, "host": HOST, "layout": LAYOUT},
            ["storage.size: ", "at least 1536 bytes"],
        ),
        (
            {"storage": {**STORAGE, "segment_size": "2MiB"}, "host": HOST, "layout": LAYOUT},
            ["storage.segment_size: '2MiB'", "allowed: at most size '1MiB'"],
        ),
        ({"storage": {"path": "", "size": 1}}, ["storage.path: ''"]),
        ({"storage": {**STORAGE, "durability": "fsync"}}, ["storage.durability: 'fsync'", "none, batch"]),
        ({"layout": {**LAYOUT, "page_size": 8}}, ["layout.page_size: 8", "16"]),
        (
            {"layout": LAYOUT, "sidecars": [{"name": "a", "layout": {**LAYOUT, "page_size": 8}}]},
            ["sidecars[0].layout.page_size: 8"],
        ),
        (
            {"layout": LAYOUT, "sidecars": [{"name": "a", "layout": LAYOUT}] * 2},
            ["sidecars[1].name: 'a'", "twice"],
        ),
        ({"sidecars": [{"name": "a", "layout": LAYOUT}]}, ["sidecars: ", "only with a layout"]),
        ({"layout": LAYOUT, "sidecars": [{"name": "A b", "layout": LAYOUT}]}, ["sidecars[0].name: 'A b'"]),
        ({"layout": LAYOUT, "sidecars": [{"name": "full", "layout": LAYOUT}]}, ["sidecars[0].name: 'full'"]),
        (
            {"layout": LAYOUT, "sidecars": [{"name": "a", "kind": "none", "layout": LAYOUT}]},
            ["sidecars[0].kind: 'none'", "allowed: full"],
        ),
        (
            {"layout": LAYOUT, "sidecars": [{"name": "a", "kind": "A b", "layout": LAYOUT}]},
            ["sidecars[0].kind: 'A b'", "lower-case"],
        ),
        ({"layout": STATE}, ["layout: StateLayout", "allowed: a KVLayout"]),
        ({"layout": {**STATE, "page_size": 16}}, ["layout.page_size: is not a known key", "elements"]),
    ],
)
def test_parts_that_cannot_work_together_are_refused(values: dict[str, Any], parts: list[str]) -> None:
    refuse(values, *parts)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"kinds": SWA_RULES}, ["kinds: ", "[[kinds]]"]),
        ({"kinds": [3]}, ["kinds[0]: 3", "a table"]),
        ({"kinds": [None]}, ["kinds[0]: None", "a KindConfig"]),
        ({"kinds": [{"rules": SWA_RULES}]}, ["kinds[0].device: is missing"]),
        ({"kinds": [{"device": 4}]}, ["kinds[0].rules: is missing"]),
        ({"kinds": [{"device": 4, "rules": "swa"}]}, ["kinds[0].rules: 'swa'", "a Component"]),
        ({"kinds": [{"device": 4, "rules": {}}]}, ["kinds[0].rules.kind: is missing", "mamba, swa"]),
        ({"kinds": [{"device": 4, "rules": {**SWA_RULES, "window": 0}}]}, ["kinds[0].rules.window: 0"]),
        ({"kinds": [{"device": 0, "rules": SWA_RULES}]}, ["kinds[0].device: 0", "40GiB"]),
        ({"kinds": [{"device": "4 GB", "rules": SWA_RULES}]}, ["kinds[0].device: '4 GB'"]),
        ({"kinds": [{"device": "4GiB", "rules": SWA_RULES}]}, ["kinds[0].device: '4GiB'", "no layout"]),
        (
            {"kinds": [{"device": "4B", "rules": SWA_RULES, "layout": LAYOUT}], "layout": LAYOUT},
            ["kinds[0].device: '4B'", "at least 1536 bytes"],
        ),
        ({"kinds": [{"device": 4, "host": 0, "rules": SWA_RULES}]}, ["kinds[0].host: 0"]),
        ({"kinds": [{"device": 4, "host": 4, "rules": SWA_RULES}]}, ["kinds[0].host: ", "no host tier"]),
        ({"kinds": [WINDOW], "host": HOST}, ["kinds[0].host: is missing", "has a host tier"]),
        ({"kinds": [{**WINDOW, "layout": LAYOUT}]}, ["kinds[0].layout: ", "no layout"]),
        ({"kinds": [WINDOW], "layout": LAYOUT}, ["kinds[0].layout: is missing", "has a layout"]),
        (
            {"kinds": [{**WINDOW, "layout": {**LAYOUT, "page_size": 8}}], "layout": LAYOUT},
            ["kinds[0].layout.page_size: 8", "16"],
        ),
        (
            {"kinds": [{**WINDOW, "layout": {**STATE, "dtype": "int3"}}], "layout": LAYOUT},
            ["kinds[0].layout.dtype: 'int3'"],
        ),
        ({"kinds": [WINDOW, WINDOW]}, ["kinds[1].rules.kind: 'swa' is taken", "each kind once"]),
        ({"kinds": [named("full")]}, ["kinds[0].rules.kind: 'full' is taken"]),
        ({"kinds": [named("A b")]}, ["kinds[0].rules.name: 'A b'", "lower-case"]),
        (
            {"kinds": [{**WINDOW, "rules": {**SWA_RULES, "checkpoint_tokens": 24}}]},
            ["kinds[0].rules.checkpoint_tokens: 24", "a multiple of page_size 16"],
        ),
        (
            {"kinds": [{**WINDOW, "layout": STATE}], "layout": LAYOUT, "sidecars": [sidecar(name="swa")]},
            ["sidecars[0].name: 'swa' is the name of a kind"],
        ),
        (
            {"kinds": [{**WINDOW, "layout": STATE}], "layout": LAYOUT, "sidecars": [sidecar(kind="mamba")]},
            ["sidecars[0].kind: 'mamba'", "allowed: full, swa"],
        ),
        (
            {
                "kinds": [{**WINDOW, "host": 4, "layout": STATE}],
                "layout": LAYOUT,
                "host": HOST,
                "storage": {"path": "p", "size": 1536 + 167},
            },
            ["storage.size: ", "at least 1704 bytes"],
        ),
    ],
)
def test_kinds_that_cannot_work_are_refused(values: dict[str, Any], parts: list[str]) -> None:
    refuse(values, *parts)


def test_rules_are_objects_that_answer() -> None:
    for rules in (SlidingWindow, object(), None):
        with pytest.raises(ConfigError, match=r"^rules: .* is not allowed; allowed: a Component"):
            KindConfig(rules=rules, device=1)  # type: ignore[arg-type]


def test_a_small_host_is_a_warning_that_says_why() -> None:
    sizes: dict[str, Any] = {"device": DeviceConfig(size=8), "host": HostConfig(size=7)}
    for policy in (WritePolicy.WRITE_THROUGH, WritePolicy.WRITE_THROUGH_SELECTIVE):
        with pytest.warns(UserWarning, match=r"^host\.size: 7 pages are fewer than the device's 8"):
            CacheConfig(**sizes, write_policy=policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CacheConfig(**sizes, write_policy=WritePolicy.WRITE_BACK)
        CacheConfig(device=DeviceConfig(size=8), host=HostConfig(size=8))


def test_the_warning_points_at_the_caller() -> None:
    with pytest.warns(UserWarning, match="host") as caught:
        CacheConfig(device=DeviceConfig(size=8), host=HostConfig(size=7))
    assert caught[0].filename == __file__


def test_errors_of_a_file_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cache.toml"
    with pytest.raises(ConfigError, match=r"cache\.toml: cannot be read: No such file"):
        CacheConfig.from_toml(path)
    path.write_bytes(b"page_size = ")
    with pytest.raises(ConfigError, match=r"cache\.toml: is not TOML: Invalid value"):
        CacheConfig.from_toml(path)
    path.write_bytes(b'model = "\xff"')
    with pytest.raises(ConfigError, match=r"cache\.toml: is not TOML"):
        CacheConfig.from_toml(str(path))
    path.write_text("[device]\nsize = 0")
    with pytest.raises(ConfigError, match=r"cache\.toml: device\.size: 0"):
        CacheConfig.from_toml(path)


@pytest.mark.parametrize("values", [None, 3, "page_size", []])
def test_a_configuration_is_a_table(values: Any) -> None:
    with pytest.raises(ConfigError, match=r"^configuration: .*a table"):
        CacheConfig.from_mapping(values)


def test_a_kind_whose_pool_holds_no_window_is_warned_about() -> None:
    rules = SlidingWindow(window=64)
    with pytest.warns(UserWarning, match=r"kinds\[0\]\.device: 3 pages are fewer than the 4 that one hit"):
        CacheConfig(device=DeviceConfig(size=8), kinds=(KindConfig(rules=rules, device=3),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CacheConfig(device=DeviceConfig(size=8), kinds=(KindConfig(rules=rules, device=4),))


def test_storage_without_the_name_of_a_model_is_warned_of(tmp_path: Path) -> None:
    parts = {
        "device": DeviceConfig(size=4),
        "host": HostConfig(size=4),
        "layout": KVLayout(layers=1, kv_heads=1, head_size=4, page_size=16),
        "storage": StorageConfig(path=str(tmp_path), size="1MiB"),
    }
    with pytest.warns(UserWarning, match=r"^model: is not given"):
        CacheConfig(**parts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CacheConfig(**parts, model="a model")
