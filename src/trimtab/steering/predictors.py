"""What a mounted adapter makes of a host's next-token scores, whatever runs the host."""

import codecs
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from trimtab.backends.chat import ChatPrompt
from trimtab.backends.live import Live, LiveReading
from trimtab.blend import BlendWeights, evidence_weights, log_linear, mix, mixture_logprobs
from trimtab.carriers.head import MountedHead
from trimtab.carriers.memory import last_bytes
from trimtab.carriers.recall import Answer, MountedMemory
from trimtab.steering.rows import families, prior_of, with_memory
from trimtab.steering.scoring import CANDIDATE_NATS, tail_of, with_tail
from trimtab.store.adapter_schema import Blend
from trimtab.unembedding import Unembedding

EVIDENCE_TOKENS = 256
"""Last tokens of a prompt that count as evidence: each needs a row of logits, and by then the
evidence has long decided where predictors differ."""

CHUNK_POSITIONS = 16
"""Prompt positions judged at once: 16 rows of 262,144 tokens are 17 MB in float32, and every
predictor needs as much again."""

_GATE_LIMIT = 1 - 1e-6


@dataclass(frozen=True)
class Rows:
    """Positions at which a host is about to choose a token.

    Attributes:
        logits: The host's own, after cap and scale, shape [rows, vocab].
        hidden: The states that gave them, shape [rows, hidden].
        contexts: All bytes of text before each row's next token; in a chat, of the message and the
            answer.
        questions: How the expert has read the contexts: readings with the questions asked of each,
            one after another one a row; empty without an expert.
        alone: Each row is steered as if it had been asked alone. Otherwise all share their
            candidates, so that what is far below every row's likeliest counts as tail.
    """

    logits: Tensor
    hidden: Tensor
    contexts: tuple[bytes, ...]
    questions: tuple[tuple[LiveReading, range], ...] = ()
    alone: bool = False

    def one_by_one(self) -> "Iterator[Rows]":
        """Each row without the others."""
        asked = (
            ((reading, range(q, q + 1)),)
            for reading, questions in self.questions
            for q in questions
        )
        for row, context in enumerate(self.contexts):
            here = slice(row, row + 1)
            yield Rows(self.logits[here], self.hidden[here], (context,), next(asked, ()))


@final
@dataclass(frozen=True)
class Steering:
    """The chosen carriers of an adapter, seated on one host.

    They make several predictors, the bare host among them; what is chosen from is their mixture,
    weighed by how well each predicted the prompt. The predictors are those of the row of
    `evaluate` with the same carriers.

    Attributes:
        strength: How far to follow the carriers, in [0, 2]; multiplies the head's shift, the
            memory's gate, and each blend's distance from the host alone.
        head: Shifts the logits.
        memory: Is mixed in, by its gate.
        live: Expert and reference beside the host.
        blend: How predictors are made and weighed.
    """

    strength: float
    head: MountedHead | None = None
    memory: MountedMemory | None = None
    live: Live | None = None
    blend: Blend = field(default_factory=Blend)

    @cached_property
    def predictors(self) -> tuple[str, ...]:
        """Names of the predictors, `host` first."""
        rows = families(self.blend)
        light = "+".join(name for name in ("head", "memory") if getattr(self, name) is not None)
        if self.live is None:
            return rows[light or "host"]
        if light in ("", "head+memory"):
            return rows["all" if light else "live"]
        if light == "head":
            return (*rows["live"], "head")
        return (*rows["live"], *with_memory("host", self.blend), *self._with_live)

    @property
    def _with_live(self) -> tuple[str, ...]:
        bases = self.blend.live_with_memory
        return tuple(name for base in bases for name in with_memory(base, self.blend))

    @property
    def prior(self) -> Tensor:
        """Trust in each predictor before any evidence, shape [predictors]."""
        return prior_of(self.predictors, self.blend)

    def logprobs(self, rows: Rows) -> Tensor:
        """What each predictor says.

        Returns:
            Natural-log probabilities in float32, shape [predictors, rows, vocab]; each sums to
            one over the vocabulary.
        """
        logits = rows.logits.float()
        found = {"host": logits.log_softmax(-1)}
        if self.head is not None:
            # With a host spread over devices, its head need not be where its scores are.
            shift = self.head.shift(rows.hidden.to(self.head.rows.device)).to(logits.device)
            found["head"] = (logits + self.strength * shift).log_softmax(-1)
        if self.live is not None:
            found |= live_logprobs(self.live, found["host"], rows, self.blend, self.strength)
        if self.memory is not None:
            # The search over keys runs on the CPU, and the gate reads its results.
            hidden, before = rows.hidden.cpu(), last_bytes(rows.contexts)
            asked: list[tuple[tuple[str, ...], Answer]] = [
                (("host", "head"), self.memory.ask(hidden, before))
            ]
            if self.live is not None:
                # Where the reference runs anyway its own state asks, which no map blurs.
                small = [s for read, q in rows.questions for s in read.reference_states(q)]
                own = self.memory.ask(hidden, before, small)
                asked.append((self.blend.live_with_memory, own))
            for bases, answer in asked:
                for base in bases:
                    if base in found and set(with_memory(base, self.blend)) & set(self.predictors):
                        found |= self._remember(answer, base, found[base])
        return torch.stack([found[name] for name in self.predictors])

    def ask(
        self,
        contexts: Sequence[bytes],
        host_ids: Sequence[Sequence[int]],
        host_lasts: Sequence[int | None],
        chats: Sequence[ChatPrompt] = (),
    ) -> tuple[tuple[LiveReading, range], ...]:
        """Let the expert read on, where there is one: row i continues row i of the call before.

        Args:
            contexts: All text of each row; in chats, the answer so far.
            host_ids: The host's tokens of that text.
            host_lasts: The last token that the host has written, in each row; None before.
            chats: What each row answers.

        Returns:
            The questions of `Rows`.
        """
        if self.live is None:
            return ()
        starts = [chat.small_ids for chat in chats] or [None] * len(contexts)
        readings = (
            self.live.read(
                [readable(context)], host_ids=[ids], host_lasts=[last], start=start, row=row
            )
            for row, (context, ids, last, start) in enumerate(
                zip(contexts, host_ids, host_lasts, starts, strict=True)
            )
        )
        return tuple((reading, range(1)) for reading in readings)

    def ask_block(
        self,
        contexts: Sequence[bytes],
        host_ids: Sequence[Sequence[int]],
        host_lasts: Sequence[int | None],
        chat: ChatPrompt | None,
    ) -> tuple[tuple[LiveReading, range], ...]:
        """As `ask`, of several places of row 0: each context goes on from the one before."""
        if self.live is None:
            return ()
        reading = self.live.read(
            [readable(context) for context in contexts],
            host_ids=host_ids,
            host_lasts=host_lasts,
            start=chat.small_ids if chat else None,
            row=0,
        )
        self.live.foresee(reading)
        return ((reading, range(len(contexts))),)

    def _remember(self, answer: Answer, base: str, logprobs: Tensor) -> dict[str, Tensor]:
        steered, said = logprobs.cpu(), answer.probs(logprobs.shape[-1]).log()
        shifts = with_memory(base, self.blend)
        gates = answer.gates(steered, tuple(shifts.values()))
        found = {}
        for name, gate in zip(shifts, gates, strict=True):
            followed = (gate * self.strength).clamp(max=_GATE_LIMIT)[:, None]
            # Entries whose continuation no host token begins leave their share unused.
            mixed = mix(steered, said, followed).log_softmax(-1)
            found[name] = mixed.to(logprobs.device)
        return found


def blend_at(weights: BlendWeights, strength: float) -> BlendWeights:
    """Go from the host alone (strength 0) through a blend (1) and beyond it."""
    return BlendWeights(
        1.0 + strength * (weights.host - 1.0),
        strength * weights.expert,
        strength * weights.reference,
    )


def live_logprobs(
    live: Live, host_logprobs: Tensor, rows: Rows, blend: Blend, strength: float
) -> Mapping[str, Tensor]:
    """Every blend of host, expert and reference.

    Tokens that stand for no text (the end, above all) keep the host's own probability: the pair
    says nothing of them. Tokens far below the host's likeliest are one tail, whose mass is
    blended as a whole and dealt out in the host's proportions.

    Args:
        live: Expert and reference.
        host_logprobs: The host's own, shape [rows, vocab].
        rows: What is asked.
        blend: The blends.
        strength: How far to follow each.

    Returns:
        Natural-log probabilities by blend, each of shape [rows, vocab].
    """
    if rows.alone and len(rows.contexts) > 1:
        each = [
            live_logprobs(live, host_logprobs[row : row + 1], one, blend, strength)
            for row, one in enumerate(rows.one_by_one())
        ]
        return {name: torch.cat([found[name] for found in each]) for name in each[0]}
    device, host_logprobs = host_logprobs.device, host_logprobs.cpu()
    known = live.alignment.is_known
    text = host_logprobs.masked_fill(~known, -torch.inf)
    normaliser = text.logsumexp(-1, keepdim=True)
    text = text - normaliser
    token_ids = torch.nonzero((text > text.amax(-1, keepdim=True) - CANDIDATE_NATS).any(0))[:, 0]
    chosen = text[:, token_ids]
    tail = tail_of(chosen.exp()).log()
    host = torch.cat([chosen, tail], 1)
    expert, reference = (with_tail(probs) for probs in _scored(live, rows, chosen.exp(), token_ids))
    found = {}
    for name, weights in blend.live.items():
        by = blend_at(BlendWeights(*weights), strength)
        blended = log_linear(host, expert, reference, by)
        full = text + (blended[:, -1:] - tail)
        full[:, token_ids] = blended[:, :-1]
        full = torch.where(known, full.log_softmax(-1) + normaliser, host_logprobs)
        found[name] = full.to(device)
    return found


def _scored(live: Live, rows: Rows, host_probs: Tensor, token_ids: Tensor) -> list[Tensor]:
    """Probabilities of expert and reference, each of host_probs' shape."""
    sizes = [len(questions) for _, questions in rows.questions]
    pairs = [
        live.score(reading, questions, probs, token_ids)
        for (reading, questions), probs in zip(rows.questions, host_probs.split(sizes), strict=True)
    ]
    return [torch.cat(side).float() for side in zip(*pairs, strict=True)]


def text_before(token_bytes: Sequence[bytes | None]) -> bytes:
    """The text that tokens stand for; special tokens contribute nothing."""
    return b"".join(text for text in token_bytes if text)


def text_ids(
    token_ids: Tensor, token_bytes: Sequence[bytes | None], start: int, end: int
) -> list[int]:
    """The tokens from start to end that stand for text."""
    part = zip(token_ids[start:end].tolist(), token_bytes[start:end], strict=True)
    return [token_id for token_id, text in part if text]


def last_text(token_ids: Tensor, token_bytes: Sequence[bytes | None], end: int) -> int | None:
    """The token before `end`, if it stands for text."""
    return int(token_ids[end - 1]) if end and token_bytes[end - 1] else None


def readable(context: bytes) -> bytes:
    """Replace bytes that are not UTF-8, which a host may write and a tokenizer cannot read.

    A character that the end cuts stays cut: its other bytes may follow.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return decoder.decode(context).encode() + decoder.getstate()[0]


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt that a host has read, without padding.

    Attributes:
        token_ids: Shape [seq].
        token_bytes: Bytes of each token, None for special ones.
        hidden: The host's states, shape [states, hidden], of the last `states` tokens (fewer
            than seq where the first tokens were read by an earlier call).
        chat: Where it is a chat: what is the message, and how the small models read it.
    """

    token_ids: Tensor
    token_bytes: tuple[bytes | None, ...]
    hidden: Tensor
    chat: ChatPrompt | None = None


def prompt_weights(steering: Steering, unembedding: Unembedding, prompt: ReadPrompt) -> Tensor:
    """How far a prompt itself speaks for each predictor.

    Predictors are weighed by what each gave to the prompt's tokens of text, each given the
    tokens before it (`evidence_weights`). On text that the adapter does not help, the host takes
    over. In a chat the user's message alone is text.

    Args:
        steering: What would steer.
        unembedding: The host's.
        prompt: What the host has read.

    Returns:
        Weights that sum to one, shape [predictors]; the prior without evidence.
    """
    first = len(prompt.token_ids) - len(prompt.hidden)
    text, opening = range(len(prompt.token_ids)), None
    if prompt.chat:
        text, opening = prompt.chat.message, prompt.chat.opening_ids
    asked = [
        position
        for position in range(first, len(prompt.token_ids) - 1)
        if position + 1 in text and prompt.token_bytes[position + 1]
    ][-EVIDENCE_TOKENS:]
    if not asked:
        return steering.prior
    contexts = tuple(text_before(prompt.token_bytes[text.start : p + 1]) for p in asked)
    reading = None
    if steering.live:
        ids = [text_ids(prompt.token_ids, prompt.token_bytes, text.start, p + 1) for p in asked]
        lasts = [last_text(prompt.token_ids, prompt.token_bytes, p + 1) for p in asked]
        reading = steering.live.read(
            [readable(c) for c in contexts], host_ids=ids, host_lasts=lasts, start=opening
        )
    scores = []
    for begin in range(0, len(asked), CHUNK_POSITIONS):
        part = range(begin, min(begin + CHUNK_POSITIONS, len(asked)))
        positions = torch.tensor(asked[part.start : part.stop])
        hidden = prompt.hidden[(positions - first).to(prompt.hidden.device)]
        hidden = hidden.to(unembedding.weight.device)
        rows = Rows(
            unembedding.logits(hidden),
            hidden,
            contexts[part.start : part.stop],
            ((reading, part),) if reading else (),
        )
        scores.append(_logprobs_of(steering.logprobs(rows), prompt.token_ids[positions + 1]))
    return evidence_weights(torch.cat(scores, 1), steering.prior, share=steering.blend.share)[
        :, -1
    ].float()


def _logprobs_of(logprobs: Tensor, token_ids: Tensor) -> Tensor:
    """What each predictor gives to one token a row, shape [predictors, rows]."""
    chosen = token_ids.to(logprobs.device)[None, :, None].expand(len(logprobs), -1, 1)
    return logprobs.gather(2, chosen)[:, :, 0].cpu()


def mixed_logprobs(steering: Steering, rows: Rows, weights: Tensor) -> Tensor:
    """The steered distribution: the predictors' mixture.

    Args:
        steering: What steers.
        rows: What is asked.
        weights: Trust in each predictor at each row, shape [predictors, rows].

    Returns:
        Natural-log probabilities, shape [rows, vocab]; tokens that the host's logits forbid
        (-inf) stay forbidden.
    """
    mixed = mixture_logprobs(steering.logprobs(rows), weights[..., None])
    return mixed.masked_fill(rows.logits.isneginf(), -torch.inf)
