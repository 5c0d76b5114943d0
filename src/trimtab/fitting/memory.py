"""Make a memory from a recording, and learn when it may speak."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.anchors import Reading
from trimtab.backends.hf import HFModel
from trimtab.carriers.gate import fit_gate
from trimtab.carriers.memory import (
    Memory,
    contexts_before,
    lay_out,
    unit_keys,
    varies,
    whitening,
)
from trimtab.carriers.recall import MountedMemory
from trimtab.carriers.search import build_index
from trimtab.carriers.sources import Sources, travelling_names
from trimtab.config import FitConfig
from trimtab.errors import InputError, RecordingError
from trimtab.fitting.recorded import Columns, byte_ends, document_bytes
from trimtab.steering.proposals import propose
from trimtab.types import Progress
from trimtab.unembedding import Unembedding
from trimtab.vocab import Vocabulary

SOFT_VALUES = 8
"""Expert's tokens kept per entry of a soft memory."""

QUESTIONS = 256
"""Positions that the memory is asked about at once."""

GATE_POSITIONS = 4_096
"""Positions of each kind of text that the gates are learnt on, evenly spaced where there are more:
enough for seven weights, and each is compared with every entry of the memory."""


def fit_memory(
    config: FitConfig,
    base: HFModel,
    expert_head: Unembedding,
    splits: dict[str, Columns],
    names: Sequence[str],
    progress: Progress,
) -> Memory:
    """Remember the training text under the reference's states.

    Args:
        config: Sizes, and what entries say.
        base: The reference.
        expert_head: From the expert's states to its logits.
        splits: train, held_out and general of a recording.
        names: Of the training documents, by `document_index`.
        progress: Shows the look-ups that the gate is learnt from.

    Raises:
        InputError: Soft values from a recording that has no probabilities.
        RecordingError: The recording holds no position to remember, or none that differ, or none to
            learn a gate from.
    """
    train = splits["train"]
    answered = train["next_ids"] >= 0
    if not answered.any():
        raise RecordingError(
            "the recording's training text holds no two tokens in a row to remember",
            hint="record longer documents, or leave memory out of --carriers",
        )
    states = train["reference_hidden"][answered].float()
    if not varies(states):
        raise RecordingError(
            "the recording holds too little text to make keys of: the reference's states do not"
            f" differ (places to remember: {len(states)})",
            hint="record more text, or leave memory out of --carriers",
        )
    projection, mean = whitening(states, config.key_size)
    keys = unit_keys(states, projection, mean)
    memory = entries_of(base.vocabulary, train, keys, _names(names, train))
    memory = replace(memory, projection=projection, mean=mean)
    if config.values == "soft":
        memory = _soft(memory, base, expert_head, {k: v[answered] for k, v in train.items()})
    following = train["next_ids"][answered].long()
    gate, own_gate, bytes_gate = _gates(base, memory, following, splits, progress)
    return replace(memory, gate=gate, own_gate=own_gate, bytes_gate=bytes_gate)


def entries_of(
    vocabulary: Vocabulary, columns: Columns, keys: Tensor, names: Sequence[str]
) -> Memory:
    """A memory of a text, which answers with what followed; without whitening and gates.

    Args:
        vocabulary: Of the small model.
        columns: The text: `token_ids`, `next_ids` (-1 where none follows in the document) and
            `document_index`.
        keys: Of the positions that a token follows, shape [entries, key].
        names: Of the documents, as the memory is to call them.
    """
    answered = columns["next_ids"] >= 0
    text, starts = lay_out(document_bytes(vocabulary, columns))
    # By number among the documents that are there.
    _, number = torch.unique_consecutive(columns["document_index"], return_inverse=True)
    positions = torch.tensor(starts, dtype=torch.long)[number] + byte_ends(vocabulary, columns)
    nothing = torch.zeros(0)
    return Memory(
        keys,
        nothing,
        nothing,
        text,
        positions[answered],
        sources=Sources(tuple(names), tuple(starts)),
    )


def _names(names: Sequence[str], train: Columns) -> tuple[str, ...]:
    """Of the documents that were recorded, in the order in which they lie in the text."""
    recorded = torch.unique_consecutive(train["document_index"]).tolist()
    return travelling_names([names[int(document)] for document in recorded])


@torch.no_grad()
def _soft(memory: Memory, base: HFModel, head: Unembedding, train: Columns) -> Memory:
    """Keep the expert's likeliest tokens at each entry."""
    if "expert_top_ids" in train:
        ids = train["expert_top_ids"][:, :SOFT_VALUES].long()
        probs = train["expert_top_logprobs"][:, :SOFT_VALUES].exp()
    elif "expert_hidden" in train:
        tops = [
            head.logits(states.float()).softmax(-1).topk(SOFT_VALUES)
            for states in train["expert_hidden"].split(512)
        ]
        ids = torch.cat([top.indices for top in tops])
        probs = torch.cat([top.values for top in tops])
    else:
        raise InputError(
            "soft values need an exact, compact or sparse recording, and this one is sampled",
            hint="record again with --encoding exact, or fit with --values hard",
        )
    kept, places = torch.unique(ids, return_inverse=True)
    strings = tuple(base.vocabulary.token_bytes[i] or b"" for i in kept.tolist())
    # As the adapter stores them, so that the gate is learnt on what a host will see.
    return replace(memory, soft_ids=places.int(), soft_probs=probs.half(), soft_strings=strings)


@dataclass(frozen=True)
class _Questions:
    """Some positions of a split, with the bytes before them and what came next."""

    states: Tensor
    contexts: Tensor
    truth: Tensor
    weight: float


def _questions(base: HFModel, columns: Columns) -> Iterator[_Questions]:
    """Positions that a token follows, QUESTIONS at a time; a split weighs one half."""
    text, starts = lay_out(document_bytes(base.vocabulary, columns))
    first = torch.tensor(starts, dtype=torch.long)[columns["document_index"].long()]
    contexts = contexts_before(text, first + byte_ends(base.vocabulary, columns))
    answered = _asked(columns)
    for rows in answered.split(QUESTIONS):
        if len(rows):
            yield _Questions(
                columns["reference_hidden"][rows].float(),
                contexts[rows],
                columns["next_ids"][rows].long(),
                0.5 / len(answered),
            )


def _asked(columns: Columns) -> Tensor:
    """The positions that the gates are learnt on, ascending."""
    answered = torch.nonzero(columns["next_ids"] >= 0)[:, 0]
    count = min(len(answered), GATE_POSITIONS)
    return answered[torch.arange(count) * len(answered) // max(count, 1)]


def _gates(
    base: HFModel,
    memory: Memory,
    following: Tensor,
    splits: dict[str, Columns],
    progress: Progress,
) -> list[tuple[float, ...]]:
    """Learn the gates on held-out domain text and general text, each with half the weight.

    One for a model that asks through a map, one for a model that made the keys, one for bytes.

    The reference is asked as a host is, with its own state as its reading of itself.
    """
    reading = Reading(memory.projection, -memory.projection @ memory.mean)
    said = propose(memory, following, base.strings)
    mounted = MountedMemory(memory, build_index(memory), reading, said.values, said.shares)
    ways = (mounted, replace(mounted, is_own=True), replace(mounted, finds="bytes"))
    if not (splits["held_out"]["next_ids"] >= 0).any():
        raise RecordingError(
            "the recording holds no held-out text to learn the memory's gate from",
            hint="tune with --held-out above 0 and record again, or leave memory out of --carriers",
        )
    asked: list[list[tuple[Tensor, ...]]] = []
    total = sum(len(_asked(splits[split])) for split in ("held_out", "general"))
    with progress("fitting the memory's gates (tokens)", total) as advance, torch.no_grad():
        for split in ("held_out", "general"):
            if not len(splits[split]["token_ids"]):
                continue
            for questions in _questions(base, splits[split]):
                logprobs = base.unembedding.logits(questions.states).log_softmax(-1)
                asked.append([_outcome(way, questions, logprobs) for way in ways])
                advance(len(questions.truth))
    return [
        fit_gate(*(torch.cat(parts) for parts in zip(*outcomes, strict=True)))
        for outcomes in zip(*asked, strict=True)
    ]


def _outcome(memory: MountedMemory, questions: _Questions, logprobs: Tensor) -> tuple[Tensor, ...]:
    """Gate features, both log-probabilities of what came next, and weights: as `fit_gate` asks."""
    answer = memory.ask(questions.states, questions.contexts)
    return (
        answer.gate_features(logprobs),
        logprobs.gather(1, questions.truth[:, None])[:, 0],
        answer.prob_of(questions.truth).log(),
        torch.full((len(questions.truth),), questions.weight),
    )
