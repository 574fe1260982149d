"""A verdict on claims of the form "this is larger than that": *supported*, *contradicted*, *not resolved*."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cpvt.lab.results import NOT_YET, Row, Spread, same_images, spread, t_quantile


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

    The smallest of m must be below level / m, the next below level / (m - 1), up to the first that fails.
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


def combination(rows: Iterable[Row], *terms: tuple[float, str, str]) -> Spread | None:
    """The Spread, over the seeds that have them all, of a weighted sum: (weight, row, metric), ...

    (1, "a", "top1@14"), (-1, "b", "top1@14") is `results.difference`; four terms give a difference of differences.
    None without a common seed. Raises ResultsError where rows of a seed were evaluated on different images.
    """
    having: dict[tuple[str, str], dict[int, Row]] = {(name, metric): {} for _, name, metric in terms}
    for row in rows:
        for name, metric in having:
            if row.row == name and metric in row.metrics:
                having[name, metric][row.seed] = row
    sums = []
    for seed in sorted(set.intersection(*(set(found) for found in having.values()))):
        same_images([having[name, metric][seed] for _, name, metric in terms])
        sums.append(sum(w * having[name, metric][seed].metrics[metric] for w, name, metric in terms))
    return spread(sums) if sums else None
