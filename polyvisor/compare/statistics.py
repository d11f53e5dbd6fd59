"""What can be said of values that were measured: medians with confidence intervals, and whether two of them differ.

Pure functions on lists of numbers. They need scipy, which is in the extra `compare` and never on hosts. The same values always
give the same intervals: the bootstrap's random numbers begin anew for each. docs/design/compare.md says why these methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from math import comb
from typing import TYPE_CHECKING, Any

from polyvisor.errors import Unavailable
from polyvisor.values import dataclass

if TYPE_CHECKING:
    import numpy as np

CONFIDENCE = 0.95  # of the interval of one median
ALPHA = 0.01  # how often a difference may be claimed where there is none
_RESAMPLES = 4999
_SEED = 20130101


class Verdict(StrEnum):
    """What two sets of values say about each other; `BETTER` and `WORSE` are meant from the baseline."""

    BETTER = "better"
    WORSE = "worse"
    NONE = "no difference shown"
    TOO_FEW = "too few runs"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The median of `runs` values with its confidence interval (None for a single value), and their extremes."""

    median: float
    low: float | None
    high: float | None
    least: float
    most: float
    runs: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How values differ from the baseline's.

    `change` is the relative change of the median (0.1: a tenth more), or, where a value is not above zero, `is_relative` is
    false and it is the difference. `low` and `high` bound it with a confidence of 1 - ALPHA; they are None where there are too
    few values. `effect` is Cliff's delta: 1 where each value is above each of the baseline's, -1 where below, 0 where neither.
    `p` is that of the rank test, 1 where there are too few values.
    """

    change: float
    low: float | None
    high: float | None
    is_relative: bool
    effect: float
    p: float
    verdict: Verdict


def require() -> None:
    """Raise Unavailable, with the command, where the extra is not installed."""
    try:
        import scipy.stats  # noqa: F401
    except ImportError as error:
        raise Unavailable(
            f"polyvisor compare reckons with scipy, which is not installed ({error})",
            hint="pip install 'polyvisor[compare]', or in the project: uv sync --extra compare",
        ) from error


def summarize(values: Sequence[float]) -> Summary:
    """The median of one or more values, and a bootstrap interval of it (percentiles of the medians of resamples)."""
    import numpy as np

    low, high = (None, None) if len(values) < 2 else _interval((values,), _median, CONFIDENCE)
    return Summary(
        median=float(np.median(values)), low=low, high=high, least=min(values), most=max(values), runs=len(values)
    )


def compare(baseline: Sequence[float], values: Sequence[float], *, lower_is_better: bool) -> Comparison:
    """How `values` differ from `baseline`, each of at least one value.

    A difference is claimed where two methods agree at the level ALPHA: the bootstrap interval of the change leaves zero out,
    and the rank test (Mann-Whitney, exact for few values) does not hold the two for the same. The second alone keeps its
    promise for few values, the first alone tells how large the difference is.
    """
    relative = min(*baseline, *values) > 0
    statistic = _ratio if relative else _difference
    change = float(statistic(_array(baseline), _array(values)))
    low, high, p, verdict = None, None, 1.0, Verdict.TOO_FEW
    if enough(len(baseline), len(values)):
        p = _rank_test(baseline, values)
        low, high = _interval((baseline, values), statistic, 1 - ALPHA)
        verdict = _verdict(low, high, p, lower_is_better)
    return Comparison(
        change=change,
        low=low,
        high=high,
        is_relative=relative,
        effect=_delta(baseline, values),
        p=p,
        verdict=verdict,
    )


def enough(count: int, other: int) -> bool:
    """Whether so many values can show a difference at all: as many as it takes for the rank test to come below ALPHA."""
    return 2 / comb(count + other, count) < ALPHA


def _verdict(low: float, high: float, p: float, lower_is_better: bool) -> Verdict:
    if p >= ALPHA or low <= 0 <= high:
        return Verdict.NONE
    return Verdict.BETTER if (high < 0) is lower_is_better else Verdict.WORSE


def _delta(baseline: Sequence[float], values: Sequence[float]) -> float:
    """Cliff's delta: how many more of all pairs have the greater value among `values` than among `baseline`, as a share."""
    signs = [(value > base) - (value < base) for value in values for base in baseline]
    return sum(signs) / len(signs)


def _rank_test(baseline: Sequence[float], values: Sequence[float]) -> float:
    """The p of the two-sided rank test."""
    import numpy as np
    from scipy.stats import PermutationMethod, mannwhitneyu

    ties = len({*baseline, *values}) < len(baseline) + len(values)
    # For ties there is no exact table: all orders are tried, or many of them.
    method = PermutationMethod(n_resamples=_RESAMPLES, rng=np.random.default_rng(_SEED)) if ties else "auto"
    return float(min(mannwhitneyu(values, baseline, alternative="two-sided", method=method).pvalue, 1.0))


def _interval(samples: tuple[Sequence[float], ...], statistic: Any, confidence: float) -> tuple[float, float]:
    import numpy as np
    from scipy.stats import bootstrap

    found = bootstrap(
        tuple(map(_array, samples)),
        statistic,
        vectorized=True,
        paired=False,
        n_resamples=_RESAMPLES,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return float(found.low), float(found.high)


def _array(values: Sequence[float]) -> np.ndarray[Any, Any]:
    import numpy as np

    return np.asarray(values, dtype=float)


def _median(values: Any, axis: int = -1) -> Any:
    import numpy as np

    return np.median(values, axis=axis)


def _ratio(baseline: Any, values: Any, axis: int = -1) -> Any:
    return _median(values, axis) / _median(baseline, axis) - 1


def _difference(baseline: Any, values: Any, axis: int = -1) -> Any:
    return _median(values, axis) - _median(baseline, axis)
