"""What a request asks of the engine, and what the engine tells it. No torch at run time."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, final

from trimtab.serving.choose import Choosing

if TYPE_CHECKING:
    from trimtab.backends.chat import ChatPrompt
    from trimtab.steering.explain import Explanation
    from trimtab.steering.several import Several

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Likely:
    """A token with the log-probability that the steered distribution gave it.

    Attributes:
        token_id: The token.
        logprob: In nats; None for a prompt's first token, which nothing predicts.
        top: The likeliest tokens there and their log-probabilities, likeliest first.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """The next piece of one answer.

    Attributes:
        choice: Which of the request's answers.
        text: Text that is certain by now; it may be empty.
        tokens: Where they were asked for, the tokens of this piece.
        finish: Why the answer ends here; None if it goes on.
        trace: Where they were asked for, explanations of the tokens of this piece.
    """

    choice: int
    text: str
    tokens: tuple[Likely, ...] = ()
    finish: Finish | None = None
    trace: "tuple[Explanation, ...]" = ()


@dataclass(frozen=True)
class Done:
    """All answers of a request are complete.

    Attributes:
        prompt_tokens: That were read, each prompt once.
        completion_tokens: That were written, end tokens not counted.
    """

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Failed:
    """A request that cannot be answered, or not to its end.

    Attributes:
        error: What happened.
    """

    error: Exception


Event = Piece | Done | Failed


class TimeUp(Exception):
    """A request has taken longer than it may."""


class Busy(Exception):
    """The queue has no room for a request of this owner.

    Attributes:
        retry_after_sec: When to ask again.
    """

    def __init__(self, retry_after_sec: int) -> None:
        """Keep when to ask again."""
        super().__init__("the queue is full")
        self.retry_after_sec = retry_after_sec


class UnknownModel(Exception):
    """A request names a model or an adapter that is not served."""


class Closing(Exception):
    """The server is shutting down and takes no more requests."""


@dataclass(frozen=True)
class Steered:
    """What steers a request.

    Attributes:
        several: The adapters' mixtures.
        chats: How each adapter's small model reads the prompt, where it is a chat.
    """

    several: "Several"
    chats: "tuple[ChatPrompt | None, ...]"


@dataclass(frozen=True)
class Prompt:
    """A text to go on from.

    Attributes:
        token_ids: What the host reads, at least one token.
        shown_from: Tokens before are not the user's, and no echo shows them.
    """

    token_ids: tuple[int, ...]
    shown_from: int = 0


@dataclass(frozen=True)
class Options:
    """How a request wants its answers.

    Attributes:
        max_tokens: Longest answer.
        answers: How many to each prompt.
        choosing: How tokens are chosen.
        seed: Of sampling; answers differ from each other.
        stop: Strings that end an answer and are cut off.
        echo: Begin each answer with its prompt.
        top_logprobs: Likeliest tokens to tell beside each token; None tells no log-probabilities.
        tells_end: Tell the token that ends an answer too, where log-probabilities are told.
        trace: What to tell of how each token came about; `text` is with what a memory found.
    """

    max_tokens: int
    answers: int = 1
    choosing: Choosing = field(default_factory=Choosing)
    seed: int = 0
    stop: tuple[str, ...] = ()
    echo: bool = False
    top_logprobs: int | None = None
    tells_end: bool = False
    trace: Literal["none", "bare", "text"] = "none"


@final
class Job:
    """A request on its way through the engine."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        options: Options,
        *,
        steered: Steered | None,
        tell: Callable[[Event], None],
        time_limit_sec: float,
        owner: str = "",
    ) -> None:
        """Prepare a request.

        Args:
            prompts: At least one; choice number = prompt * answers + answer.
            options: How it wants its answers.
            steered: What steers it; None for the host alone.
            tell: Called by the engine with each event; must not wait.
            time_limit_sec: From now on, time in the queue included.
            owner: Whose it is: owners take turns.
        """
        self.prompts = tuple(prompts)
        self.options = options
        self.steered = steered
        self.owner = owner
        self.began_sec = time.monotonic()
        self.deadline_sec = self.began_sec + time_limit_sec
        self.first_text_sec: float | None = None
        self.next_prompt = 0
        self.open_rows = len(prompts) * options.answers
        self.completion_tokens = 0
        self.has_ended = False
        self._tell = tell
        self._cancelled = threading.Event()

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    @property
    def cancelled(self) -> bool:
        """Nobody waits for it any more."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Ask the engine, from any thread, to let go of it."""
        self._cancelled.set()

    def tell(self, event: Event) -> None:
        """Pass an event on; a reader that has gone is a cancelled request."""
        if self.has_ended or self.cancelled:
            return
        self.has_ended = isinstance(event, Done | Failed)
        try:
            self._tell(event)
        except RuntimeError:
            # The event loop that would have read it is closed.
            self.cancel()
