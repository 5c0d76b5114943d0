"""What a comparison finds out about each method; the words of comparison.json."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

SCHEMA = 4
"""Version of comparison.json and of the files in `methods`."""

Status = Literal["measured", "estimated"]


class Part(BaseModel):
    """Base of all parts: frozen, no unknown keys, no number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TextScore(Part):
    """What a method pays for one document.

    Attributes:
        nats: Negative log-likelihood, in nats.
        bytes: Bytes of the scored tokens.
    """

    nats: float
    bytes: int


class Step(Part):
    """A piece of work that a method takes before it can be used.

    Attributes:
        name: What it is.
        flops: Floating-point operations, as `trimtab.costing` counts them.
        sec: Seconds of this machine by the clock.
        cpu_sec: Processor-seconds of all threads; far below `sec` the machine did other work.
        peak_bytes: Greatest memory of the process during it; where it was not run what it had
            when asked and what training would add, by sizes, and else None.
        is_estimated: Whether the seconds follow from measured throughput and were not taken.
        serves_all_hosts: Whether it is done once, whatever the number of hosts.
    """

    name: str
    flops: float
    sec: float
    cpu_sec: float | None = None
    peak_bytes: int | None = None
    is_estimated: bool = False
    serves_all_hosts: bool = False


class Use(Part):
    """What using a method costs.

    Attributes:
        sec_per_token: Seconds of this machine for a generated token, with its share of what the
            prompt takes.
        prompt_tokens: Tokens of the prompt that was timed, with what the method adds to it.
        answer_tokens: Tokens that were generated.
        peak_bytes: Greatest memory of the process meanwhile.
        sec: Seconds of the whole timed generation by the clock.
        cpu_sec: Processor-seconds of it.
    """

    sec_per_token: float
    prompt_tokens: int
    answer_tokens: int
    peak_bytes: int
    sec: float | None = None
    cpu_sec: float | None = None


class Unfinished(Part):
    """What is known of a method while it is measured, so that an interruption loses nothing.

    Attributes:
        key: As of the result.
        texts: Scored documents by kind, the domain's under the empty one, in order.
        answers: Answers to the first questions.
        solved: What each predictor gives to the right answers of the first solved questions, in
            nats, by question.
    """

    key: str
    texts: dict[str, tuple[TextScore, ...]] = {}
    answers: tuple[int | str, ...] = ()
    solved: tuple[tuple[float, ...], ...] = ()


class MethodResult(Part):
    """Everything about one method.

    Attributes:
        method: Its name.
        key: Names all that decides the result; a kept result with another key is not used.
        status: Whether it was run, or its cost was estimated only.
        reason: Why it, or the timing of its use, was not run; "" where all was.
        domain: Domain text, by document; empty where it was not run.
        general: General text, by kind and document.
        answers: What it answered to each question of the task: index of the chosen answer, or
            the text that it wrote; empty without a task.
        trust: How far each of its predictors was trusted for an answer, by name, as the solved
            questions have taught; empty without a task, and where there is one predictor.
        steps: What it takes before use.
        use: What using it costs; None where that was not timed.
        artefact_bytes: Size of what has to be kept to use it.
        further_hosts: What another host takes: nothing, a mount, or the training again.
        note: What is to be known of how it was run.
    """

    method: str
    key: str
    status: Status
    reason: str = ""
    domain: tuple[TextScore, ...] = ()
    general: dict[str, tuple[TextScore, ...]] = {}
    answers: tuple[int | str, ...] = ()
    trust: dict[str, float] = {}
    steps: tuple[Step, ...] = ()
    use: Use | None = None
    artefact_bytes: int | None = None
    further_hosts: str = ""
    note: str = ""

    @property
    def writes_text(self) -> bool:
        """Whether it goes on with a text; what is measured and scores none answers alone."""
        return bool(self.domain)

    @property
    def is_whole(self) -> bool:
        """Whether nothing of it is left to measure."""
        return self.status == "measured" and self.use is not None

    @property
    def flops(self) -> float:
        """Operations before use."""
        return sum(step.flops for step in self.steps)

    @property
    def sec(self) -> float:
        """Seconds before use, of one device."""
        return sum(step.sec for step in self.steps)

    @property
    def is_sec_estimated(self) -> bool:
        """Whether a part of the seconds was not taken by the clock."""
        return any(step.is_estimated for step in self.steps)

    @property
    def peak_bytes(self) -> int | None:
        """Greatest memory of making and using it; None where nothing is known of it."""
        found = [step.peak_bytes for step in self.steps if step.peak_bytes is not None]
        return max([*found, *([self.use.peak_bytes] if self.use else [])], default=None)
