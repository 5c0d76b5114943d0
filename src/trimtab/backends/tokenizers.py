"""What a transformers tokenizer's ids stand for: from its own description to bytes."""

import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from trimtab.errors import ModelError
from trimtab.vocab import Vocabulary

ENCODING = threading.RLock()
"""Held while a tokenizer encodes: whether it reads special tokens in a text is a setting of the
tokenizer, which each call changes, and another thread must not change it in between."""

_PROBE = "The rudder, turned by 37 degrees"
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MARKS = ("\n", "(", "/", "-")
_OTHER_MODELS = "use a model with a byte-level BPE or SentencePiece tokenizer, or tiny:llama"


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """Read the bytes of every token id.

    Byte-level BPE and SentencePiece pieces (with or without byte fallback) are covered;
    WordPiece and other tokenizers that lose where a space was are not.

    Args:
        tokenizer: A model's tokenizer.
        rows: Rows of the model's unembedding; rows without a token stand for no text.

    Returns:
        The vocabulary; of two ids with the same single byte, a byte-fallback id is unused.

    Raises:
        ModelError: The tokenizer's bytes cannot be told, or it has more tokens than rows.
    """
    if getattr(tokenizer, "separate_vocabs", False):
        raise ModelError(
            f"the tokenizer {type(tokenizer).__name__} has one vocabulary for sources and another"
            " for targets, and such models are not read",
            hint="use a model whose two sides share one vocabulary, as most of Marian's do",
        )
    ids_by_token = tokenizer.get_vocab()
    special = special_ids(tokenizer)
    _check_rows(ids_by_token, special, rows)
    bytes_of_piece = _byte_level if _is_byte_level(tokenizer) else _sentencepiece
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    token_bytes: list[bytes | None] = [None] * rows
    for token, token_id in ids_by_token.items():
        if token_id in special or token_id >= rows:
            continue
        token_bytes[token_id] = (
            _added(added[token_id], bytes_of_piece) if token_id in added else bytes_of_piece(token)
        )
    if bytes_of_piece is _sentencepiece:
        _drop_unused_fallback(token_bytes, ids_by_token)
    return _checked(tokenizer, tuple(token_bytes))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the tokens that stand for no text: control tokens and the unknown token."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str, *, prefix_space: bool) -> list[int]:
    """Encode a text as text: no special tokens are added, and their names are ordinary words.

    Args:
        tokenizer: A model's tokenizer.
        text: Any text.
        prefix_space: The tokenizer puts a space before a text; it then does so here even where
            the text begins with one, so that the first byte is never the text's own.

    Returns:
        Token ids. What the tokenizer cannot write (SmolLM2 lacks some control characters) is
        left out or becomes its unknown token, as in the model's training.
    """
    spare = prefix_space and text.startswith(" ")
    if spare and _plain(tokenizer, " x") == _plain(tokenizer, "x"):
        text = " " + text
    return _plain(tokenizer, text)


def encode_following(
    tokenizer: PreTrainedTokenizerBase, text: str, vocabulary: Vocabulary
) -> list[int]:
    """Encode a text that stands after other tokens, as `encode_plain` does but without a space.

    Args:
        tokenizer: A model's tokenizer.
        text: Any text.
        vocabulary: The bytes of its tokens.

    Returns:
        Token ids; with the space all the same where the tokenizer joins the text with all that
        could stand before it, or can write none of that.
    """
    if vocabulary.prefix_space:
        # The space goes before a mark, and both are cut off. T5's and Marian's tokenizers have
        # no line's end.
        for mark in _MARKS:
            ids, spelled = encode_plain(tokenizer, mark + text, prefix_space=True), b""
            for place, token_id in enumerate(ids, start=1):
                spelled += vocabulary.token_bytes[token_id] or b""
                if spelled == b" " + mark.encode():
                    return ids[place:]
    return encode_plain(tokenizer, text, prefix_space=vocabulary.prefix_space)


def encode_all_following(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], vocabulary: Vocabulary
) -> list[list[int]]:
    """As `encode_following` of each text, on several threads where the tokenizer has them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or vocabulary.prefix_space:
        return [encode_following(tokenizer, text, vocabulary) for text in texts]
    with ENCODING:
        _set_to_plain(backend)
        encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
    return [one.ids for one in encoded]


def _set_to_plain(backend: Any) -> None:
    # A call of the tokenizer leaves other settings behind.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    with ENCODING:
        if backend is not None:
            # Seven times as fast as the call below.
            _set_to_plain(backend)
            return backend.encode(text, add_special_tokens=False).ids
        # A model writes a target: Marian's tokenizer has another vocabulary for its sources.
        options: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True}
        return list(tokenizer(text_target=text, verbose=False, **options)["input_ids"])


def _checked(
    tokenizer: PreTrainedTokenizerBase, token_bytes: tuple[bytes | None, ...]
) -> Vocabulary:
    plain = _plain(tokenizer, _PROBE)
    spelled = b"".join(token_bytes[i] or b"" for i in plain)
    prefix_space = spelled == b" " + _PROBE.encode()
    if not prefix_space and spelled != _PROBE.encode():
        raise ModelError(
            f"the bytes of the tokenizer {type(tokenizer).__name__} cannot be told:"
            f" {_PROBE!r} is encoded and spelled back as {spelled!r}",
            hint=_OTHER_MODELS,
        )
    whole = list(tokenizer(text_target=_PROBE, verbose=False)["input_ids"])
    eos = tokenizer.eos_token_id
    wants_bos = len(whole) > len(plain) and whole[0] != plain[0]
    return Vocabulary(
        token_bytes,
        bos_id=whole[0] if wants_bos else None,
        eos_id=eos if isinstance(eos, int) else None,
        prefix_space=prefix_space,
    )


def _check_rows(ids_by_token: Mapping[str, int], special: frozenset[int], rows: int) -> None:
    beyond = [t for t, i in ids_by_token.items() if i >= rows and i not in special]
    if beyond:
        raise ModelError(
            f"the tokenizer has {len(beyond)} tokens beyond the {rows} rows of the model's"
            f" unembedding, for example {beyond[0]!r}",
            hint="this tokenizer belongs to another model; open the model with its own one",
        )


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    kinds = _component_kinds(tokenizer)
    if "ByteLevel" in kinds:
        return True
    if kinds & {"Metaspace", "▁"} or hasattr(tokenizer, "sp_model"):
        return False
    if any("▁" in token for token in tokenizer.get_vocab()) and "WordPiece" not in kinds:
        return False
    raise ModelError(
        f"the bytes of the tokenizer {type(tokenizer).__name__} cannot be told: it is neither"
        f" byte-level BPE nor SentencePiece but has {sorted(kinds) or 'no known parts'}",
        hint=_OTHER_MODELS,
    )


def _component_kinds(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return set()
    kinds: set[str] = set()
    for part in (backend.decoder, backend.pre_tokenizer):
        if part is not None:
            kinds.update(_kinds(json.loads(part.__getstate__())))
    return kinds


def _kinds(part: Mapping[str, Any]) -> Iterable[str]:
    yield part["type"]
    if part["type"] == "Replace" and "▁" in (part["pattern"].get("String"), part["content"]):
        yield "▁"
    for inner in (*part.get("decoders", ()), *part.get("pretokenizers", ())):
        yield from _kinds(inner)


def _byte_level_alphabet() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_BY_LETTER: Mapping[str, int] = _byte_level_alphabet()
"""The letter that byte-level BPE writes for each byte: itself where printable, else U+0100 on."""


def _byte_level(token: str) -> bytes | None:
    try:
        return bytes(BYTE_BY_LETTER[letter] for letter in token)
    except KeyError:
        return None


def _sentencepiece(token: str) -> bytes | None:
    if fallback := _BYTE_FALLBACK.fullmatch(token):
        return bytes([int(fallback[1], 16)])
    return token.replace("▁", " ").encode()


def _added(content: str, bytes_of_piece: Any) -> bytes | None:
    # An added token is matched in the text itself, before byte-level letters exist; only
    # SentencePiece's pieces keep their spelling, because its normaliser has run by then.
    return _sentencepiece(content) if bytes_of_piece is _sentencepiece else content.encode()


def _drop_unused_fallback(token_bytes: list[bytes | None], ids_by_token: Mapping[str, int]) -> None:
    """Leave a byte-fallback id without text where a piece says the same: it is never used."""
    spelled = {token_bytes[i] for t, i in ids_by_token.items() if not _BYTE_FALLBACK.fullmatch(t)}
    for token, token_id in ids_by_token.items():
        if _BYTE_FALLBACK.fullmatch(token) and token_bytes[token_id] in spelled:
            token_bytes[token_id] = None
