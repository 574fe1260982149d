"""Over seeds: intervals, paired differences, verdicts on claims; and what was claimed and predicted beforehand.

A verdict is *supported*, *contradicted* or *not resolved*; where rows are missing, it is `NOT_YET`.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import pandas
import torch
from scipy.stats import t

from cpvt.errors import ResultsError
from cpvt.lab.experiments import BORDER, CIRCULAR, FIVE
from cpvt.lab.probes import theory
from cpvt.lab.results import COLUMNS, NOT_YET, describe, read_arrays, select, unpack

Terms = tuple[tuple[float, dict[str, Any], str], ...]  # (weight, columns of a row, metric), ...


# --------------------------------------------------------------------------- over seeds


@dataclass(frozen=True)
class Spread:
    """Values over seeds: mean, extremes, from three values on a 95 % interval of the mean (Student's t)."""

    mean: float
    min: float
    max: float
    n: int
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.n == 1:
            return f"{self.mean:.1f} (one seed)"
        if self.low is None:
            return f"{self.mean:.1f} ({self.min:.1f} to {self.max:.1f}, {self.n} seeds)"
        return f"{self.mean:.1f} ± {self.high - self.mean:.1f} ({self.n} seeds)"


def spread(values: Iterable[float]) -> Spread:
    values = [float(value) for value in values]
    if not values:
        raise ResultsError("the spread of no values; expected one a seed")
    mean, n = fmean(values), len(values)
    half = float(t.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n) if n > 2 else None
    interval = () if half is None else (mean - half, mean + half)
    return Spread(mean, min(values), max(values), n, *interval)


def by_seed(rows: pandas.DataFrame, columns: dict[str, Any], metric: str) -> pandas.DataFrame:
    """What `select` gives, by seed, where it has the metric; raises ResultsError where a seed stands twice."""
    found = select(rows, **columns)
    found = found[found[metric].notna()] if metric in found else found[:0]
    if found["seed"].duplicated().any():
        which = ", ".join(sorted(found["experiment"].unique()))
        raise ResultsError(f"{describe(columns)}: more than one row a seed, of {which}; select one")
    return found.set_index("seed")


def over_seeds(rows: pandas.DataFrame, metric: str, by: list[str]) -> pandas.DataFrame:
    """-> mean, min and max over seeds; its index: the columns `by`, which must tell the rows apart."""
    found = rows[rows[metric].notna()] if metric in rows else rows[:0].assign(**{metric: 0.0})
    if found.duplicated([*by, "seed"]).any():
        raise ResultsError(f"more than one row a seed for one {', '.join(by)}: select, or name more columns")
    return found.groupby(by, sort=False)[metric].agg(["mean", "min", "max"])


def combination(rows: pandas.DataFrame, *terms: tuple) -> Spread | None:
    """The Spread, over the seeds that have them all, of a weighted sum: (weight, columns, metric), ...

    None without a common seed. Raises ResultsError where rows of a seed differ in scale, data or experiment.
    """
    parts = [(weight, by_seed(rows, columns, metric), metric) for weight, columns, metric in terms]
    alike = ["experiment", "scale", "dataset", "dataset_sha256"]
    sums = []
    for seed in sorted(set.intersection(*(set(part.index) for _, part, _ in parts))):
        for name in alike:
            if len(values := {part.at[seed, name] for _, part, _ in parts}) > 1:
                words = " and ".join(sorted(value[:20] for value in values))
                raise ResultsError(f"seed {seed}: rows of different {name}, {words}: compare like with like")
        sums.append(sum(weight * part.at[seed, metric] for weight, part, metric in parts))
    return spread(sums) if sums else None


def paired_difference(
    rows: pandas.DataFrame, first: dict[str, Any], second: dict[str, Any], metric: str
) -> Spread | None:
    """The Spread of `first` minus `second`, paired by seed; see `combination`."""
    return combination(rows, (1, first, metric), (-1, second, metric))


def gap_by_image(
    experiment: str, first: dict[str, Any], second: dict[str, Any], images: int, folder: Any = None
) -> tuple[float, float] | None:
    """-> by how many points of top-1 row `first` is ahead of `second`, and half of a 95 % interval over images.

    Image by image, the mean over common seeds (None without any): what is hard for both cancels. The interval says
    how far other images would move it, and nothing of other seeds.
    """
    one, other = (read_arrays(experiment, "correct", folder, **columns) for columns in (first, second))
    if not (seeds := one.keys() & other.keys()):
        return None
    gaps = [unpack(one[s], images).double() - unpack(other[s], images).double() for s in sorted(seeds)]
    ahead = torch.stack(gaps).mean(0)
    return 100 * ahead.mean().item(), 196 * ahead.std().item() / images**0.5


# --------------------------------------------------------------------------- verdicts


def p_value(found: Spread) -> float:
    """How often seeds alone give a mean this far from zero, on either side, by Student's t; 1 below three."""
    if found.n < 3:
        return 1.0
    if found.high == found.mean:  # no spread at all
        return 0.0 if found.mean else 1.0
    error = (found.high - found.mean) / t.ppf(0.975, found.n - 1)
    return float(2 * t.sf(abs(found.mean) / error, found.n - 1))


def holm(p_values: Sequence[float]) -> list[bool]:
    """For each p-value whether it stands among all of them: the smallest of m must be below 0.05 / m, the next
    below 0.05 / (m - 1), up to the first that fails."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    stands = [False] * len(p_values)
    for rank, i in enumerate(order):
        if p_values[i] > 0.05 / (len(order) - rank):
            break
        stands[i] = True
    return stands


def verdicts(found: Sequence[Spread | None]) -> list[str]:
    """Differences claimed to be above zero, None while not measured -> a verdict on each, after Holm among all."""
    stands = holm([1.0 if one is None else p_value(one) for one in found])
    words = []
    for one, firm in zip(found, stands, strict=True):
        sign = "supported" if one and one.mean > 0 else "contradicted"
        words.append(NOT_YET if one is None else sign if firm else "not resolved")
    return words


# --------------------------------------------------------------------------- claims, written before the rows


def ahead(better: dict, worse: dict, metric: str = "top1@8", weight: float = 1) -> Terms:
    """Terms of `combination`: by how much one row is ahead of another."""
    return (weight, better, metric), (-weight, worse, metric)


@dataclass(frozen=True)
class Claim:
    """That a `combination` of rows is above zero, and why somebody thinks so."""

    terms: Terms
    reason: str


_NONE, _LEARNED, _PEG, _FIVE, _CIRCULAR, _ROTARY, _BORDER = (
    {"encoding": encoding} for encoding in ("none", "learned", "peg", FIVE, CIRCULAR, "rotary", BORDER)
)
# On the core rows of `photographs`, five seeds each: one family, judged once. All other comparisons are post hoc.
CLAIMS: dict[str, Claim] = {
    "learned > none": Claim(ahead(_LEARNED, _NONE), "order says something; published: 72.2 against 68.2"),
    "one PEG > none": Claim(ahead(_PEG, _NONE), "the same; published: 72.4 against 68.2"),
    "one PEG > learned": Claim(ahead(_PEG, _LEARNED), "published: 72.4 against 72.2, one seed each"),
    "five PEGs > one PEG": Claim(ahead(_FIVE, _PEG), "published: 73.4 against 72.4"),
    "circular PEG > none": Claim(ahead(_CIRCULAR, _NONE), "mixing neighbours helps without any border"),
    "one PEG > circular PEG": Claim(ahead(_PEG, _CIRCULAR), "the border adds to the mixing"),
    "border alone > none": Claim(ahead(_BORDER, _NONE), "the border adds without any mixing"),
    "rotary > learned": Claim(ahead(_ROTARY, _LEARNED), "offsets need not be learnt place by place"),
    "the lead of one PEG over learned is larger at 16 x 16 tokens than at 8 x 8": Claim(
        (*ahead(_PEG, _LEARNED, "top1@16"), *ahead(_PEG, _LEARNED, weight=-1)),
        "published: the margin over a table grows with the test resolution",
    ),
    "from 8 x 8 to 16 x 16 tokens one PEG loses less than rotary": Claim(
        (*ahead(_PEG, _ROTARY, "top1@16"), *ahead(_PEG, _ROTARY, weight=-1)),
        "angles beyond the trained ones are new, neighbourhoods are not",
    ),
    "one PEG keeps more answers than learned when a window moves by a token": Claim(
        ahead(_PEG, _LEARNED, "kept/window4"), "away from the border a PEG does not know that anything moved"
    ),
    "of the shifted map's error, learned has more pattern than one PEG": Claim(
        ahead(_LEARNED, _PEG, "map_error/window/interior/pattern"),
        "each place of a table adds its own vector; seen before in two models on Fashion-MNIST",
    ),
}


def judge(rows: pandas.DataFrame, claims: dict[str, Claim] = CLAIMS) -> pandas.DataFrame:
    """A line for each claim: its `reason`, `difference` (Spread or None), `verdict`, after Holm among all."""
    found = [combination(rows, *claim.terms) for claim in claims.values()]
    index = pandas.Index(claims, name="claim")
    reasons = [claim.reason for claim in claims.values()]
    differences = pandas.Series(found, index, dtype=object)
    return pandas.DataFrame({"reason": reasons, "difference": differences, "verdict": verdicts(found)}, index)


# --------------------------------------------------------------------------- predictions for the synthetic tasks
# The ceilings count what the reach of PEGs hides (`probes.theory`): nobody who sees no farther can be better. The
# chapter How far it sees builds the first by hand.

IMAGES = 256  # behind every recorded accuracy
SOLVED = 95.0
METRIC = {"where": "top1@10", "arrangement": "top1@6x14", "what": "top1@8x12/unseen"}
TRAINED = "top1@8x12/trained"


def where_ceiling(reach: int, distance: int) -> float:
    """-> the best accuracy in percent on *where*, at that distance, of who sees borders `reach` tokens away."""
    best = [
        0.5 ** ((down > reach) + (across > reach))  # two halves to know; each is known, or guessed
        for down in range(5)
        for across in range(5)
        if min(down, across) == distance
    ]
    return 100 * sum(best) / len(best)


def arrangement_ceiling(spread: int, separation: int) -> float:
    """-> the best accuracy in percent on *arrangement*, at that separation, of PEGs that spread that far in all:
    the order shows up to 2 * spread columns; a column hints at it up to 2 * spread - 1 tokens from a border."""
    seen: Counter = Counter()
    for first in range(2, 12 - separation):  # of 14 columns, two on either side stay empty
        for label, pair in enumerate(((first, first + separation), (first + separation, first))):
            order = label if separation <= 2 * spread else None
            shows = [x if min(x, 13 - x) <= 2 * spread - 1 else None for x in pair]
            seen[order, *shows, label] += 1
    best: Counter = Counter()
    for (*observation, _), count in seen.items():
        best[tuple(observation)] = max(best[tuple(observation)], count)
    return 100 * sum(best.values()) / sum(seen.values())


@dataclass(frozen=True)
class Prediction:
    """An accuracy in percent, from `low` to `high`. `word`: solves, chance, ceiling or fails."""

    word: str
    low: float
    high: float

    def verdict(self, values: Iterable[float]) -> str:
        """Accuracies, one a seed -> supported: all inside; contradicted: none; not resolved: they disagree."""
        inside = {self.low <= value <= self.high for value in values}
        return "not resolved" if len(inside) > 1 else "supported" if True in inside else "contradicted"


def predicted(task: str, encoding: str) -> Prediction:
    """Of "where", "arrangement" or "what" (unseen side) and an encoding of the synthetic tasks."""

    def luck(percent: float) -> float:  # three standard errors, in points
        return 3 * 100 * (percent / 100 * (1 - percent / 100) / IMAGES) ** 0.5

    wrapped, seen = encoding == "relative(wrap=True)", theory(encoding)
    chance = 25.0 if task == "where" else 50.0
    if encoding == "none" or (wrapped and task == "where"):
        return Prediction("chance", chance - luck(chance), chance + luck(chance))
    if task == "what":
        table = encoding in ("learned", "sine")  # learns each position by itself
        return Prediction("fails", 0.0, 75.0) if table else Prediction("solves", SOLVED, 100.0)
    if seen is None and not wrapped:
        return Prediction("solves", SOLVED, 100.0)
    if wrapped:
        best = (3 * 100 + 5 * 50) / 8  # of separations 2 to 9 on a torus of 14 columns, three have no partner
    elif task == "where":
        best = sum(where_ceiling(seen[0], d) for d in range(5)) / 5
    else:
        best = sum(arrangement_ceiling(seen[1] // 2, d) for d in range(2, 10)) / 8
    return Prediction("ceiling", best - 5, min(best + luck(best), 100.0))


def judge_predictions(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Rows of `synthetic` -> a line for each task, encoding and global_pool: `values` (percent, a tuple, one a
    seed), their `mean`, what was predicted (`word`, `low`, `high`), and the `verdict`: on *what* not resolved
    unless every seed solves the trained side."""
    lines = []
    for key, part in rows.groupby(list(COLUMNS["synthetic"]), sort=False):
        task, encoding, _ = key
        values, prediction = tuple(part[METRIC[task]]), predicted(task, encoding)
        verdict = prediction.verdict(values)
        if task == "what" and encoding != "none" and part[TRAINED].min() < SOLVED:
            verdict = "not resolved"
        lines.append((*key, values, fmean(values), *vars(prediction).values(), verdict))
    names = [*COLUMNS["synthetic"], "values", "mean", "word", "low", "high", "verdict"]
    return pandas.DataFrame(lines, columns=names)
