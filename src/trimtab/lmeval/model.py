"""A host, bare or steered, as a model of lm-evaluation-harness."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import Any, final

from lm_eval.models import huggingface
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from trimtab.backends.hf import HFModel
from trimtab.errors import ModelError
from trimtab.steering.answers import AnswerScore, alternatives_nats, score_answers, score_text
from trimtab.steering.evidence import Mixture
from trimtab.steering.outgrown import Outgrown, refuse_outgrown
from trimtab.steering.processor import steered_by
from trimtab.types import Advance, Progress, silent

HFLM: Any = huggingface.HFLM
"""lm-eval's registration hides the class from type checkers."""

Encoded = tuple[Any, list[int], list[int]]
"""A question as lm-eval hands it over: its text, its context's tokens, its answer's tokens."""


@final
class _Told:
    """Takes the place of lm-eval's cache, which is told of every request as it is answered."""

    def __init__(self, advance: Advance) -> None:
        """Say so to a progress display."""
        self._advance = advance

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """One more request is answered."""
        del attr, req, res
        self._advance(1)


@final
class SteeredLM(HFLM):
    """Answers lm-eval's requests with a host that is steered, or with the host itself.

    Without a mixture every figure is that of lm-eval's own model of transformers' hosts, which
    this class inherits. With one, `loglikelihood` is what the steered `generate` would give the
    answer after the context (answers to one context share what they have together, see
    `alternatives_nats`), `loglikelihood_rolling` what `evaluate` gives a document, and
    `generate_until` runs the steered `generate` itself.
    """

    def __init__(
        self,
        host: HFModel,
        mixture: Mixture | None = None,
        *,
        batch_size: int = 8,
        progress: Progress = silent,
    ) -> None:
        """Take a host that is open.

        Args:
            host: A decoder-only model; its live model is read and left as it is.
            mixture: What steers it; None for nothing.
            batch_size: Requests that the host reads at once.
            progress: Shows the requests.

        Raises:
            ModelError: The host is an encoder-decoder.
        """
        if host.is_encoder_decoder:
            raise ModelError(
                f"{host.ref} reads a source and writes a target, and tasks are asked of models"
                " that continue a text",
                hint="evaluate an encoder-decoder on --data with source and target",
            )
        # lm-eval gives a tokenizer a padding token, and the host's own is to stay as it is.
        tokenizer = copy.deepcopy(host.tokenizer)
        super().__init__(
            pretrained=host.model, tokenizer=tokenizer, backend="causal", batch_size=batch_size
        )
        self._host = host
        self._mixture = mixture
        self._progress = progress
        self._outgrown = Outgrown()

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Natural-log likelihood of each answer given its context, and whether it is greedy."""
        del disable_tqdm
        with self._shown("answers", len(requests)):
            return super().loglikelihood(requests, disable_tqdm=True)

    @contextmanager
    def _shown(self, label: str, total: int) -> Iterator[None]:
        """Show requests as they are answered."""
        before = self.cache_hook
        with self._progress(label, total) as advance:
            self.cache_hook = _Told(advance)
            try:
                yield
            finally:
                self.cache_hook = before

    def _loglikelihood_tokens(
        self, requests: list[Encoded], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        del disable_tqdm
        if self._mixture is None:
            return super()._loglikelihood_tokens(requests, True, override_bs)
        # Answers of one context are read together, and the context's evidence is weighed once.
        cut = [self._cut(context, answer) for _, context, answer in requests]
        order = sorted(range(len(cut)), key=lambda number: cut[number])
        found: dict[int, tuple[float, bool]] = {}
        for context, numbers in groupby(order, key=lambda number: cut[number][0]):
            same, scores = list(numbers), list[AnswerScore]()
            for first in range(0, len(same), int(self.batch_size)):
                answers = [cut[n][1] for n in same[first : first + int(self.batch_size)]]
                scores += score_answers(self._host, self._mixture, context, answers)
            # A task file has no solved questions: nothing but the prior says whom to trust.
            nats = alternatives_nats(scores, self._mixture.prior).tolist()
            for number, score, own in zip(same, scores, nats, strict=True):
                found[number] = (own, score.is_greedy)
                self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
        return [found[number] for number in range(len(requests))]

    def _cut(self, context: Sequence[int], answer: Sequence[int]) -> tuple[list[int], list[int]]:
        """As lm-eval does, leave out the beginning of what is longer than the host can read."""
        room = max(self.max_length + 1 - len(answer), 1)
        return list(context)[-room:], list(answer)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Natural-log likelihood of each whole text."""
        del disable_tqdm
        with self._shown("texts", len(requests)):
            if self._mixture is None:
                return super().loglikelihood_rolling(requests, disable_tqdm=True)
            found = []
            for request in requests:
                found.append(self._text_nats(request.args[0], self._mixture))
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def _text_nats(self, text: str, mixture: Mixture) -> float:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        total, weights = 0.0, None
        for context, ids in map(make_disjoint_window, windows):
            read = [*context, *ids]
            logprobs, weights = score_text(self._host, mixture, read, len(context), weights)
            total += float(logprobs.sum())
        return total

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Continuations, each up to the first of its stop strings."""
        del disable_tqdm
        mixture = self._mixture
        steering = nullcontext(Outgrown()) if mixture is None else steered_by(self._host, mixture)
        with self._shown("continuations", len(requests)), steering as self._outgrown:
            return super().generate_until(requests, disable_tqdm=True)

    def _model_generate(self, *args: Any, **options: Any) -> Any:
        found = super()._model_generate(*args, **options)
        refuse_outgrown(self._outgrown)
        return found
