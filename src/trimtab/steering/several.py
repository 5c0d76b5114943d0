"""Several adapters on one host: their predictors weighed together, the bare host among them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.backends.chat import ChatPrompt
from trimtab.blend import evidence_weights
from trimtab.steering.evidence import (
    Mixture,
    ReadPrompt,
    Said,
    evidence_positions,
    tokens_after,
)
from trimtab.steering.explain import Voice
from trimtab.steering.field import CHUNK_ROWS
from trimtab.steering.pieces import Pieces, at_once
from trimtab.steering.predictors import Rows
from trimtab.unembedding import Unembeds


@dataclass(frozen=True)
class Several:
    """One mixture over the predictors of several adapters.

    A mixture of predictors does not care where they come from: the host counts once, the others of
    all adapters stand side by side, and the evidence weighs them as it does those of one. So the
    bound holds too: on any text they cost at most -ln of the host's prior more than the host.

    Attributes:
        mixtures: One an adapter, at least one; each has the bare host as its first member.
    """

    mixtures: tuple[Mixture, ...]

    @property
    def prior(self) -> Tensor:
        """Trust before any evidence: [host, others of the first, others of the second, ...].

        The host has as much as the most cautious adapter leaves it; the adapters share the rest
        evenly, and so do the predictors of each.
        """
        priors = [mixture.prior for mixture in self.mixtures]
        host = torch.stack([prior[0] for prior in priors]).max()
        each = [prior[1:] / prior[1:].sum() for prior in priors]
        others = torch.cat(each) * (1.0 - host) / len(priors)
        return torch.cat([host[None], others])

    @property
    def runs_beside(self) -> bool:
        """Whether small models run beside the host."""
        return any(mixture.steering.live for mixture in self.mixtures)

    @property
    def share(self) -> float:
        """How readily the best predictor may change, as the most ready adapter has it."""
        return max(mixture.steering.blend.share for mixture in self.mixtures)

    def weigh(
        self, unembedding: Unembeds, prompt: ReadPrompt, chats: Sequence[ChatPrompt | None]
    ) -> Tensor:
        """How far a prompt speaks for each predictor, shape [predictors]; see `Mixture.weigh`.

        Args:
            unembedding: The host's.
            prompt: What the host has read.
            chats: How each adapter's small model reads it, where it is a chat.
        """
        return at_once(self.weighing(unembedding, prompt, chats))

    def weighing(
        self,
        unembedding: Unembeds,
        prompt: ReadPrompt,
        chats: Sequence[ChatPrompt | None],
        few: int | None = None,
    ) -> Pieces[Tensor]:
        """As `weigh`, in pieces; `few` is that of `predicting`."""
        if len(self.mixtures) == 1:
            alone = replace(prompt, chat=chats[0])
            return (yield from self.mixtures[0].weighing(unembedding, alone, few))
        asked = evidence_positions(replace(prompt, chat=chats[0]))
        if not asked:
            return self.prior
        scores = []
        for mixture, chat in zip(self.mixtures, chats, strict=True):
            read = replace(prompt, chat=chat)
            scores.append((yield from mixture.scoring(unembedding, read, asked, few)))
        joined = self._joined(scores)
        return evidence_weights(joined, self.prior, share=self.share)[:, -1].float()

    def read_ahead(self, prompt: ReadPrompt, chats: Sequence[ChatPrompt | None]) -> None:
        """As `Mixture.read_ahead` of each; chats as for `weigh`."""
        for mixture, chat in zip(self.mixtures, chats, strict=True):
            mixture.read_ahead(replace(prompt, chat=chat))

    def logprobs(self, rows: Sequence[Rows], weights: Tensor) -> Tensor:
        """The steered distribution, shape [rows, vocab].

        Args:
            rows: The same rows as each adapter's small models have read them.
            weights: Trust in each predictor at each row, shape [predictors, rows].
        """
        return self.mixed(self.said(rows), weights)

    def said(self, rows: Sequence[Rows]) -> tuple[Said, ...]:
        """What each adapter's predictors say; arguments are those of `logprobs`."""
        pairs = zip(self.mixtures, rows, strict=True)
        return tuple(mixture.said(asked) for mixture, asked in pairs)

    def mixed(self, said: Sequence[Said], weights: Tensor) -> Tensor:
        """The mixture of what all have said, shape [rows, vocab]; weights as for `logprobs`."""
        if len(said) == 1:
            return said[0].mixed(weights)
        parts = []
        for one, share in zip(said, self._shares(weights), strict=True):
            mixed = one.mixed(share / share.sum(0))
            parts.append(mixed + share.sum(0).log()[:, None].to(mixed.device))
        return torch.stack(parts).logsumexp(0)

    def voices(
        self, said: Sequence[Said], weights: Tensor, row: int, *, tells_text: bool
    ) -> tuple[Voice, ...]:
        """What each adapter had to say in one row, to explain the token there.

        Args:
            said: What all have said.
            weights: As for `logprobs`.
            row: Which row.
            tells_text: Whether the memories' text may be told.
        """
        found = []
        for mixture, one, share in zip(self.mixtures, said, self._shares(weights), strict=True):
            by_name = dict(zip(mixture.members, share[:, row].tolist(), strict=True))
            mounted = mixture.steering.memories.get("memory") if tells_text else None
            memory = mounted.memory if mounted else None
            found.append(Voice(mixture.steering.blend, by_name, one.found, row, memory))
        return tuple(found)

    def prequential(
        self,
        unembedding: Unembeds,
        prompt: ReadPrompt,
        tell: Callable[[Sequence[int], Tensor], None],
        few: Callable[[], int | None] = lambda: None,
    ) -> Pieces[None]:
        """The steered distribution of each of a prompt's tokens, given those before it, in pieces.

        The predictors are weighed anew after every token, as `evaluate` does it.

        Args:
            unembedding: The host's.
            prompt: What the host has read, with the states of all its tokens; no chat. Its row is
                read on by the small models between the pieces.
            tell: Called with some positions, ascending, and log-probabilities of the token after
                each, shape [positions, vocab].
            few: As for `predicting`, asked before each of these calls.
        """
        start: Tensor = self.prior
        positions = range(len(prompt.token_ids) - 1)
        for first in range(0, len(positions), CHUNK_ROWS):
            places = positions[first : first + CHUNK_ROWS]
            said = []
            for mixture in self.mixtures:
                found = yield from mixture.saying(unembedding, prompt, places, few())
                said += [one for _, one in found]
            scores = self._joined([one.of_tokens(tokens_after(prompt, places)) for one in said])
            is_text = [bool(prompt.token_bytes[place + 1]) for place in places]
            # A token that is no text is no evidence.
            scores = torch.where(torch.tensor(is_text), scores, 0.0)
            columns = evidence_weights(scores, self.prior, share=self.share, start=start)
            start, weights = columns[:, -1], columns[:, :-1].float()
            tell(places, self.mixed(said, weights))
            yield

    def forget(self, row: int) -> None:
        """Let go of what the small models keep of a row."""
        for mixture in self.mixtures:
            if mixture.steering.live:
                mixture.steering.live.forget(row)

    def _shares(self, weights: Tensor) -> list[Tensor]:
        """The weights of each mixture's members: the host's is divided among the mixtures."""
        sizes = [len(mixture.members) - 1 for mixture in self.mixtures]
        host = weights[:1] / len(sizes)
        return [torch.cat([host, others]) for others in weights[1:].split(sizes)]

    def _joined(self, scores: Sequence[Tensor]) -> Tensor:
        """What all predictors gave to tokens, [predictors, tokens], the host once."""
        return torch.cat([scores[0][:1], *(score[1:] for score in scores)])
