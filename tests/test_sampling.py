"""How a token is chosen: greedy, temperature, top-k, top-p, seeds."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from tiertree.engines.request import Sampling
from tiertree.engines.sampling import Chooser
from tiertree.types import ConfigError

DRAWS = 3000
SEED = 11


def logits(*chances: float) -> torch.Tensor:
    """Logits whose softmax is `chances`."""
    return torch.tensor([math.log(each) if each else -math.inf for each in chances], dtype=torch.float32)


def drawn(given: torch.Tensor, **rules: float) -> dict[int, float]:
    """How often each token is chosen."""
    chooser = Chooser(Sampling(**{"temperature": 1.0, **rules}), SEED)
    counts = Counter(chooser.choose(given) for _ in range(DRAWS))
    return {token: count / DRAWS for token, count in counts.items()}


def assert_close(found: dict[int, float], wanted: dict[int, float]) -> None:
    """The same tokens, each within five standard deviations."""
    assert found.keys() == wanted.keys(), (SEED, found)
    for token, chance in wanted.items():
        deviation = math.sqrt(chance * (1 - chance) / DRAWS)
        assert abs(found[token] - chance) <= 5 * deviation, (SEED, token, found[token], chance)


def test_greedy_takes_the_first_of_the_most_likely() -> None:
    assert Chooser(Sampling(), 0).choose(torch.tensor([0.0, 2.0, 1.0, 2.0])) == 1
    assert Chooser(Sampling(), 0).choose(torch.full((1000,), -3.0)) == 0


def test_chances_are_those_of_a_softmax() -> None:
    assert_close(drawn(logits(0.2, 0.5, 0.3)), {0: 0.2, 1: 0.5, 2: 0.3})


def test_temperature_divides_logits() -> None:
    squares = [each**2 for each in (0.2, 0.5, 0.3)]
    assert_close(
        drawn(logits(0.2, 0.5, 0.3), temperature=0.5),
        {token: each / sum(squares) for token, each in enumerate(squares)},
    )


def test_top_k_leaves_the_most_likely_and_the_first_of_equals() -> None:
    assert_close(drawn(logits(0.2, 0.5, 0.3), top_k=2), {1: 0.625, 2: 0.375})
    assert_close(drawn(logits(0.25, 0.25, 0.25, 0.25), top_k=2), {0: 0.5, 1: 0.5})
    assert drawn(logits(0.2, 0.5, 0.3), top_k=1) == {1: 1.0}
    assert_close(drawn(logits(0.2, 0.5, 0.3), top_k=99), {0: 0.2, 1: 0.5, 2: 0.3})


def test_top_p_leaves_the_fewest_that_make_it_together() -> None:
    given = logits(0.2, 0.5, 0.3)
    assert drawn(given, top_p=0.4) == {1: 1.0}
    assert_close(drawn(given, top_p=0.6), {1: 0.625, 2: 0.375})
    assert_close(drawn(given, top_p=0.9), {0: 0.2, 1: 0.5, 2: 0.3})
    assert drawn(given, top_p=1e-9) == {1: 1.0}


def test_top_k_comes_before_top_p() -> None:
    """Of 0.5, 0.3 and 0.2 top-k 2 makes 0.625 and 0.375, of which the first alone is enough for 0.6."""
    assert drawn(logits(0.5, 0.3, 0.2), top_k=2, top_p=0.6) == {0: 1.0}


def test_what_is_impossible_is_never_chosen() -> None:
    assert_close(drawn(logits(0.5, 0.0, 0.5)), {0: 0.5, 2: 0.5})


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-30])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    given = torch.tensor([30000.0, 3e38, -3e38, 1.0, -math.inf])
    assert drawn(given, temperature=temperature) == {1: 1.0}


def test_the_same_seed_chooses_the_same_and_another_one_differently() -> None:
    def run(seed: int) -> list[int]:
        chooser = Chooser(Sampling(temperature=1.0), seed)
        return [chooser.choose(torch.zeros(50)) for _ in range(20)]

    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert run(5) == run(5) != run(6)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("top_k", 1.0),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 1.5),
    ],
)
def test_nonsense_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        Sampling(**{field: value})
