"""Speculative steering: the expert drafts, the host verifies, the steered distribution decides."""

from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from trimtab.acceptance import acceptance, residual
from trimtab.steering.drafting import Draft, Drafter
from trimtab.steering.scores import SteeringProcessor


@final
class Speculation:
    """A way of decoding for transformers' `generate`, of one prompt (its `custom_generate`).

    The expert drafts a block of tokens, the host reads the block in one pass, and the scores of
    every place are steered and processed as they would be one token at a time. So a token is
    greedy's own choice, or is drawn from the same distribution (`acceptance`): drafts decide how
    many tokens a pass of the host gives, and nothing else.
    """

    def __init__(
        self, processor: SteeringProcessor, drafter: Drafter, room: int | None, streamer: Any
    ) -> None:
        """Prepare for one call of `generate`.

        Args:
            processor: Steers the scores; it is among the processors that `generate` gives back.
            drafter: Writes ahead.
            room: Positions that the host has, if bounded.
            streamer: Is told each token, if it is there.
        """
        self._processor = processor
        self._drafter = drafter
        self._room = room
        self._streamer = streamer

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        """Decode; as transformers' own methods do."""
        run = _Run(self._processor, logits_processor, generation_config, input_ids)
        cache, draft, stopped = model_kwargs["past_key_values"], Draft(), False
        longest: Any = generation_config.max_length
        longest = longest if self._room is None else min(longest, self._room)
        unread = input_ids
        self._tell(input_ids)
        while not stopped:
            keep = {"logits_to_keep": len(draft) + 1} if "logits_to_keep" in model_kwargs else {}
            block = torch.cat([unread, _row(draft.token_ids, unread)], 1)
            outputs = model(input_ids=block, past_key_values=cache, use_cache=True, **keep)
            if unread is input_ids:
                # Only now: a prompt need not be kept where layers forget it.
                cache.activate_past_recording()
            run.verify(outputs.logits[0, -len(draft) - 1 :], draft)
            stopped = self._write(run, draft, stopping_criteria)
            # All that is written has been read but the last token.
            cache.crop(min(0, run.ids.shape[1] - 1 - cache.get_seq_length()))
            unread = run.ids[:, -1:]
            if not stopped:
                room = longest - run.ids.shape[1] - 1
                written = self._processor.written(run.ids)
                draft = self._drafter.draft(written, room, run.propose)
        if self._streamer is not None:
            self._streamer.end()
        return run.result(cache)

    def _tell(self, token_ids: Tensor) -> None:
        if self._streamer is not None:
            self._streamer.put(token_ids.cpu())

    def _write(self, run: "_Run", draft: Draft, stopping_criteria: StoppingCriteriaList) -> bool:
        """Write tokens up to the first that was not drafted; whether the generation ends there."""
        for place in range(len(draft) + 1):
            kept = run.choose(draft, place)
            self._tell(run.ids[:, -1])
            if bool(stopping_criteria(run.ids, run.scores).all()):
                return True
            if not kept:
                break
        return False


@final
class _Run:
    """The tokens of one generation as they grow."""

    def __init__(
        self,
        processor: SteeringProcessor,
        processors: LogitsProcessorList,
        config: GenerationConfig,
        input_ids: Tensor,
    ) -> None:
        place = processors.index(processor)
        self._before = LogitsProcessorList(processors[:place])
        self._steer = processor
        self._after = LogitsProcessorList(processors[place + 1 :])
        self._config = config
        self._steered: Iterator[Tensor] = iter(())
        self._logits = torch.empty(0)
        # Any: transformers' own types ask for LongTensor, which no operation returns.
        self.ids: Any = input_ids
        self.scores: Any = ()
        self.logits: Any = ()

    def verify(self, logits: Tensor, draft: Draft) -> None:
        """Take what the host says at each place of a draft and after it, shape [places, vocab]."""
        ids: Any = torch.cat([self.ids, _row(draft.token_ids, self.ids)], 1)
        self._logits = logits.to(dtype=torch.float32, device=ids.device)
        first = self.ids.shape[1]
        raw = [
            self._before(ids[:, : first + place], one[None])
            for place, one in enumerate(self._logits)
        ]
        self._steered = self._steer.block(ids, raw)

    def choose(self, draft: Draft, place: int) -> bool:
        """Write the token of one place; whether it is the drafted one, so that the next counts.

        Places are asked for one after another, from the first.
        """
        scores = self._after(self.ids, next(self._steered))
        if self._config.return_dict_in_generate:
            self.scores += (scores,) if self._config.output_scores else ()
            self.logits += (self._logits[place : place + 1],) if self._config.output_logits else ()
        drafted = draft.token_ids[place] if place < len(draft) else None
        if not self._config.do_sample:
            token_id = int(scores[0].argmax())
        else:
            probs = scores[0].softmax(-1)
            token_id = _draw(probs) if drafted is None else _decided(probs, draft, place)
        self.ids = torch.cat([self.ids, _row([token_id], self.ids)], 1)
        return token_id == drafted

    def propose(self, drafted: Sequence[int], logits: Tensor) -> tuple[int, Tensor | None] | None:
        """Choose a draft's next token as this run would, were the expert all that counts.

        Returns:
            As for `Propose`.
        """
        ids: Any = torch.cat([self.ids, _row(drafted, self.ids)], 1)
        scores = self._after(ids, self._before(ids, logits[None].to(ids.device)))[0]
        if not bool(scores.isfinite().any()):
            return None
        if not self._config.do_sample:
            return int(scores.argmax()), None
        probs = scores.softmax(-1)
        return _draw(probs), probs

    def result(self, cache: Any) -> Any:
        """What `generate` returns."""
        if not self._config.return_dict_in_generate:
            return self.ids
        kept: Any = (self.scores or None, self.logits or None)
        return GenerateDecoderOnlyOutput(self.ids, *kept, past_key_values=cache)


def _decided(probs: Tensor, draft: Draft, place: int) -> int:
    """The drafted token, or what replaces it, so that it is drawn from probs either way."""
    token_id, proposal = draft.token_ids[place], draft.proposals[place]
    if float(torch.rand(())) < acceptance(probs, token_id, proposal):
        return token_id
    return _draw(residual(probs, token_id, proposal))


def _draw(probs: Tensor) -> int:
    return int(torch.multinomial(probs, 1))


def _row(token_ids: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor([list(token_ids)], dtype=like.dtype, device=like.device)
