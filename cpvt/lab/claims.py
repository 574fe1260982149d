"""A verdict on claims of the form "this is larger than that": *supported*, *contradicted*, *not resolved*."""

from __future__ import annotations

from collections.abc import Sequence

from cpvt.lab.results import NOT_YET, Spread, spread, t_quantile


def p_value(found: Spread) -> float:
    """How often seeds alone give a mean this far from zero, on either side: Student's t over three seeds or more.

    1 for fewer seeds, which resolve nothing.
    """
    if found.n < 3:
        return 1.0
    half = found.high - found.mean
    if half == 0:
        return 0.0 if found.mean else 1.0
    t, low, high = abs(found.mean) / half * t_quantile(found.n - 1), 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if t_quantile(found.n - 1, middle) < t else (low, middle)
    return 1 - low


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """For each p-value whether it stands among all of them, by Holm's correction.

    The smallest of m must be below level / m, the next below level / (m - 1), and so on, up to the first that fails.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    stands = [False] * len(p_values)
    for rank, i in enumerate(order):
        if p_values[i] > level / (len(order) - rank):
            break
        stands[i] = True
    return stands


def verdicts(found: Sequence[Spread | None], level: float = 0.05) -> list[str]:
    """Differences that were each claimed to be above zero, None while not measured -> a verdict on each.

    Supported or contradicted is what stands after Holm among all of them, measured or not.
    """
    stands = holm([1.0 if one is None else p_value(one) for one in found], level)
    words = []
    for one, firm in zip(found, stands, strict=True):
        sign = "supported" if one and one.mean > 0 else "contradicted"
        words.append(NOT_YET if one is None else sign if firm else "not resolved")
    return words


def combination(rows, terms: Sequence[tuple[float, str]], metric: str) -> Spread | None:
    """The Spread, over the seeds that all rows have, of a weighted sum of rows: [(1, "a"), (-1, "b"), ...].

    None without such a seed. With two terms it is `results.difference`; with four, a difference of differences.
    """
    values: dict[str, dict[int, float]] = {name: {} for _, name in terms}
    for row in rows:
        if row.row in values and metric in row.metrics:
            values[row.row][row.seed] = row.metrics[metric]
    seeds = set.intersection(*(set(found) for found in values.values()))
    sums = [sum(weight * values[name][seed] for weight, name in terms) for seed in sorted(seeds)]
    return spread(sums) if sums else None
