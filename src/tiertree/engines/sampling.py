"""How a token is chosen: greedy, or by temperature, top-k and top-p, in this order."""

from __future__ import annotations

import torch

from .request import Sampling


class Chooser:
    """Chooses the tokens of one answer. Its random numbers are its own, so an answer does not depend on who
    is served beside it, nor on whether it was interrupted."""

    def __init__(self, sampling: Sampling, seed: int) -> None:
        self._sampling = sampling
        self._random = torch.Generator().manual_seed(seed)

    def choose(self, logits: torch.Tensor) -> int:
        """A token by its `logits` (float32, one-dimensional, the largest finite). O(vocabulary · log
        vocabulary), greedy O(vocabulary)."""
        rules = self._sampling
        if rules.temperature == 0:
            return int(logits.argmax())
        order = torch.sort(logits, descending=True, stable=True)
        count = min(rules.top_k or len(logits), len(logits))
        behind = order.values[:count].double() - order.values[0].double()  # so that no quotient is +∞
        chances = torch.softmax(behind / rules.temperature, 0)
        before = chances.cumsum(0) - chances
        chances[before >= rules.top_p] = 0
        return int(order.indices[torch.multinomial(chances, 1, generator=self._random)])
