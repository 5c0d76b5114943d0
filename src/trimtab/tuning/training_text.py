"""From the user's files to training and held-out windows of one model."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from trimtab.backends.chat import Rendered, chat_renderer
from trimtab.backends.hf import HFModel
from trimtab.config import MIN_WINDOW_TOKENS, TuneConfig
from trimtab.errors import InputError
from trimtab.store.expert import HELD_OUT_NAME, TRAIN_NAME, Documents
from trimtab.text.corpus import load_documents, save_documents, sha256_of_documents, split_held_out
from trimtab.text.documents import read_documents
from trimtab.text.duplicates import drop_near_duplicates
from trimtab.text.packing import TokenisedDocument, Windows, counted_by_spans, pack
from trimtab.types import Document

_TYPICAL_TOKEN_CHARACTERS = 4


def fingerprints(config: TuneConfig) -> dict[str, str]:
    """Hash the input documents without a model: chat messages as they are written.

    Not their names, so that a run goes on where its folder has been moved.

    Raises:
        InputError: The text cannot be read.
    """

    def as_written(messages: Sequence[Mapping[str, str]]) -> Rendered:
        text = repr([sorted(message.items()) for message in messages])
        return text, ((0, len(text)),)

    def fingerprint(patterns: Sequence[str]) -> str:
        documents = read_documents(patterns, render_chat=as_written)
        return sha256_of_documents([replace(document, name="") for document in documents])

    given = (("data", config.data), ("against", config.against))
    return {name: fingerprint(patterns) for name, patterns in given if patterns}


def gather_documents(config: TuneConfig, model: HFModel) -> Documents:
    """Read the text, remove near-duplicates of the test files, split, and save both sides.

    Args:
        config: Names the text; both sides go into its folder.
        model: Renders chats.

    Returns:
        Counts of what was saved.

    Raises:
        InputError: The text cannot be used, or nothing is left of it.
    """
    documents = read_documents(config.data, render_chat=chat_renderer(model))
    kept = documents
    if config.against:
        tests = read_documents(config.against, render_chat=chat_renderer(model))
        kept = drop_near_duplicates(documents, tests).kept
    if not kept:
        raise InputError(
            f"all {len(documents)} training documents are near-duplicates of the test files",
            hint="give other training text in data, or other test files in against",
        )
    train_side, held_out = split_held_out(kept, config.held_out, config.seed)
    save_documents(config.out / TRAIN_NAME, train_side)
    save_documents(config.out / HELD_OUT_NAME, held_out)
    return Documents(
        train=len(train_side),
        held_out=len(held_out),
        near_duplicates=len(documents) - len(kept),
    )


def training_windows(config: TuneConfig, model: HFModel) -> Windows:
    """Pack the saved training text: all of it, or under `max_tokens` excerpts from all over it.

    Raises:
        InputError: The text is shorter than a window, or nothing in it counts.
    """
    limit = None if config.max_tokens is None else config.max_tokens * config.epochs
    least = None if limit is None else max(limit, config.window_tokens)
    documents = _tokenised(config.out / TRAIN_NAME, config, model, least_tokens=least)
    found = sum(len(document.token_ids) for document in documents)
    if found < config.window_tokens:
        raise InputError(
            f"the training text has {found} tokens, expected at least one window of"
            f" {config.window_tokens}",
            hint=f"give more text, or set --window-tokens to at most {found}"
            if found >= MIN_WINDOW_TOKENS
            else f"give more text: one window has at least {MIN_WINDOW_TOKENS} tokens",
        )
    return _counting(_packed(documents, config, model), "training")


def held_out_windows(config: TuneConfig, model: HFModel) -> Windows | None:
    """Pack the saved held-out text and choose the windows that every validation scores.

    Special tokens do not count here, so that the loss can be told in bits per byte.

    Returns:
        At least one window; None if no text was held out.

    Raises:
        InputError: Nothing in the text counts.
    """
    least = max(config.validation_tokens, config.window_tokens)
    documents = _tokenised(config.out / HELD_OUT_NAME, config, model, least_tokens=least)
    if not documents:
        return None
    windows = _counting(_packed(documents, config, model).scored(), "held-out")
    count = max(1, config.validation_tokens // config.window_tokens)
    generator = torch.Generator().manual_seed(config.seed)
    return windows.rows(torch.randperm(len(windows), generator=generator)[:count])


@dataclass(frozen=True)
class _Excerpt:
    document: Document
    ends: bool


def _tokenised(
    path: Path, config: TuneConfig, model: HFModel, *, least_tokens: int | None
) -> list[TokenisedDocument]:
    """Tokenise saved documents, or excerpts of them until there are enough tokens."""
    documents = load_documents(path)
    if least_tokens is None:
        return [_tokens_of(_Excerpt(document, True), model) for document in documents]
    # Two windows of text each: large corpora are seen all over without being read all.
    length = 2 * config.window_tokens * _TYPICAL_TOKEN_CHARACTERS
    excerpts = [excerpt for document in documents for excerpt in _cut(document, length)]
    random.Random(config.seed).shuffle(excerpts)
    tokenised: list[TokenisedDocument] = []
    for excerpt in excerpts:
        if least_tokens <= 0:
            break
        tokenised.append(_tokens_of(excerpt, model))
        least_tokens -= len(tokenised[-1].token_ids)
    return tokenised


def _cut(document: Document, length: int) -> Iterator[_Excerpt]:
    """Cut a text into excerpts of whole lines; chats and completions stay whole."""
    text, start = document.text, 0
    while len(text) - start > length and not (document.markup or document.loss_spans):
        end = text.find("\n", start + length) + 1 or len(text)
        yield _Excerpt(Document(document.name, text[start:end]), end == len(text))
        start = end
    if start < len(text):
        rest = replace(document, text=text[start:]) if start else document
        yield _Excerpt(rest, True)


def _packed(documents: Sequence[TokenisedDocument], config: TuneConfig, model: HFModel) -> Windows:
    return pack(documents, window_tokens=config.window_tokens, context_ids=model.context_ids())


def _counting(windows: Windows, side: str) -> Windows:
    windows = windows.rows(windows.counted.any(1).nonzero().flatten())
    if not len(windows):
        raise InputError(
            f"the {side} text has 0 tokens that a loss can count, expected at least 1",
            hint="give more text; of chats and completions only the replies count",
        )
    return windows


def _tokens_of(excerpt: _Excerpt, model: HFModel) -> TokenisedDocument:
    document = excerpt.document
    ids = model.encode(document.text, markup=document.markup)
    pieces = [_spelled(model, token_id) for token_id in ids]
    try:
        counted = counted_by_spans(
            pieces,
            document.loss_spans,
            document.text,
            offset_bytes=int(model.vocabulary.prefix_space and not document.markup),
        )
    except ValueError as error:
        raise InputError(
            f"{document.name}: {model.ref} changes its text before reading it, so that the"
            " tokens of its completions cannot be told",
            hint="normalise the text (Unicode NFC), or give it as `text` without prompts",
        ) from error
    text_bytes = [len(model.vocabulary.token_bytes[i] or b"") for i in ids]
    before = [i for i in model.context_ids() if ids[:1] != [i]]
    # A chat template writes its own end tokens.
    end = model.vocabulary.eos_id
    after = [] if end is None or document.markup or not excerpt.ends else [end]
    return TokenisedDocument(
        token_ids=[*before, *ids, *after],
        counted=[False] * len(before) + counted + (counted[-1:] or [False]) * len(after),
        text_bytes=[0] * len(before) + text_bytes + [0] * len(after),
    )


def _spelled(model: HFModel, token_id: int) -> bytes:
    """The bytes of a token in the document's text, where special tokens stand by their names."""
    text = model.vocabulary.token_bytes[token_id]
    return model.tokenizer.convert_ids_to_tokens([token_id])[0].encode() if text is None else text
