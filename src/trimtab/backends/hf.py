"""A transformers model as expert, reference or host."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, final

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from trimtab.align.strings import Strings
from trimtab.backends.heads import check_unembedding, read_unembedding
from trimtab.backends.seq2seq import max_source_tokens, source_ids, target_start
from trimtab.backends.tokenizers import (
    ENCODING,
    encode_all_following,
    encode_following,
    encode_plain,
    read_vocabulary,
)
from trimtab.errors import InputError, ModelError
from trimtab.unembedding import Unembedding, weight_sha256
from trimtab.vocab import Vocabulary


@dataclass(frozen=True)
class ModelFingerprint:
    """What an adapter checks before it trusts a small model.

    Attributes:
        vocabulary_sha256: Of every token's bytes and the special ids.
        unembedding_sha256: Of every weight of the unembedding, rounded to bfloat16.
    """

    vocabulary_sha256: str
    unembedding_sha256: str


class ReadText(NamedTuple):
    """What a model makes of tokens.

    Attributes:
        hidden: Final hidden states, shape [batch, seq, hidden].
        logits: Where an engine computes them by a head of its own, those of the last positions,
            shape [batch, last, vocab]; None where the unembedding of the states gives them.
    """

    hidden: Tensor
    logits: Tensor | None = None


@final
@dataclass(eq=False)
class HFModel:
    """A language model with its tokenizer, in evaluation mode.

    Attributes:
        ref: What the user called it.
        model: The live model.
        tokenizer: Its tokenizer.
        vocabulary: The bytes of every token id.
        unembedding: Its last step, made of the live parameters.
        preamble: Token ids that it reads before every text, in every window. Set it with
            `dataclasses.replace`: both then share one live model and their fingerprint.
        source: Names the weights on disk that the live model holds, for what is kept of it; None
            for a model that was made or changed in memory, of which nothing is kept.
        revision: The hub's commit whose files it was opened from, if it came from there.
        never_ends: Nothing ends a continuation but its length, whatever the model says.
    """

    ref: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    vocabulary: Vocabulary = field(repr=False)
    unembedding: Unembedding = field(repr=False)
    preamble: tuple[int, ...] = field(default=(), repr=False)
    source: str | None = field(default=None, repr=False)
    revision: str | None = field(default=None, repr=False)
    never_ends: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse a preamble after which no text fits.

        Raises:
            InputError: Preamble and first token fill the model's positions.
        """
        limit = self.max_tokens if self.preamble else None
        if limit is not None and (before := len(self.context_ids())) >= limit:
            raise InputError(
                f"{before} tokens are to be read before every text, and {self.ref} has positions"
                f" for {limit}",
                hint=f"shorten the preamble to less than {limit} tokens",
            )

    @property
    def device(self) -> torch.device:
        """Device that token ids go to first."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[union-attr]

    @property
    def is_encoder_decoder(self) -> bool:
        """The model reads a source text and continues a second one, as T5 does."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def has_own_logits(self) -> bool:
        """An engine outside torch runs the model, and `unembedding` is a copy of its head."""
        return bool(getattr(self.model, "has_own_logits", False))

    @property
    def max_tokens(self) -> int | None:
        """Positions that the model has, for `context_ids` and text; None where unbounded."""
        config = self.model.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None)

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end a continuation: of the tokenizer and of the generation settings."""
        if self.never_ends:
            # An id that no token has: of none at all transformers would take the model's own.
            return frozenset([-1])
        generation = getattr(self.model, "generation_config", None)
        configured = getattr(generation, "eos_token_id", None)
        several = configured if isinstance(configured, list) else [configured]
        return frozenset(i for i in (*several, self.vocabulary.eos_id) if i is not None)

    @property
    def pad_id(self) -> int:
        """What fills a batch's shorter rows up; where a tokenizer has nothing for it, an end."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) else max(min(self.end_ids, default=0), 0)

    def padded(self, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Prompts as one batch, as transformers' `generate` takes it by name.

        Args:
            prompts: Token ids of each, at least one.

        Returns:
            `input_ids` and `attention_mask`, each of shape [prompts, longest].
        """
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), longest), self.pad_id)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            # An encoder counts its positions from the left; a decoder goes on from the right.
            begin = 0 if self.is_encoder_decoder else longest - len(prompt)
            place = slice(begin, begin + len(prompt))
            ids[row, place], mask[row, place] = torch.tensor(prompt), 1
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    def encode(self, text: str, *, markup: bool = False) -> list[int]:
        """Encode a text, without adding special tokens.

        Args:
            text: Any text.
            markup: The names of special tokens in the text mean those tokens, as in what
                `chat_text` returns; otherwise they are ordinary text.

        Returns:
            Token ids, which may be none.
        """
        if markup:
            with ENCODING:
                ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return list(ids)
        return encode_plain(self.tokenizer, text, prefix_space=self.vocabulary.prefix_space)

    def encode_source(self, text: str, *, markup: bool = False, cut: bool = False) -> list[int]:
        """Encode a source text of an encoder-decoder, with the special tokens around it.

        Args:
            text: Any text.
            markup: As in `encode`.
            cut: Leave out the last tokens of a text for which the encoder has no positions.

        Raises:
            InputError: The source has more tokens than the encoder has positions.
        """
        ids = source_ids(self.tokenizer, text, markup=markup)
        limit = max_source_tokens(self.model)
        if limit is not None and len(ids) > limit:
            if cut:
                return [*ids[: limit - 1], ids[-1]]
            raise InputError(
                f"a source text has {len(ids)} tokens, and the encoder of {self.ref} has positions"
                f" for {limit}",
                hint="cut the source into sentences or paragraphs",
            )
        return ids

    def encode_following(self, text: str) -> list[int]:
        """Encode a text that follows other tokens: the tokenizer's own space is not put before it.

        Args:
            text: Any text, of which the names of special tokens are a part like others.
        """
        return encode_following(self.tokenizer, text, self.vocabulary)

    @property
    def strings(self) -> Strings:
        """Its tokens as strings, and where its tokenizer cuts."""
        # A protocol's property may be a property, and no cached one.
        return self._strings

    @cached_property
    def _strings(self) -> Strings:
        return Strings(
            self.vocabulary,
            self.encode_following,
            lambda texts: encode_all_following(self.tokenizer, texts, self.vocabulary),
        )

    @cached_property
    def first_ids(self) -> list[int]:
        """Tokens that the model expects before any text: of the target, in an encoder-decoder."""
        if self.is_encoder_decoder:
            return target_start(self.model, self.tokenizer)
        return [] if self.vocabulary.bos_id is None else [self.vocabulary.bos_id]

    def context_ids(self) -> list[int]:
        """Ids that the model reads before a text: its first token and the preamble."""
        return [*self.first_ids, *self.preamble]

    def chat_text(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """Render chat messages with the model's own template; encode it with `markup`.

        Args:
            messages: Each with `role` and `content`.
            add_generation_prompt: End with the opening of the assistant's reply.

        Raises:
            ModelError: The model has no chat template, or its template refuses the messages.
        """
        if not self.tokenizer.chat_template:
            raise ModelError(
                f"{self.ref} has no chat template",
                hint="use an instruction-tuned model, or give plain prompts",
            )
        try:
            rendered = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateError as error:
            raise ModelError(
                f"the chat template of {self.ref} refuses the messages: {error}",
                hint="give messages with the roles that this model knows, in its order",
            ) from error
        return str(rendered)

    def hidden(
        self,
        token_ids: Tensor,
        *,
        encoder_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute the inputs of the head; `unembedding.logits` of them are the logits.

        Args:
            token_ids: Token ids, shape [batch, seq]; of the decoder, in an encoder-decoder.
            encoder_ids: Source of an encoder-decoder, shape [batch, source]; None is an empty
                source, a single end token.
            attention_mask: 1 for tokens and 0 for padding, which goes on the right, of
                `token_ids`, shape [batch, seq].

        Returns:
            Final hidden states, shape [batch, seq, hidden].

        Raises:
            InputError: More tokens than the model has positions.
        """
        inputs = self._inputs(token_ids, encoder_ids, attention_mask)
        with torch.no_grad():
            if not self.is_encoder_decoder:
                return self.model.base_model(**inputs, use_cache=False).last_hidden_state
            source = self.model.get_encoder()(inputs["input_ids"]).last_hidden_state
            return self.model.get_decoder()(
                input_ids=inputs["decoder_input_ids"],
                attention_mask=inputs.get("decoder_attention_mask"),
                encoder_hidden_states=source,
                use_cache=False,
            ).last_hidden_state

    def logits(
        self,
        token_ids: Tensor,
        *,
        encoder_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute the model's own logits, [batch, seq, vocab]; arguments and errors as `hidden`."""
        inputs = self._inputs(token_ids, encoder_ids, attention_mask)
        with torch.no_grad():
            return self.model(**inputs, use_cache=False).logits

    def read(
        self, token_ids: Tensor, *, encoder_ids: Tensor | None = None, last: int = 0
    ) -> ReadText:
        """Compute hidden states, and with them what only an engine of its own can tell.

        Args:
            token_ids: As `hidden`.
            encoder_ids: As `hidden`.
            last: Positions at the end whose logits an engine is to tell; 0 for all.

        Raises:
            InputError: As `hidden`.
        """
        if not self.has_own_logits:
            return ReadText(self.hidden(token_ids, encoder_ids=encoder_ids))
        inputs = self._inputs(token_ids, encoder_ids, None)
        with torch.no_grad():
            read = self.model.base_model(**inputs, use_cache=False, logits_to_keep=last)
        return ReadText(read.last_hidden_state, read.logits)

    @cached_property
    def fingerprint(self) -> ModelFingerprint:
        """Fingerprint of vocabulary and unembedding, equal for every dtype of loading."""
        return ModelFingerprint(self.vocabulary.sha256, weight_sha256(self.unembedding.weight))

    def _inputs(
        self, token_ids: Tensor, encoder_ids: Tensor | None, attention_mask: Tensor | None
    ) -> dict[str, Tensor]:
        self.check_length(token_ids.shape[1])
        device = self.device
        token_ids = token_ids.to(device)
        mask = None if attention_mask is None else attention_mask.to(device)
        if not self.is_encoder_decoder:
            given = {"input_ids": token_ids, "attention_mask": mask}
        else:
            source = self._empty_source(len(token_ids)) if encoder_ids is None else encoder_ids
            given = {
                "input_ids": source.to(device),
                "decoder_input_ids": token_ids,
                "decoder_attention_mask": mask,
            }
        return {name: value for name, value in given.items() if value is not None}

    def check_length(self, tokens: int) -> None:
        """Refuse a text of more tokens than the model has positions for, with an InputError."""
        limit = self.max_tokens
        if limit is not None and tokens > limit:
            preamble = f", {len(self.preamble)} of them the preamble," if self.preamble else ""
            raise InputError(
                f"{self.ref} is to read {tokens} tokens at once{preamble} and has positions for"
                f" {limit}",
                hint="use shorter windows (--window-tokens)"
                + (", or a shorter preamble" if self.preamble else ""),
            )

    def _empty_source(self, batch: int) -> Tensor:
        end = self.vocabulary.eos_id
        return torch.full((batch, 1), 0 if end is None else end)


def adopt_model(ref: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> HFModel:
    """Take a live transformers model and its tokenizer, and check that its head is understood.

    Args:
        ref: Name of the model.
        model: A causal or sequence-to-sequence model; put into evaluation mode.
        tokenizer: Its tokenizer.

    Raises:
        ModelError: The head or the tokenizer does something unknown.
    """
    model.eval()
    unembedding = read_unembedding(model)
    vocabulary = read_vocabulary(tokenizer, len(unembedding.weight))
    opened = HFModel(ref, model, tokenizer, vocabulary, unembedding)
    probe = torch.tensor([[*opened.context_ids(), 3, 5, 7]])
    check_unembedding(
        model, unembedding, lambda: (opened.hidden(probe), opened.logits(probe)), ref=ref
    )
    return opened


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and notices inside, as they were outside."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
