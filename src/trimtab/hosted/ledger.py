"""What calls of an API have used and cost: each answered call once."""

from dataclasses import dataclass
from typing import final


def counted(count: int, what: str) -> str:
    """A number of things in words, one or several."""
    return f"{count} {what}{'' if count == 1 else 's'}"


@dataclass(frozen=True)
class Usage:
    """Tokens of a call, as the API counts them.

    Attributes:
        prompt_tokens: Read.
        completion_tokens: Written.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.prompt_tokens + self.completion_tokens

    def in_words(self, calls: int) -> str:
        """Calls and their tokens."""
        return (
            f"{counted(calls, 'call')}, {self.prompt_tokens:,} prompt and"
            f" {self.completion_tokens:,} completion tokens"
        )

    def __add__(self, other: "Usage") -> "Usage":
        """The tokens of both."""
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens.

    Attributes:
        prompt: Of those that are read.
        completion: Of those that are written.
    """

    prompt: float
    completion: float

    def of(self, usage: Usage) -> float:
        """US dollars for a number of tokens."""
        paid = usage.prompt_tokens * self.prompt + usage.completion_tokens * self.completion
        return paid / 1e6

    def in_words(self, usage: Usage) -> str:
        """The same, to a hundredth of a cent."""
        return f"${self.of(usage):.4f}"


@final
class Ledger:
    """Counts the calls of a run.

    Only answers that have come whole are counted, also those that lack what was asked for. What an
    API charges for an answer that was cut off on its way is not known here: such calls are counted
    as failures.
    """

    def __init__(self, budget_tokens: int | None = None) -> None:
        """Begin with nothing used.

        Args:
            budget_tokens: Most tokens that the run may use; None for no bound.
        """
        self._budget_tokens = budget_tokens
        self.usage = Usage()
        self.calls = 0
        self.kept_calls = 0
        self.failures = 0
        self.uncounted_calls = 0

    def book(self, usage: Usage | None, estimate: Usage | None = None) -> None:
        """Count an answer.

        Args:
            usage: What it took; None where the API has not said.
            estimate: What is booked there (default: nothing).
        """
        self.calls += 1
        if usage is None:
            self.uncounted_calls += 1
            # A budget that booked nothing would be none.
            usage = estimate or Usage()
        self.usage += usage

    def allows(self, usage: Usage) -> bool:
        """Whether a call that may use so much stays within the budget."""
        if self._budget_tokens is None:
            return True
        return self.usage.tokens + usage.tokens <= self._budget_tokens

    def summary(self, price: Price | None = None) -> str:
        """What was used, in words."""
        parts = [self.usage.in_words(self.calls)]
        if price is not None:
            parts.append(price.in_words(self.usage))
        if self.kept_calls:
            parts.append(f"{counted(self.kept_calls, 'answer')} from the cache")
        if self.failures:
            repeated = counted(self.failures, "call")
            parts.append(f"{repeated} repeated, which the API may charge as well")
        if self.uncounted_calls:
            uncounted = counted(self.uncounted_calls, "call")
            parts.append(f"{uncounted} with estimated tokens, which the API did not count")
        return "; ".join(parts)
