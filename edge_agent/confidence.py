"""How sure the draft is of a token: six strategies, each a small class, from one row of the draft's logits.

    score(logits [vocab] float32, token drawn, position, sampling) -> [0, 1], higher = surer

A score is no probability and need not be: `calibration.py` learns what a score is worth, so only the order of scores
matters. `float64` near 1 is fine enough to tell 1 - 1e-9 from 1. A package adds a strategy by an entry point of the
group `pilotfish.strategies` (docs/confidence.md); any one can be switched off. Knows nothing of verdicts or policies.

Sources: maximum probability, Hendrycks & Gimpel 2017; temperature scaling, Guo et al. 2017; entropy and margin are
those of active learning (Settles 2009); the margin at T > 0 is that of the perturbed logits, because both sides know
the noise: what decides is by how much the drawn id won, not how likely it was to win.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pilotfish.edge_agent.drafters.base import drawn_probability
from pilotfish.protocol.errors import SettingsError
from pilotfish.protocol.messages import Sampling
from pilotfish.protocol.sampling import perturbed

GROUP = "pilotfish.strategies"
DEFAULT = "margin"

Logits = NDArray[np.float32]


class Strategy(ABC):
    """One way to read a row of logits. Subclasses set `name` and define `score`."""

    name: str = ""

    @abstractmethod
    def score(self, logits: Logits, token: int, position: int, sampling: Sampling) -> float:
        """How sure the draft is of `token`, drawn at `position` from `logits` [vocab]; in [0, 1]."""


class MaxProb(Strategy):
    """The probability of the token drawn, at the request's temperature; at T = 0 that is the largest of the row."""

    name = "max_prob"

    def score(self, logits: Logits, token: int, position: int, sampling: Sampling) -> float:
        """See `Strategy.score`."""
        return drawn_probability(logits, token, position, sampling)


class Entropy(Strategy):
    """exp(-entropy): one over the number of ids the draft hesitates between."""

    name = "entropy"

    def score(self, logits: Logits, token: int, position: int, sampling: Sampling) -> float:
        """See `Strategy.score`."""
        shifted = (logits - logits.max()).astype(np.float64) / (sampling.temperature or 1.0)
        weights = np.exp(shifted)
        total = weights.sum()
        live = weights > 0  # an id at -inf has no share, and 0 x -inf no value
        return float(np.exp((weights[live] * shifted[live]).sum() / total) / total)


class Temperature(Strategy):
    """The token's probability with the logits divided by `scale` once more: a draft is surer than it is right."""

    name = "temperature"

    def __init__(self, scale: float = 2.0) -> None:
        self.scale = scale

    def score(self, logits: Logits, token: int, position: int, sampling: Sampling) -> float:
        """See `Strategy.score`."""
        softer = sampling.model_copy(update={"temperature": (sampling.temperature or 1.0) * self.scale})
        return drawn_probability(logits, token, position, softer)


class TopKAgg(Strategy):
    """The token's share of the `k` likeliest ids together: a long tail of unlikely ones does not count."""

    name = "top_k_agg"

    def __init__(self, k: int = 8) -> None:
        self.k = k

    def score(self, logits: Logits, token: int, position: int, sampling: Sampling) -> float:
        """See `Strategy.score`."""
        k = min(self.k, len(logits))
        likeliest = np.partition(logits, len(logits) - k)[-k:].astype(np.float64)
        scaled = np.exp((likeliest - likeliest.max()) / (sampling.temperature or 1.0))
        own = np.exp((float(logits[token]) - likeliest.max()) / (sampling.temperature or 1.0))
        return float(min(1.0, own / scaled.sum()))


class Margin(Strategy):
    """1 - exp(-gap): by how much the token won over the runner-up, noise and filters included at T > 0."""

    name = "margin"

    def score(self, logits: Logits, token: int, position: int, sampling: Sampling) -> float:
        """See `Strategy.score`."""
        (sums,) = perturbed(logits[None], np.array([position], np.int64), sampling)
        runner_up = max(sums[:token].max(initial=-np.inf), sums[token + 1 :].max(initial=-np.inf))
        return float(-np.expm1(min(0.0, runner_up - sums[token])))


class Ensemble(Strategy):
    """Several strategies as one: the logistic function of a weighted sum of their log-odds.

    Weights are given, else all equal; `fitted` learns them from labels (logistic regression, Newton's method).
    """

    name = "ensemble"

    def __init__(self, members: Sequence[Strategy], weights: Sequence[float] | None = None, bias: float = 0.0) -> None:
        if not members:
            raise SettingsError("an ensemble needs a member: switch fewer strategies off")
        self.members = list(members)
        given = np.full(len(self.members), 1 / len(self.members)) if weights is None else np.asarray(weights, float)
        if given.shape != (len(self.members),):
            raise SettingsError(f"{len(self.members)} strategies take as many weights, not {given.size}")
        self.weights, self.bias = given, float(bias)

    def score(self, logits: Logits, token: int, position: int, sampling: Sampling) -> float:
        """See `Strategy.score`."""
        each = [member.score(logits, token, position, sampling) for member in self.members]
        return float(self.combined(np.asarray([each]))[0])

    def combined(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Members' scores [tokens, members] -> scores [tokens]."""
        chances: NDArray[np.float64] = 1 / (1 + np.exp(-(log_odds(scores) @ self.weights + self.bias)))
        return chances

    def fitted(self, scores: NDArray[np.float64], agreed: NDArray[np.bool_], ridge: float = 1.0) -> Ensemble:
        """An ensemble of the same members with weights that explain the labels [tokens] best."""
        features = np.column_stack([log_odds(scores), np.ones(len(scores))])
        start = np.append(np.full(len(self.members), 1 / len(self.members)), 0.0)
        solution = _logistic(features, agreed.astype(float), start, ridge)
        return Ensemble(self.members, solution[:-1].tolist(), float(solution[-1]))


def _logistic(
    features: NDArray[np.float64], labels: NDArray[np.float64], start: NDArray[np.float64], ridge: float
) -> NDArray[np.float64]:
    """Logistic regression that is drawn towards `start` where the labels say little. Newton, some twenty steps."""
    found = start.copy()
    for _ in range(25):
        chance = 1 / (1 + np.exp(-np.clip(features @ found, -30, 30)))
        gradient = features.T @ (labels - chance) - ridge * (found - start)
        curvature = (features * (chance * (1 - chance))[:, None]).T @ features + ridge * np.eye(len(found))
        step = np.linalg.solve(curvature, gradient)
        found = found + step
        if np.abs(step).max() < 1e-6:
            break
    return found


def log_odds(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """log(s / (1 - s)), kept within +-20."""
    inside = np.clip(scores, 2e-9, 1 - 2e-9)
    odds: NDArray[np.float64] = np.log(inside) - np.log1p(-inside)
    return odds


# --- the registry --------------------------------------------------------------------------------------------

BUILT_IN: tuple[type[Strategy], ...] = (MaxProb, Entropy, Temperature, TopKAgg, Margin)


@cache
def _installed() -> dict[str, type[Strategy]]:
    """Those of other packages; one that cannot be loaded is told, and nothing else breaks."""
    from importlib.metadata import entry_points

    found: dict[str, type[Strategy]] = {}
    for entry in entry_points(group=GROUP):
        try:
            found[entry.name] = entry.load()
        except Exception as error:
            raise SettingsError(
                f"the strategy {entry.name!r} ({entry.value}) cannot be loaded ({type(error).__name__}: {error}): "
                "repair or uninstall its package"
            ) from error
    return found


def strategies(off: Sequence[str] = ()) -> dict[str, Strategy]:
    """Every single strategy by name but those switched off. Raises SettingsError for an unknown name in `off`."""
    kinds = {kind.name: kind for kind in BUILT_IN} | _installed()
    for name in off:
        if name not in kinds:
            raise SettingsError(f"there is no strategy {name!r} to switch off: {', '.join(kinds)}")
    return {name: kind() for name, kind in kinds.items() if name not in off}


def strategy(name: str, off: Sequence[str] = (), weights: Mapping[str, float] | None = None) -> Strategy:
    """One strategy by its name; `ensemble` is all that are not switched off, weighted by `weights` (name -> weight).

    Raises SettingsError for a name nobody registered or one that is switched off.
    """
    found = strategies(off)
    if name == Ensemble.name:
        known = None if weights is None else [weights.get(member, 0.0) for member in found]
        return Ensemble(list(found.values()), known, (weights or {}).get("bias", 0.0))
    if name not in found:
        why = "is switched off" if name in off else "is not known"
        raise SettingsError(f"the strategy {name!r} {why}: choose {', '.join([*found, Ensemble.name])}")
    return found[name]
