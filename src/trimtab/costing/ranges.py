"""A quantity known between two bounds. Pure."""

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class Range:
    """Lowest and highest plausible value of a quantity that is never negative.

    Bounds are combined as if all that is uncertain were at its best, or at its worst, at once: a
    statement of what can happen, not a confidence interval.

    Attributes:
        low: Least value, at least 0.
        high: Greatest value, at least `low`.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        """Refuse bounds in the wrong order.

        Raises:
            ValueError: Not 0 <= low <= high.
        """
        if not 0 <= self.low <= self.high:
            raise ValueError(f"expected 0 <= low <= high, found {self.low} and {self.high}")

    @staticmethod
    def exactly(value: float) -> "Range":
        """A quantity that is known."""
        return Range(value, value)

    def __add__(self, other: "Range") -> "Range":
        """Sum of two quantities."""
        return Range(self.low + other.low, self.high + other.high)

    def times(self, other: "Range | float") -> "Range":
        """Product of two quantities."""
        factor = other if isinstance(other, Range) else Range.exactly(other)
        return Range(self.low * factor.low, self.high * factor.high)

    def over(self, other: "Range | float") -> "Range":
        """Quotient of two quantities; the least divisor gives the greatest quotient."""
        divisor = other if isinstance(other, Range) else Range.exactly(other)
        return Range(self.low / divisor.high, self.high / divisor.low)

    @property
    def middle(self) -> float:
        """Geometric mean of the bounds, which are often a factor apart."""
        return (self.low * self.high) ** 0.5

    def holds(self, value: float) -> bool:
        """Whether a value lies within the bounds."""
        return self.low <= value <= self.high
