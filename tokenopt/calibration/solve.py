"""The schedule of least expected error within a cost, from a table per layer, by dynamic programming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from tokenopt.schedule import Schedule

RATIOS = (0.75, 0.5, 0.25)  # shares of the tokens that are kept where tables are measured
_BISECTIONS = 40
_STATES = 96  # token counts that are told apart, at most


@dataclass(frozen=True)
class Table:
    """What was measured of every layer that can reduce.

    Attributes:
        layers: numbers of these layers, in order.
        tokens: reducible tokens before the first.
        error: [layers, ratios] deviation of the model where that layer alone keeps that share (see `RATIOS`).
        cost: [layers + 1, ratios + 1] cost of the model, and what it changes between the place of each layer and the
            next where that share of tokens is left, all of them first; only sums over all rows mean anything.
        overhead: cost of reducing at a layer, whatever is removed.
        least: the smallest share that one layer can keep of what it is given.
        chained: what one layer removes is gone for all later ones; else each layer reduces for itself.
    """

    layers: tuple[int, ...]
    tokens: int
    error: np.ndarray
    cost: np.ndarray
    overhead: float = 0.0
    least: float = 0.0
    chained: bool = True

    @property
    def dense(self) -> float:
        """Cost without any reduction."""
        return float(self.cost[:, 0].sum())

    def costs(self, layer: int, shares: np.ndarray) -> np.ndarray:
        """The row of a layer (by its position in ``layers``) at shares of tokens left."""
        known = np.array([1.0, *RATIOS][: self.cost.shape[1]])
        fit = np.polyfit(known, self.cost[layer + 1], min(2, len(known) - 1))  # attention is quadratic in tokens
        return np.polyval(fit, shares)

    def errors(self, layer: int, shares: np.ndarray) -> np.ndarray:
        """Deviation where a layer alone keeps these shares; it never falls where more is removed.

        Deviations grow as the square of what is changed: between what was measured, and beyond it, their roots are
        taken to be linear.
        """
        roots = np.sqrt(np.maximum.accumulate([0.0, *self.error[layer]]))
        removed = 1 - np.array([1.0, *RATIOS][: len(roots)])
        slope = (roots[-1] - roots[-2]) / (removed[-1] - removed[-2])
        beyond = np.clip(1 - shares - removed[-1], 0, None) * slope
        return (np.interp(1 - shares, removed, roots) + beyond) ** 2


def solve(table: Table, budget: float, weights: Mapping[int, float] | None = None) -> list[int] | None:
    """Tokens to remove at each of the table's layers, so that cost is at most ``budget`` and expected error least.

    Reducing from n to m tokens at a layer is expected to add that layer's error at m less that at n: where all layers
    are alike, the sum is the error of the last state, and a later layer with smaller errors is preferred.

    Args:
        weights: factors of the errors of layers.

    Returns:
        None where even the strongest reduction costs more.
    """
    low, high = 0.0, 1.0
    cheapest = _path(table, np.inf, weights)
    if _cost(table, cheapest) > budget:
        return None
    if _cost(table, [0] * len(table.layers)) <= budget:
        return [0] * len(table.layers)
    scale = max(float(table.error.max()), 1e-12) / table.dense
    while _cost(table, _path(table, high * scale, weights)) > budget and high < 1e9:
        low, high = high, high * 8
    best = cheapest
    for _ in range(_BISECTIONS):
        price = (low + high) / 2
        path = _path(table, price * scale, weights)
        if _cost(table, path) <= budget:
            high, best = price, path
        else:
            low = price
    return _spent(table, best, budget)


def _spent(table: Table, path: list[int], budget: float) -> list[int]:
    """Gives back tokens, where the last price left some of the budget unused: those of greatest error first."""
    path = list(path)
    order = sorted(range(len(path)), key=lambda i: -table.error[i].max())
    for step in (16, 4, 1):
        for i in order:
            while path[i] >= step and _cost(table, [*path[:i], path[i] - step, *path[i + 1 :]]) <= budget:
                path[i] -= step
    return path


def scaled(table: Table, shape: Schedule, depth: int, budget: float) -> list[int] | None:
    """Tokens to remove at each of the table's layers in the shape of a schedule, scaled until it costs the budget.

    Args:
        depth: layers of the model, of which shares of the depth count.

    Returns:
        None where the strongest scale costs more.
    """

    def removed(factor: float) -> list[int]:
        schedule, left, counts = shape.scaled(factor, depth), table.tokens, []
        for layer in table.layers:
            kept = max(schedule.kept(layer, depth, left), ceil(table.least * left), 1)
            counts.append(left - kept)
            left = kept if table.chained else left
        return counts

    if shape.keep is not None:
        low, high = 0.0, 0.999 / (1.0 - shape.keep)
    else:
        low, high = 0.0, 4.0 * table.tokens / max(sum(shape.scaled(1.0, depth).r), 1)
    if _cost(table, removed(high)) > budget:
        return None
    for _ in range(_BISECTIONS):
        factor = (low + high) / 2
        low, high = (low, factor) if _cost(table, removed(factor)) <= budget else (factor, high)
    return removed(high)


def _cost(table: Table, removed: Sequence[int]) -> float:
    left, total = table.tokens, float(table.cost[0, 0])
    for i, count in enumerate(removed):
        left = left - count if table.chained else table.tokens - count
        total += float(table.costs(i, np.array([left / table.tokens]))[0]) + table.overhead * (count > 0)
    return total


def expected(table: Table, removed: Sequence[int]) -> float:
    """Cost of removing so many tokens at each layer, by the table."""
    return _cost(table, removed)


def _path(table: Table, price: float, weights: Mapping[int, float] | None) -> list[int]:
    """Least error + price x cost; without end, least cost."""
    step = max(table.tokens // _STATES, 1)
    counts = np.arange(table.tokens, 0, -step)  # tokens that are left, all first
    shares = counts / table.tokens
    finite = np.isfinite(price)
    best = np.full(len(counts), np.inf)
    best[0] = 0.0
    choice = []
    for i, layer in enumerate(table.layers):
        error = table.errors(i, shares) * (weights or {}).get(layer, 1.0)
        cost = table.costs(i, shares)
        paid = cost * price if finite else cost
        if not table.chained:
            allowed = shares >= table.least
            total = (error if finite else 0) + paid + _fee(table, price, finite) * (shares < 1)
            total = np.where(allowed, total, np.inf)
            choice.append(np.array([int(total.argmin())]))
            continue
        rise = np.maximum(error[None, :] - error[:, None], 0.0) if finite else np.zeros((len(counts),) * 2)
        fee = _fee(table, price, finite) * (counts[None, :] < counts[:, None])
        step_cost = best[:, None] + rise + fee + paid[None, :]
        legal = (counts[None, :] <= counts[:, None]) & (counts[None, :] >= np.ceil(table.least * counts[:, None]))
        step_cost = np.where(legal, step_cost, np.inf)
        choice.append(step_cost.argmin(0))
        best = step_cost.min(0)
    if not table.chained:
        return [int(table.tokens - counts[c[0]]) for c in choice]
    at, removed = int(best.argmin()), []
    for came in reversed(choice):
        before = int(came[at])
        removed.append(int(counts[before] - counts[at]))
        at = before
    return removed[::-1]


def _fee(table: Table, price: float, finite: bool) -> float:
    return table.overhead * price if finite else table.overhead
