"""What is served: a model, its tokenizer, and the cache that fits it, as the options of a command say.

--model  a directory ─▶ AutoModelForCausalLM, AutoTokenizer (from there alone, nothing is downloaded)
         tiny-NAME   ─▶ a model with random weights, and bytes as tokens
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..config import StorageConfig, parse_bytes
from ..engines import hf
from ..engines.request import Limits
from ..types import ConfigError
from .tokens import ByteTokenizer, PretrainedTokenizer, Tokenizer

TINY = "tiny"
NONE = "0"
"""The size of a host tier that is not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `tiertree serve` is told of model and cache; docs/cli.md says what each means."""

    model: str
    served_model_name: str | None = None
    device_memory: str = "256MiB"
    host_memory: str = "1GiB"
    disk: str | None = None
    disk_size: str = "10GiB"
    page_size: int = 16
    write_policy: str = "write_through"
    max_running: int = 16
    max_waiting: int = 256
    chunk_tokens: int = 1024
    dtype: str = "auto"
    torch_device: str = "cpu"
    seed: int = 0

    @property
    def name(self) -> str:
        """What the model is called in the API."""
        return self.served_model_name or os.path.basename(os.path.normpath(self.model))

    @property
    def sizes(self) -> dict[str, str]:
        """Sizes in bytes that count, by option."""
        found = {"--device-memory": self.device_memory}
        if self.host_memory != NONE:
            found["--host-memory"] = self.host_memory
        if self.disk is not None:
            found["--disk-size"] = self.disk_size
        return found


class Loaded(NamedTuple):
    """A model that can be served."""

    model: Any
    tokenizer: Tokenizer


def load(options: Options) -> Loaded:
    """Read the model into memory. Raises ConfigError for what is no model."""
    for option, size in options.sizes.items():
        parse_bytes(size, option)
    try:
        device = torch.device(options.torch_device)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise NotImplementedError("there is no memory behind it")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise _no_device(options, error) from None
    model, tokenizer = _checkpoint(options) if os.path.isdir(options.model) else _tiny(options)
    try:
        return Loaded(model.to(device).eval(), tokenizer)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise _no_device(options, error) from None


def _no_device(options: Options, error: Exception) -> ConfigError:
    return ConfigError(f"--torch-device: {options.torch_device} cannot be used: {_short(error)}")


def _tiny(options: Options) -> Loaded:
    name = options.model.removeprefix(TINY).removeprefix("-") or "llama"
    if not options.model.startswith(TINY) or name not in hf.NAMES:
        known = ", ".join(f"{TINY}-{each}" for each in hf.NAMES)
        raise ConfigError(
            f"--model: {options.model} is neither a directory nor a tiny model; allowed: {TINY}, {known}"
        )
    model = hf.tiny(name, seed=options.seed)
    if options.dtype != "auto":
        model = model.to(getattr(torch, options.dtype))
    return Loaded(model, ByteTokenizer())


def _checkpoint(options: Options) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(
            options.model, local_files_only=True, dtype=options.dtype
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--model: {options.model} cannot be loaded: {_short(error)}") from error
    enders = model.generation_config.eos_token_id
    if not isinstance(enders, list):
        enders = [] if enders is None else [enders]
    return Loaded(model, PretrainedTokenizer(tokenizer, enders))


def _short(error: Exception) -> str:
    """What `error` says, in one line."""
    return " ".join(str(error).split())[:200]


def open_engine(model: Any, options: Options) -> hf.HFEngine:
    """The engine over a cache of its own, open; the calling thread owns it. Raises ConfigError,
    StorageError."""
    storage = None
    if options.disk is not None:
        storage = StorageConfig(path=options.disk, size=options.disk_size)
    config = hf.cache_config(
        model,
        device=options.device_memory,
        host=None if options.host_memory == NONE else options.host_memory,
        storage=storage,
        page_size=options.page_size,
        write_policy=options.write_policy,
    )
    limits = Limits(
        max_running=options.max_running, max_waiting=options.max_waiting, chunk_tokens=options.chunk_tokens
    )
    return hf.HFEngine(model, config, limits)
