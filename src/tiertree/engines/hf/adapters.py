"""The LoRA adapters of a model, one of which computes at a time, or none.

Adapters that peft has put into a model are layers around its own; they are switched in place, and none of
the model's own weights changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

import torch
from transformers import PreTrainedModel

from ..request import InvalidRequest
from .probe import UnsupportedModel


class Adapters:
    """Those of `model`, by name. Raises UnsupportedModel for adapters that cannot be switched in place."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Final = model
        self._configs: dict[str, Any] = {}
        self.layers: dict[str, Any] = {}
        """peft's layers by the names of the modules they stand for."""
        self.refresh()

    def refresh(self) -> None:
        """See what adapters the model has now. Raises UnsupportedModel."""
        self._configs = dict(getattr(self._model, "peft_config", None) or {})
        self.layers = dict(_tuned(self._model)) if self._configs else {}
        for place, layer in self.layers.items():
            if not hasattr(layer, "scaling"):
                raise UnsupportedModel(
                    f"adapters: {place} has a {type(layer).__name__}; supported: LoRA and others that scale"
                )
        self._check_merged()

    def _check_merged(self) -> None:
        if any(layer.merged for layer in self.layers.values()):
            raise UnsupportedModel("adapters: one is merged into the weights; required: unmerge it")

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that there are."""
        return tuple(self._configs)

    def check(self, name: str) -> None:
        """Raise InvalidRequest unless `name` is an adapter, still, or ""."""
        if name and not (name in self._configs and name in (getattr(self._model, "peft_config", None) or {})):
            allowed = ", ".join(map(repr, ("", *self._configs)))
            raise InvalidRequest(f"adapter: {name!r} is not known; allowed: {allowed}")

    def use(self, name: str) -> None:
        """Compute with the adapter `name` from now on, with none for "". Raises InvalidRequest for one that
        is not there, UnsupportedModel while any is merged into the weights. O(layers)."""
        self.check(name)
        self._check_merged()
        for layer in self.layers.values():
            if layer.disable_adapters is not (not name):
                layer.enable_adapters(bool(name))
            if name and layer.active_adapters != [name]:
                layer.set_adapter([name])

    def tensors(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights of the adapter `name`, in order of the model's modules."""
        for place, layer in self.layers.items():
            for part in layer.adapter_layer_names:
                held = getattr(layer, part)
                if name not in held:
                    continue
                weights = held[name]
                if isinstance(weights, torch.nn.Module):
                    for key, tensor in weights.state_dict().items():
                        yield f"{place}.{part}.{key}", tensor
                else:
                    yield f"{place}.{part}", weights

    def describe(self, name: str) -> str:
        """What else makes the adapter `name` compute what it does, as stable text: its settings and how
        strong it is in each layer."""
        settings = self._configs[name].to_dict()
        settings.pop("base_model_name_or_path", None)
        strengths = [float(layer.scaling.get(name, 0)) for layer in self.layers.values()]
        return json.dumps([settings, strengths], sort_keys=True, default=_stable)

    def own(self, name: str) -> bool:
        """Whether a weight of the model by this name belongs to an adapter."""
        return any(
            name.startswith(f"{place}.{part}.")
            for place, layer in self.layers.items()
            for part in layer.adapter_layer_names
        )


def unwrapped(model: Any) -> PreTrainedModel:
    """The model of transformers that peft has wrapped, with its adapters in it; any other as it is. Raises
    UnsupportedModel for adapters that are not in the model's layers."""
    inner = model
    if hasattr(model, "get_base_model"):
        for name, config in model.peft_config.items():
            if config.is_prompt_learning:
                raise UnsupportedModel(f"adapters: {name!r} adds tokens of its own; supported: LoRA")
        inner = model.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"model: {type(model).__name__} is not a model of transformers")
    return inner


def _stable(value: object) -> object:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _tuned(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise UnsupportedModel(
                f"adapters: {name!r} is replaced as a whole (modules_to_save); supported: LoRA"
            )
        if isinstance(module, BaseTunerLayer):
            yield name, module
