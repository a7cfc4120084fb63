"""What a model's KV depends on besides its tokens, as text for keys: `(model, revision)`.

    model      class, element type, attention kernel, version of transformers, SHA-256 of the config and
             of the kernels of its parts
    revision   SHA-256 over names, shapes, types and checksums of all weights and buffers

The same weights give the same text in every process and on every device; any other gives another. Where
a model was loaded from does not count. Adapters are told apart in `adapter_digest`, and a model is the same
with and without them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch
import transformers
import xxhash
from transformers import PreTrainedModel

from .adapters import Adapters

_PIECE_BYTES: Final = 64 << 20
"""Weights that are not in main memory are brought there in pieces of so many bytes."""
_NOT_OF_CONFIG: Final = frozenset(
    ("_name_or_path", "architectures", "torch_dtype", "dtype", "transformers_version")
)


def fingerprint(model: PreTrainedModel) -> tuple[str, str]:
    """Texts for `CacheConfig.model` and `.revision`. O(bytes of the weights)."""
    adapters = Adapters(model)
    return _model_text(model), digest(_weights(model, adapters))


def adapter_digest(adapters: Adapters, name: str) -> str:
    """64 hexadecimal digits over the weights and settings of the adapter `name`. O(bytes of them)."""
    about = adapters.describe(name)
    return hashlib.sha256(f"{about};{digest(adapters.tensors(name))}".encode()).hexdigest()


def digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """64 hexadecimal digits over these tensors and their names, in any order. O(bytes)."""
    lines = sorted(
        f"{name};{tensor.dtype};{tuple(tensor.shape)};{_checksum(tensor)}" for name, tensor in tensors
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _model_text(model: PreTrainedModel) -> str:
    about_all = [_plain(model.config.to_dict()), _kernels(model.config)]
    config = json.dumps(about_all, sort_keys=True, default=str)
    about = (
        type(model).__name__,
        str(model.dtype).removeprefix("torch."),
        model.config._attn_implementation,
        f"transformers-{transformers.__version__}",
        hashlib.sha256(config.encode()).hexdigest(),
    )
    return "/".join(map(str, about))


def _kernels(config: Any) -> list[Any]:
    """How attention and experts are computed, here and in each part (text, vision): not in `to_dict`."""
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}}
    return [
        getattr(config, "_attn_implementation", None),
        getattr(config, "_experts_implementation", None),
        {name: _kernels(part) for name, part in parts.items() if part is not None},
    ]


def _plain(value: Any) -> Any:
    """A config without what is not about the model."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items() if key not in _NOT_OF_CONFIG}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def _weights(model: PreTrainedModel, adapters: Adapters) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight and buffer that is not an adapter's, by the name it has without adapters."""
    for found in (model.named_parameters(), model.named_buffers()):
        for name, tensor in found:
            if not adapters.own(name):
                yield name.replace(".base_layer.", "."), tensor


def _checksum(tensor: torch.Tensor) -> str:
    hasher = xxhash.xxh3_128()
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    for piece in torch.split(flat, _PIECE_BYTES):
        hasher.update(piece.cpu().numpy().data)
    return hasher.hexdigest()
