"""A model of transformers as a `Runner`: one forward pass over rows of the device pools."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from transformers import PreTrainedModel

from ...pools.group import PoolGroup
from ..request import InvalidRequest
from ..row import Embeds, Row
from .adapters import Adapters
from .paged import PagedCache, Planes
from .plan import Plan
from .probe import check_inference


class HFRunner:
    """Runs `model`, which is described by `plan`, on `pools`, whose memory order is layer_first."""

    def __init__(
        self, model: PreTrainedModel, plan: Plan, pools: PoolGroup, adapters: Adapters | None = None
    ):
        self.plan: Final = plan
        self._model = model
        self._planes = Planes(plan, pools)
        self._adapters = Adapters(model) if adapters is None else adapters
        self._device = self._planes.device
        self._modules = tuple(model.named_modules())
        self._scale: float | None = None

    @property
    def vocab_size(self) -> int:
        """Logits per token."""
        return self.plan.vocab_size

    @property
    def hidden_size(self) -> int:
        """Elements of the vector of one token."""
        return self.plan.hidden_size

    def forward(self, rows: Sequence[Row], adapter: str = "") -> torch.Tensor:
        """See `Runner`. Raises InvalidRequest for an adapter that the model does not have, UnsupportedModel
        if any part of the model is in training mode, or an adapter is merged into its weights."""
        check_inference(self._modules)
        self._adapters.use(adapter)
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
            parts = [self._pass(part) for part in self._together(rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _together(self, rows: Sequence[Row]) -> list[Sequence[Row]]:
        """The rows that may share a pass, in order: all of them where positions can be given, padding is
        masked and none is without a state to go on from while others have one."""
        fresh = bool(self.plan.states) and any(row.start == 0 for row in rows)
        alone = len(rows) > 1 and (fresh or not {"position_ids", "attention_mask"} <= self.plan.accepts)
        return [[row] for row in rows] if alone else [rows]

    def _pass(self, rows: Sequence[Row]) -> torch.Tensor:
        cache = PagedCache(self._planes, rows)
        ids = torch.tensor([row.tokens for row in rows], device=self._device)
        arguments: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        arguments |= self._positions(rows)
        if any(True for row in rows for _ in _overlaps(row)):
            arguments["inputs_embeds"] = self._embedded(rows, ids)
        else:
            arguments["input_ids"] = ids
        if "logits_to_keep" in self.plan.accepts:
            arguments["logits_to_keep"] = 1
        logits: torch.Tensor = self._model(**arguments).logits
        cache.save()
        return logits[:, -1].to("cpu", torch.float32)

    def _positions(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Where the new tokens stand, and which columns of the frame are padding (none for one row)."""
        starts = torch.tensor([row.start for row in rows])
        start, new = max(row.start for row in rows), len(rows[0].tokens)
        given = {"position_ids": starts[:, None] + torch.arange(new)}
        if len(rows) > 1 and any(row.start != start for row in rows):
            given["attention_mask"] = (torch.arange(start + new) >= start - starts[:, None]).to(torch.int64)
        if "cache_position" in self.plan.accepts:
            given["cache_position"] = torch.arange(start, start + new)
        return {
            name: value.to(self._device, non_blocking=True)
            for name, value in given.items()
            if name in self.plan.accepts
        }

    def _embedded(self, rows: Sequence[Row], ids: torch.Tensor) -> torch.Tensor:
        """What the model makes of tokens, with the given vectors in their places."""
        vectors = self._vectors(ids)
        for index, row in enumerate(rows):
            for each, low, high in _overlaps(row):
                part = each.vectors[low - each.start : high - each.start]
                vectors[index, low - row.start : high - row.start] = part.to(vectors)
        return vectors

    def _vectors(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors that the model computes from for these tokens: some multiply what they look up."""
        if self._scale is None:
            self._scale = self._find_scale()
        found: torch.Tensor = self._model.get_input_embeddings()(ids) * self._scale
        return found

    def _find_scale(self) -> float:
        """By what the model multiplies the vectors of tokens before it computes from them, found by trying.
        Raises InvalidRequest if it does anything else with tokens."""
        ids = torch.arange(1, 5, device=self._device)[None]
        lookup = self._model.get_input_embeddings()
        expected = self._model(input_ids=ids, use_cache=False).logits
        config = self._model.config.get_text_config(decoder=True)
        for scale in (1.0, getattr(config, "embedding_multiplier", 1.0)):
            found = self._model(inputs_embeds=lookup(ids) * scale, use_cache=False).logits
            if torch.equal(found, expected):
                return float(scale)
        raise InvalidRequest("spans: this model cannot compute from vectors alone; allowed: none")


def _overlaps(row: Row) -> Iterator[tuple[Embeds, int, int]]:
    """Given vectors that fall on new tokens, with the positions that do."""
    for each in row.embeds:
        low = max(each.start, row.start)
        high = min(each.start + len(each.vectors), row.start + len(row.tokens))
        if low < high:
            yield each, low, high
