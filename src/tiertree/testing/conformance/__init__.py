"""What every implementation of a seam must do: one call per seam, which raises `AssertionError` naming the
promise that is not kept.

    check_storage(make)           a storage backend       storage/base.py
    check_policy(policy)          an eviction policy      tree/victims.py
    check_engine(make)            a transfer engine       transfer/engine.py
    check_component(rules, size)  a kind of state         components/base.py

def test_my_backend_conforms(tmp_path):
    check_storage(lambda capacity: MyStorage(tmp_path / uuid4().hex, capacity))


def test_my_policy_conforms():
    check_policy(MyPolicy())


def test_my_engine_conforms():
    check_engine(lambda notify, capacity: MyEngine(notify, capacity))


def test_my_kind_conforms():
    check_component(MyRules(), page_size=16)

Whatever is random in a check takes a seed, which is in the message. Nothing is asserted about how long
something takes, but what should have ended and hangs fails as well, after `HANG_S` seconds.
"""

from __future__ import annotations

from .component import check_component
from .engine import check_engine
from .pages import held, page_content, page_key, read, write
from .policy import check_policy
from .storage import check_storage

__all__ = [
    "check_component",
    "check_engine",
    "check_policy",
    "check_storage",
    "held",
    "page_content",
    "page_key",
    "read",
    "write",
]
