"""Run a source pair over passages of text and encode what both think."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.backends.pair import Pair, PairStates
from trimtab.compact import StateCode
from trimtab.encoding import (
    Samples,
    TopK,
    chunk_rows,
    encode_samples,
    encode_topk,
    pack_samples,
    pack_topk,
)
from trimtab.errors import NumericalError
from trimtab.store.recording_schema import (
    CompactEncoding,
    Encoding,
    ExactEncoding,
    SampledEncoding,
    SparseEncoding,
)
from trimtab.stored_states import pack_states
from trimtab.text.passages import DocumentTokens, Passage
from trimtab.types import Advance
from trimtab.unembedding import Unembedding

_Chunk = TypeVar("_Chunk")

BATCH_TOKENS = 2048
"""Positions, padding included, that go through a model at once."""

WIDTH_STEP = 32
"""Batches are padded to multiples of so many positions: for each new shape of a product in bfloat16
a processor keeps code and scratch space, 3 MB a shape even for a toy."""

FLOAT16_LIMIT = 6e4
"""Hidden states larger than this are stored as float32."""


def run_passages(
    pair: Pair,
    documents: Sequence[DocumentTokens],
    shard: Sequence[Passage],
    *,
    advance: Advance,
) -> PairStates:
    """Compute both final hidden states at the recorded positions of a shard.

    Args:
        pair: Reference and expert.
        documents: The split that the passages are of.
        shard: What to run.
        advance: Told of recorded positions as they are done.

    Returns:
        Two tensors of shape [rows, hidden], in order of the passages.

    Raises:
        NumericalError: A hidden state that is not finite.
    """
    return PairStates(*_run(pair.hidden, pair.reference, documents, shard, advance))


def run_reference(
    reference: HFModel,
    documents: Sequence[DocumentTokens],
    shard: Sequence[Passage],
    *,
    advance: Advance,
) -> Tensor:
    """As `run_passages`, of the reference alone: shape [rows, hidden]."""
    (states,) = _run(lambda ids: (reference.hidden(ids),), reference, documents, shard, advance)
    return states


def _run(
    hidden: Callable[[Tensor], Sequence[Tensor]],
    model: HFModel,
    documents: Sequence[DocumentTokens],
    shard: Sequence[Passage],
    advance: Advance,
) -> list[Tensor]:
    """The states of each model that `hidden` runs, in order of the passages.

    Args:
        hidden: From token ids to states.
        model: Of it, or of what was tuned from it, these are the states.
        documents: The split that the passages are of.
        shard: What to run.
        advance: Told of recorded positions as they are done.
    """
    before = len(model.context_ids())
    done: dict[int, list[Tensor]] = {}
    for places in _batches(shard):
        batch = [shard[place] for place in places]
        states = hidden(_padded_ids(model, documents, batch))
        for row, place in enumerate(places):
            passage = shard[place]
            first = before + passage.record_from - passage.start
            kept = slice(first, first + passage.rows)
            done[place] = [each[row, kept] for each in states]
            _check_finite(done[place], documents[passage.document_index].name)
            advance(passage.rows)
    ordered = [done[place] for place in range(len(shard))]
    return [torch.cat(list(each)) for each in zip(*ordered, strict=True)]


def _batches(shard: Sequence[Passage]) -> Iterator[list[int]]:
    """Put passages of similar length together, longest first, so that padding is small."""
    order = sorted(range(len(shard)), key=lambda place: shard[place].start - shard[place].end)
    while order:
        longest = shard[order[0]].end - shard[order[0]].start
        size = max(1, BATCH_TOKENS // longest)
        yield order[:size]
        order = order[size:]


def _padded_ids(
    model: HFModel, documents: Sequence[DocumentTokens], batch: Sequence[Passage]
) -> Tensor:
    # A causal model's states do not depend on what stands to their right, so padding needs no
    # mask; without one the attention takes its fast path.
    context_ids, longest = model.context_ids(), model.max_tokens
    before = len(context_ids)
    needed = before + max(passage.end - passage.start for passage in batch)
    width = -(-needed // WIDTH_STEP) * WIDTH_STEP
    if longest is not None:
        width = max(needed, min(width, longest))
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    for row, passage in enumerate(batch):
        text = documents[passage.document_index].token_ids[passage.start : passage.end]
        ids[row, :before] = torch.tensor(context_ids, dtype=torch.int64)
        ids[row, before : before + len(text)] = torch.from_numpy(text)
    return ids


def _check_finite(states: Sequence[Tensor], name: str) -> None:
    for who, values in zip(PairStates._fields, states, strict=False):
        if not values.isfinite().all():
            raise NumericalError(
                f"the {who}'s hidden states on {name} are not finite numbers",
                hint="run with --dtype float32, or tune again with a smaller learning rate",
            )


def passage_columns(
    documents: Sequence[DocumentTokens], shard: Sequence[Passage]
) -> dict[str, Tensor]:
    """List each recorded position's token, the next one (-1 at the end) and its document."""
    tokens, following, indices = [], [], []
    for passage in shard:
        token_ids = torch.from_numpy(documents[passage.document_index].token_ids)
        extended = torch.cat([token_ids, torch.tensor([-1], dtype=torch.int32)])
        tokens.append(token_ids[passage.record_from : passage.end])
        following.append(extended[passage.record_from + 1 : passage.end + 1])
        indices.append(torch.full((passage.rows,), passage.document_index, dtype=torch.int32))
    return {
        "token_ids": torch.cat(tokens),
        "next_ids": torch.cat(following),
        "document_index": torch.cat(indices),
    }


@dataclass(frozen=True)
class Heads:
    """Both unembeddings of a pair.

    Attributes:
        reference: From the reference's hidden states to logits.
        expert: From the expert's.
    """

    reference: Unembedding
    expert: Unembedding

    @property
    def vocab(self) -> int:
        """Rows of the unembedding."""
        return len(self.reference.weight)

    @property
    def same(self) -> bool:
        """Both make the same logits of the same hidden state, as with a LoRA."""
        ours, theirs = self.reference, self.expert
        if (ours.scale, ours.softcap) != (theirs.scale, theirs.softcap):
            return False
        return _equal(ours.weight, theirs.weight) and _equal(ours.bias, theirs.bias)


def _equal(ours: Tensor | None, theirs: Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return ours is theirs or torch.equal(ours, theirs)


def state_columns(reference: Tensor, expert: Tensor | None = None) -> dict[str, Tensor]:
    """Store hidden states as float16, or all as float32 where one is too large for it.

    Args:
        reference: The reference's, shape [rows, hidden].
        expert: The expert's, where they are kept too; same shape.
    """
    kept = {"reference_hidden": reference}
    if expert is not None:
        kept["expert_hidden"] = expert
    largest = max(float(values.abs().max()) for values in kept.values())
    dtype = torch.float16 if largest <= FLOAT16_LIMIT else torch.float32
    return {name: values.to(dtype).cpu() for name, values in kept.items()}


def sparse_columns(states: PairStates, heads: Heads, *, top_k: int) -> dict[str, Tensor]:
    """Encode both distributions as top-k with tails; never holds many positions' logits."""
    columns = {}
    for who, hidden, head in (
        ("expert", states.expert, heads.expert),
        ("reference", states.reference, heads.reference),
    ):
        chunks = _chunked(hidden, head, lambda logits, _: encode_topk(logits, top_k))
        topk = TopK(
            torch.cat([chunk.token_ids for chunk in chunks]),
            torch.cat([chunk.logprobs for chunk in chunks]),
            torch.cat([chunk.log_tail for chunk in chunks]),
            torch.cat([chunk.log_normaliser for chunk in chunks]),
        )
        packed = pack_topk(topk, heads.vocab)
        columns |= {f"{who}_{name}": column for name, column in packed.items()}
    return columns


def sampled_columns(
    states: PairStates, heads: Heads, *, draws: int, seed: int
) -> dict[str, Tensor]:
    """Draw from the expert's distribution; the draws depend on the seed and the row alone."""
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(len(states.expert), draws, generator=generator, dtype=torch.float64)
    chunks = _chunked(
        states.expert,
        heads.expert,
        lambda logits, rows: encode_samples(logits, uniforms[rows].to(logits.device)),
    )
    samples = Samples(
        torch.cat([chunk.token_ids for chunk in chunks]).cpu(),
        torch.cat([chunk.counts for chunk in chunks]).cpu(),
    )
    packed = pack_samples(samples, heads.vocab)
    return {f"expert_{name}": column for name, column in packed.items()}


def compact_columns(
    states: PairStates, code: StateCode, encoding: CompactEncoding, *, advance: Advance
) -> dict[str, Tensor]:
    """Encode a shard's states as the reference's and their difference.

    Args:
        states: Shapes [rows, hidden].
        code: Of the recording.
        encoding: Form of the soft targets.
        advance: Told of positions as they are done.
    """
    columns = state_columns(states.reference)
    stored = code.encode(columns["reference_hidden"], states.expert.cpu(), advance)
    packed = pack_states(stored, encoding.id_bits)
    return columns | {f"expert_{name}": column for name, column in packed.items()}


def _chunked(
    hidden: Tensor, head: Unembedding, encode: Callable[[Tensor, slice], _Chunk]
) -> list[_Chunk]:
    size = chunk_rows(len(head.weight))
    with torch.inference_mode():
        return [
            encode(head.logits(hidden[start : start + size]), slice(start, start + size))
            for start in range(0, len(hidden), size)
        ]


def encode_states(
    states: PairStates, heads: Heads, encoding: Encoding, *, seed: int
) -> dict[str, Tensor]:
    """Encode a shard's states as the recording's manifest states, unless that is compact.

    The reference's hidden states are kept in every encoding, since a memory's keys and a head's
    input are made of them.

    Args:
        states: Shapes [rows, hidden].
        heads: Both unembeddings.
        encoding: Form of the soft targets.
        seed: Of the sampled encoding.
    """
    kept = states if isinstance(encoding, ExactEncoding) else states[:1]
    columns = state_columns(*kept)
    if isinstance(encoding, SparseEncoding):
        columns |= sparse_columns(states, heads, top_k=encoding.top_k)
    elif isinstance(encoding, SampledEncoding):
        columns |= sampled_columns(states, heads, draws=encoding.draws, seed=seed)
    return columns


@dataclass(frozen=True)
class Encoder:
    """From a shard's states to its columns.

    Attributes:
        heads: Both unembeddings.
        encoding: Form of the soft targets.
        code: What a compact recording's shards are encoded with; None in any other.
    """

    heads: Heads
    encoding: Encoding
    code: StateCode | None

    def run(
        self, states: Callable[[Advance], PairStates], seed: int, advance: Advance
    ) -> Callable[[], dict[str, Tensor]]:
        """Run both models, and give what encodes their states.

        Args:
            states: Runs them; told of positions as they are done.
            seed: Of the sampled encoding.
            advance: Told of positions as they are run, or encoded where that takes longer.
        """
        if self.code is None:
            found = states(advance)
            return lambda: encode_states(found, self.heads, self.encoding, seed=seed)
        assert isinstance(self.encoding, CompactEncoding)
        found = states(lambda _: None)
        return partial(compact_columns, found, self.code, self.encoding, advance=advance)


def shard_seed(seed: int, name: str) -> int:
    """Derive a shard's own seed, so that it can be drawn without those before it."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
