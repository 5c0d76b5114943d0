"""The tokens of a host behind an API: known through its tokenizer, or told from what it returns."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
from torch import Tensor

from trimtab.align.strings import Strings, is_whole
from trimtab.backends.hf import quiet_transformers
from trimtab.backends.live import Live
from trimtab.backends.open import open_tokenizer
from trimtab.backends.reading import LiveReading
from trimtab.backends.tiny import TINY_SCHEME
from trimtab.backends.tokenizers import encode_following, encode_plain, read_vocabulary, special_ids
from trimtab.errors import MissingDependencyError, ModelError, first_line
from trimtab.hosted.answers import Token, is_end
from trimtab.types import Progress, silent
from trimtab.vocab import Vocabulary

TIKTOKEN_SCHEME = "tiktoken:"


@final
@dataclass(frozen=True, eq=False)
class KnownTokens:
    """A host's own tokenizer.

    Attributes:
        vocabulary: The bytes of every token id.
        strings: Its tokens as strings, and where its tokenizer cuts.
        encode: Token ids of a text, without special tokens.
        ids_by_name: Token ids that stand for no text, by their names.
    """

    vocabulary: Vocabulary
    strings: Strings
    encode: Callable[[str], list[int]]
    ids_by_name: Mapping[str, int]

    def context_ids(self) -> list[int]:
        """Ids that the host reads before a text."""
        return [] if self.vocabulary.bos_id is None else [self.vocabulary.bos_id]

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Ids that end a text: the tokenizer's own, and those of the names that are known to."""
        named = {i for name, i in self.ids_by_name.items() if is_end(name)}
        return frozenset(named | {i for i in (self.vocabulary.eos_id,) if i is not None})

    def following(self, text: str) -> list[int]:
        """Token ids of a text that follows other tokens."""
        return list(self.strings.encode(text)) if self.strings.encode else []

    def id_of(self, token: Token) -> int | None:
        """The token id of what an API shows; None for what this tokenizer does not have."""
        named = self.ids_by_name.get(token.name)
        if token.text is None:
            return self.vocabulary.eos_id if named is None and token.ends else named
        texts = self.vocabulary.token_bytes
        if token.token_id is not None and 0 <= token.token_id < len(texts):
            if texts[token.token_id] == token.text:
                return token.token_id
        return self.vocabulary.ids_by_bytes.get(token.text, named)


@final
@dataclass(frozen=True, eq=False)
class ToldTokens:
    """Tokens of one place, where nothing is known of a host's tokenizer but what it shows there.

    Attributes:
        vocabulary: The strings shown, and what else may follow.
        strings: The same. Without a tokenizer, the longest token that begins a text is taken for
            its choice.
    """

    vocabulary: Vocabulary
    strings: Strings

    @staticmethod
    def of(shown: Iterable[Token], expected: Iterable[bytes]) -> "ToldTokens":
        """Gather the tokens of a place.

        Args:
            shown: What the host shows.
            expected: What the expert expects. What begins with a shown token is left out: the
                host would write it in several tokens, of which that is the first.
        """
        tokens = list(shown)
        texts = list(dict.fromkeys(token.text for token in tokens if token.text))
        names = [token.name for token in tokens if token.text is None]
        begins = tuple(texts)
        others = [text for text in dict.fromkeys(expected) if not text.startswith(begins)]
        vocabulary = Vocabulary((*texts, *others, *(None for _ in dict.fromkeys(names))))
        return ToldTokens(vocabulary, Strings(vocabulary))

    def ids_of(self, shown: Sequence[Token]) -> list[int]:
        """The id of each shown token."""
        names = list(dict.fromkeys(token.name for token in shown if token.text is None))
        first = len(self.vocabulary) - len(names)
        return [
            first + names.index(token.name)
            if token.text is None
            else self.vocabulary.ids_by_bytes[token.text]
            for token in shown
        ]


def expected_texts(live: Live, reading: LiveReading, questions: range, count: int) -> list[bytes]:
    """Likeliest next strings of the expert, whole characters only, in the order of their ids."""
    ids: Tensor = live.expected_small(reading, questions, count)
    found = (live.pair.vocabulary.token_bytes[i] for i in ids.tolist())
    return [text for text in found if text and is_whole(text)]


def open_known(ref: str, progress: Progress = silent) -> KnownTokens:
    """Open the tokenizer of a host behind an API.

    Args:
        ref: tiktoken:NAME, a folder with a model's tokenizer, GGUF file, or tiny:NAME.
        progress: Shows the unpacking of a GGUF file.

    Raises:
        ModelError: It cannot be found or read.
        MissingDependencyError: tiktoken is needed, and is not installed.
    """
    if ref.startswith(TIKTOKEN_SCHEME):
        return known_from_tiktoken(_tiktoken(ref.removeprefix(TIKTOKEN_SCHEME)))
    if not ref.startswith(TINY_SCHEME) and not Path(ref).expanduser().exists():
        # A hub's name would fetch all of a model, which may be a large one.
        raise ModelError(
            f"there is no file or folder {ref} with a tokenizer",
            hint="put the host's tokenizer.json into a folder and name that, or tiktoken:NAME",
        )
    with quiet_transformers():
        tokenizer = open_tokenizer(ref, progress)
        rows = max(tokenizer.get_vocab().values(), default=-1) + 1
        vocabulary = read_vocabulary(tokenizer, rows)
    return KnownTokens(
        vocabulary,
        Strings(vocabulary, lambda text: encode_following(tokenizer, text, vocabulary)),
        lambda text: encode_plain(tokenizer, text, prefix_space=vocabulary.prefix_space),
        {str(tokenizer.convert_ids_to_tokens(i)): i for i in special_ids(tokenizer)},
    )


def known_from_tiktoken(encoding: Any) -> KnownTokens:
    """Read a tiktoken encoding.

    Args:
        encoding: A `tiktoken.Encoding`.
    """
    token_bytes: list[bytes | None] = [None] * encoding.n_vocab
    for text in encoding.token_byte_values():
        token_bytes[encoding.encode_single_token(text)] = text
    names = {name: encoding.encode_single_token(name) for name in encoding.special_tokens_set}
    for token_id in names.values():
        token_bytes[token_id] = None
    vocabulary = Vocabulary(tuple(token_bytes), eos_id=names.get("<|endoftext|>"))
    encode = encoding.encode_ordinary
    return KnownTokens(vocabulary, Strings(vocabulary, encode), encode, names)


def _tiktoken(name: str) -> Any:
    try:
        import tiktoken
    except ImportError as error:
        raise MissingDependencyError(
            f"the tokenizer {TIKTOKEN_SCHEME}{name} needs the package tiktoken",
            hint="pip install 'trimtab[hosted]'",
        ) from error
    known = tiktoken.list_encoding_names()
    try:
        if name in known:
            return tiktoken.get_encoding(name)
        return tiktoken.encoding_for_model(name)
    except KeyError as error:
        raise ModelError(
            f"tiktoken knows no encoding and no model {name}",
            hint=f"encodings are {', '.join(known)}",
        ) from error
    except Exception as error:
        # tiktoken fetches its tables, and lets its transport's errors through.
        reason = first_line(error)
        raise ModelError(
            f"the table of the tokenizer {TIKTOKEN_SCHEME}{name} cannot be fetched: {reason}",
            hint="check the network, or set TIKTOKEN_CACHE_DIR to a folder that has it; without"
            " --api-tokenizer the tokens are told from what the API returns",
        ) from error


def shown_ids(tokens: Sequence[Token], ids: Sequence[int | None]) -> dict[int, float]:
    """Log-probabilities by token id; of ids that stand for the same, the sum of both."""
    found: dict[int, float] = {}
    for token, token_id in zip(tokens, ids, strict=True):
        if token_id is not None:
            before = found.get(token_id, -np.inf)
            found[token_id] = float(np.logaddexp(before, token.logprob))
    return found
