"""Samples and their statistics.

May live here: what was timed in one place at one size, and numbers computed from it. May not: how it was timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, pstdev


@dataclass(frozen=True)
class Cell:
    """What was measured for one size, one system, in one place.

    Attributes:
        rounds: per round and rank the samples in seconds.
        wrong: number of wrong elements over all ranks and rounds; None when unchecked.
    """

    rounds: tuple[tuple[tuple[float, ...], ...], ...]
    wrong: int | None

    def round(self, index: int) -> list[float]:
        """Return the samples of a round, slowest rank each."""
        return [max(sample) for sample in zip(*self.rounds[index], strict=True)]

    @property
    def samples(self) -> list[float]:
        """All samples, slowest rank each."""
        return [sample for index in range(len(self.rounds)) for sample in self.round(index)]

    @property
    def of_ranks(self) -> list[list[float]]:
        """All samples of each rank."""
        return [[sample for each in ranks for sample in each] for ranks in zip(*self.rounds, strict=True)]

    @property
    def seconds(self) -> float:
        """Median over all samples."""
        return median(self.samples)

    def ratio(self, base: Cell) -> float:
        """How many times longer than ``base``: the median over rounds of the ratio of the rounds' medians."""
        return median(median(self.round(index)) / median(base.round(index)) for index in range(min(len(self.rounds), len(base.rounds))))

    def spread(self) -> Spread:
        """Return how the samples are spread."""
        return Spread.of(self.samples)


@dataclass(frozen=True)
class Spread:
    """Statistics of samples, in seconds, as nccl-tests computes them per iteration; ``cv`` is the standard deviation over the mean."""

    least: float
    most: float
    mean: float
    p50: float
    p95: float
    p99: float
    stdev: float

    @property
    def cv(self) -> float:
        """Coefficient of variation."""
        return self.stdev / self.mean if self.mean else 0.0

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Compute them; percentiles are nearest ranks."""
        ordered = sorted(samples)
        number = len(ordered)
        p95, p99 = (ordered[min(number - 1, (number * percent + 99) // 100 - 1)] for percent in (95, 99))
        return cls(ordered[0], ordered[-1], fmean(ordered), ordered[number // 2], p95, p99, pstdev(ordered))
