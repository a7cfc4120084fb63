"""The three runs of `tiertree demo`: one workload, one model, and less and less to compute.

recomputed        every prompt from its first token: no request shares with any other
tiertree          a device too small, a host that holds everything, a disk
after a restart   another process with the same disk directory: memory is empty, the disk is not
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from ..config import CacheConfig, PrefetchConfig, StorageConfig
from ..engines.hf import HFEngine, cache_config, tiny
from ..engines.request import Limits
from ..types import TiertreeError, WritePolicy
from .clients import Watch, apart, converse, together
from .course import Course, Served
from .workload import Workload

RECOMPUTED, TIERTREE, RESTARTED = "recomputed", "tiertree", "after a restart"
RUNS = (RECOMPUTED, TIERTREE, RESTARTED)

SHARE = 4
"""The device holds one page of so many that the conversations take at their end."""
DISK_BYTES = 1 << 34
CLOSE_SECONDS = 60.0


class RestartFailed(TiertreeError):
    """The process that was to start from disk ended without having served everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all runs have in common. Raises ConfigError."""

    workload: Workload = field(default_factory=Workload)
    parallel: int | None = None
    """Requests in flight at most; None: one of every user."""
    page_size: int = 16
    write_policy: WritePolicy = WritePolicy.WRITE_THROUGH

    def plain(self) -> dict[str, Any]:
        """The same as JSON-ready data."""
        return asdict(self)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """What `plain` gave, after a way through JSON."""
        workload, policy = Workload(**values["workload"]), WritePolicy(values["write_policy"])
        return cls(**{**values, "workload": workload, "write_policy": policy})

    @property
    def limits(self) -> Limits:
        """Everybody may be in flight."""
        return Limits(max_running=self.workload.users, max_waiting=self.workload.users)

    @property
    def all_pages(self) -> int:
        """What the conversations take at their end."""
        return self.workload.pages(self.page_size)

    @property
    def device_pages(self) -> int:
        """A fourth of it, or what one conversation needs if that is more."""
        longest = -(-self.workload.longest // self.page_size) + 1
        return max(-(-self.all_pages // SHARE), longest)

    def model(self) -> Any:
        """A Llama with random weights, the same in every process; big enough that a prompt costs something:
        37 million parameters, 4 KiB of KV per token."""
        return tiny(
            "llama",
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            vocab_size=self.workload.vocab,
            max_position_embeddings=max(8192, self.workload.longest + self.page_size),
        )

    def device_alone(self, model: Any) -> CacheConfig:
        """Room for every request in flight, and nothing behind it."""
        each = -(-self.workload.longest // self.page_size) + 1
        return cache_config(model, device=self.workload.users * each, page_size=self.page_size)

    def tiers(self, model: Any, host: bool = True, directory: str | None = None) -> CacheConfig:
        """A device too small, a host that holds everything or none, a disk in `directory` or none."""
        return cache_config(
            model,
            device=self.device_pages,
            host=self.all_pages + self.device_pages if host else None,
            storage=None if directory is None else StorageConfig(path=directory, size=DISK_BYTES),
            page_size=self.page_size,
            write_policy=self.write_policy,
            prefetch=PrefetchConfig(min_tokens=self.page_size),
        )


def recomputed(setting: Setting, model: Any, watch: Watch | None = None) -> Course:
    """The run that the others are measured by."""
    with HFEngine(model, setting.device_alone(model), setting.limits) as engine:
        return converse(setting.workload, engine, parallel=setting.parallel, namespace=apart, watch=watch)


def tiered(setting: Setting, model: Any, directory: str, watch: Watch | None = None) -> Course:
    """The run through three tiers; what the disk has in `directory` by then is used. All of it is on disk
    when this returns."""
    engine = HFEngine(model, setting.tiers(model, directory=directory), setting.limits)
    try:
        return converse(setting.workload, engine, parallel=setting.parallel, namespace=together, watch=watch)
    finally:
        engine.close(deadline_s=CLOSE_SECONDS)


def restarted(setting: Setting, directory: str, watch: Watch | None = None) -> Course:
    """`tiered` in a process of its own (`child.py`), which must not outlive this call. Raises
    RestartFailed."""
    paths = os.pathsep.join(each for each in sys.path if each)
    child = subprocess.Popen(
        [sys.executable, "-m", "tiertree.chat.child", json.dumps(setting.plain()), directory],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        start_new_session=True,  # Ctrl-C is for us, and we tell the child
    )
    course = Course()
    try:
        assert child.stdout is not None
        for line in child.stdout:
            said = json.loads(line)
            course.served += [Served.read(each) for each in said["served"]]
            course.seconds = said["seconds"]
            if watch is not None:
                watch(course, said["running"])
        status = child.wait()
    finally:
        child.kill()
        child.wait()
    if status or len(course.served) < setting.workload.requests:
        raise RestartFailed(
            f"{len(course.served)} of {setting.workload.requests} answered, exit status {status}"
        )
    return course
