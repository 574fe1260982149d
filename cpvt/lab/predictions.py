"""What was predicted of the diagnostics, and a verdict on each: *supported*, *contradicted*, *not resolved*.

The ceilings count what the reach of PEGs hides (`probes.theory`): nobody who sees no farther can be better. The
chapter on place and number builds both by hand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from cpvt.lab.probes import theory
from cpvt.lab.results import Row

IMAGES = 256  # behind every recorded accuracy
SOLVED = 95.0
METRIC = {"where": "top1@10", "arrangement": "top1@6x14", "what": "top1@8x12/unseen"}
TRAINED = "top1@8x12/trained"


def where_ceiling(reach: int, distance: int, size: int = 10) -> float:
    """-> the best accuracy in percent on *where*, at that distance, of who sees borders `reach` tokens away."""
    best = [
        0.5 ** ((down > reach) + (across > reach))  # two halves to know; each is known, or guessed
        for down in range(size // 2)
        for across in range(size // 2)
        if min(down, across) == distance
    ]
    return 100 * sum(best) / len(best)


def arrangement_ceiling(spread: int, separation: int, columns: int = 14, margin: int = 2) -> float:
    """-> the best accuracy in percent on *arrangement*, at that separation, of PEGs that spread that far in all.

    The order shows up to 2 * spread columns; a column shows up to 2 * spread - 1 tokens from a side border, and
    tells something of the order.
    """
    seen: Counter = Counter()
    for first in range(margin, columns - margin - separation):
        for label, pair in enumerate(((first, first + separation), (first + separation, first))):
            order = label if separation <= 2 * spread else None
            shows = [x if min(x, columns - 1 - x) <= 2 * spread - 1 else None for x in pair]
            seen[order, *shows, label] += 1
    best: Counter = Counter()
    for (*observation, _), count in seen.items():
        best[tuple(observation)] = max(best[tuple(observation)], count)
    return 100 * sum(best.values()) / sum(seen.values())


def _luck(percent: float) -> float:
    """Three standard errors of an accuracy on `IMAGES` pictures, in points."""
    return 3 * 100 * (percent / 100 * (1 - percent / 100) / IMAGES) ** 0.5


@dataclass(frozen=True)
class Prediction:
    """An accuracy in percent, from `low` to `high`. `word`: solves, chance, ceiling or fails."""

    word: str
    low: float
    high: float

    def verdict(self, values: Iterable[float]) -> str:
        """Accuracies, one a seed -> supported: all inside; contradicted: none; not resolved: they disagree."""
        inside = [self.low <= value <= self.high for value in values]
        if all(inside):
            return "supported"
        return "not resolved" if any(inside) else "contradicted"


def predicted(task: str, encoding: str) -> Prediction:
    """Of "where", "arrangement" or "what" (unseen side) and an encoding of the diagnostics."""
    wrapped, seen = encoding == "relative(wrap=True)", theory(encoding)
    chance = 25.0 if task == "where" else 50.0
    if encoding == "none" or (wrapped and task == "where"):
        return Prediction("chance", chance - _luck(chance), chance + _luck(chance))
    if task == "what":
        table = encoding in ("learned", "sine")  # learns each place by itself
        return Prediction("fails", 0.0, 75.0) if table else Prediction("solves", SOLVED, 100.0)
    if seen is None and not wrapped:
        return Prediction("solves", SOLVED, 100.0)
    if wrapped:
        best = (3 * 100 + 5 * 50) / 8  # of separations 2 to 9 on a torus of 14 columns, three have no partner
    elif task == "where":
        best = sum(where_ceiling(seen[0], d) for d in range(5)) / 5
    else:
        best = sum(arrangement_ceiling(seen[1] // 2, d) for d in range(2, 10)) / 8
    return Prediction("ceiling", best - 5, min(best + _luck(best), 100.0))


def judge(rows: Iterable[Row], task: str, encoding: str, global_pool: str) -> tuple[str, list[float]] | None:
    """Rows of the diagnostics -> (verdict, accuracies by seed); None without rows.

    *What* counts only where every seed solves the trained side; else it is not resolved.
    """
    found = [row.metrics for row in rows if row.row == f"{task}, {encoding}, {global_pool}"]
    if not found:
        return None
    values = [metrics[METRIC[task]] for metrics in found]
    if task == "what" and encoding != "none" and min(metrics[TRAINED] for metrics in found) < SOLVED:
        return "not resolved", values
    return predicted(task, encoding).verdict(values), values
