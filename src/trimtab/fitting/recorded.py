"""What a recording holds, as text and as the small model's distributions."""

from collections.abc import Callable

import torch
from torch import Tensor

from trimtab.align.strings import token_lengths
from trimtab.encoding import Samples, TopK, decode_samples, decode_topk
from trimtab.soft_targets import FLOAT16_LIMIT
from trimtab.store.recording import Recording
from trimtab.stored_states import StoredStates, Unexpected
from trimtab.types import Progress
from trimtab.unembedding import Unembedding
from trimtab.vocab import Vocabulary

Columns = dict[str, Tensor]
"""A split of a recording, one row a position."""

SmallLogits = Callable[[Tensor, Tensor | None], Tensor]
"""From positions of the training text [batch] and token ids [chosen], None being all, to the
logits, or log-probabilities, that expert or reference gives them, shape [batch, chosen]."""

UNDRAWN_PROB = 1e-9
"""Probability of a token that a sampled recording never drew; a logit needs one."""


def document_bytes(vocabulary: Vocabulary, columns: Columns) -> list[bytes]:
    """Put the recorded documents together again from their tokens.

    Args:
        vocabulary: Of the small model.
        columns: A split with `token_ids` and `document_index`.
    """
    documents: dict[int, list[bytes]] = {}
    rows = zip(columns["document_index"].tolist(), columns["token_ids"].tolist(), strict=True)
    for document, token_id in rows:
        documents.setdefault(document, []).append(vocabulary.token_bytes[token_id] or b"")
    spare = int(vocabulary.prefix_space)
    return [b"".join(parts)[spare:] for parts in documents.values()]


def byte_ends(vocabulary: Vocabulary, columns: Columns) -> Tensor:
    """Bytes of its document read at each position, its own token included, shape [positions]."""
    ends = token_lengths(vocabulary)[columns["token_ids"].long()].cumsum(0)
    _, sizes = torch.unique_consecutive(columns["document_index"].long(), return_counts=True)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), ends[sizes.cumsum(0)[:-1] - 1]])
    return ends - starts.repeat_interleave(sizes) - int(vocabulary.prefix_space)


def with_states(
    recording: Recording, columns: Columns, unembedding: Unembedding, progress: Progress
) -> Columns:
    """A compact recording's columns with `expert_hidden`, as an exact one has it.

    Args:
        recording: Encoded as compact.
        columns: A split, or the beginning of one.
        unembedding: The reference's.
        progress: Shows the decoding.
    """
    parts = ("numbers", "halvings", "unexpected_ids", "unexpected_levels")
    names = [f"expert_{part}" for part in parts]
    numbers, halvings, ids, levels = (columns[name] for name in names)
    code = recording.state_code(unembedding)
    with progress("decoding the recording (tokens)", len(numbers)) as advance:
        stored = StoredStates(numbers, halvings, Unexpected(ids, levels))
        states = code.decode(columns["reference_hidden"], stored, advance)
    if not len(states) or float(states.abs().max()) <= FLOAT16_LIMIT:
        states = states.half()
    kept = {name: column for name, column in columns.items() if name not in names}
    return kept | {"expert_hidden": states}


def expert_logits(recording: Recording, train: Columns, unembedding: Unembedding) -> SmallLogits:
    """Read the expert's distributions from any encoding.

    Args:
        recording: Where the expert's own head is, if it has one.
        train: The training split; of a compact recording, `with_states`, or nobody may ask.
        unembedding: The reference's.
    """
    vocab = recording.manifest.vocab
    if "expert_hidden" in train:
        head, states = recording.expert_unembedding() or unembedding, train["expert_hidden"]
        return lambda batch, ids: head.logits(states[batch].float(), ids)
    if "expert_numbers" in train:
        return _undecoded
    if "expert_top_ids" in train:
        names = ("top_ids", "top_logprobs", "log_tail", "log_normaliser")
        parts = [train[f"expert_{name}"] for name in names]
        reference = reference_logits(train, unembedding)
        return lambda batch, ids: _chosen(
            decode_topk(TopK(*(p[batch] for p in parts)), vocab, reference(batch, None)), ids
        )
    drawn, counts = train["expert_sample_ids"], train["expert_sample_counts"]
    return lambda batch, ids: (
        _chosen(decode_samples(Samples(drawn[batch], counts[batch]), vocab), ids) + UNDRAWN_PROB
    ).log()


def reference_logits(train: Columns, unembedding: Unembedding) -> SmallLogits:
    """The reference's distributions, whose states are in every encoding.

    Args:
        train: The training split.
        unembedding: The reference's.
    """
    states = train["reference_hidden"]
    return lambda batch, ids: unembedding.logits(states[batch].float(), ids)


def _undecoded(*asked: Tensor | None) -> Tensor:
    raise AssertionError(f"{len(asked)} questions to states that were not decoded")


def _chosen(rows: Tensor, ids: Tensor | None) -> Tensor:
    return rows if ids is None else rows[:, ids]
