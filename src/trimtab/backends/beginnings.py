"""The beginnings of texts on which a host is scored."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from trimtab.backends.hf import HFModel
from trimtab.config import EvaluateConfig
from trimtab.errors import InputError
from trimtab.text.documents import read_by_kind, read_documents
from trimtab.types import Document

MIN_DOCUMENT_BYTES = 64
"""Shorter documents, and shorter ends of what may be scored, are passed over."""


def read_texts(config: EvaluateConfig) -> dict[str, list[Document]]:
    """Domain text under the empty kind, general text by its kind."""
    return {"": read_documents(config.data)} | read_by_kind(config.general)


def _budget(config: EvaluateConfig, kind: str) -> int:
    if config.max_tokens is None:
        return 10**9
    return config.max_tokens if kind == "" else config.max_tokens // 4


def cut_texts(
    texts: Mapping[str, Sequence[Document]], config: EvaluateConfig, host: HFModel
) -> dict[str, list[Document]]:
    """The beginnings of all texts that the limits leave.

    Args:
        texts: By kind, the domain's under the empty one.
        config: With the limits.
        host: Whose tokens count.

    Raises:
        InputError: Nothing is left of a kind, or a text has a source that the host cannot read.
    """
    found = {
        kind: _cut(documents, _budget(config, kind), config, host)
        for kind, documents in texts.items()
    }
    for kind, documents in found.items():
        if not documents:
            raise InputError(
                f"the {kind or 'domain'} text has no document of {MIN_DOCUMENT_BYTES} bytes"
                " within --max-tokens (general text: a quarter of it, each kind)",
                hint="give longer text, or raise --max-tokens",
            )
    return found


def _cut(
    documents: Sequence[Document], budget: int, config: EvaluateConfig, host: HFModel
) -> list[Document]:
    """The beginnings of documents that are scored: the same text for every model."""
    kept = []
    for document in documents:
        if document.source is not None and not host.is_encoder_decoder:
            raise InputError(
                f"{document.name} has a source, which {host.ref} cannot read: it is no"
                " encoder-decoder",
                hint="evaluate such a host on text, or take a T5, BART or Marian model as host",
            )
        tokens, raw = beginning(host, document.text, min(config.document_tokens, budget))
        if len(raw) < (MIN_DOCUMENT_BYTES if document.source is None else 1):
            continue
        budget -= tokens
        kept.append(replace(document, text=raw.decode("utf-8", "ignore")))
    return kept


def beginning(host: HFModel, text: str, limit: int) -> tuple[int, bytes]:
    """The first tokens of a text, at most `limit`: how many, and what of the text they are."""
    ids = host.encode(text)[:limit]
    raw = b"".join(host.vocabulary.token_bytes[i] or b"" for i in ids)
    return len(ids), raw[int(host.vocabulary.prefix_space) :]
