"""A GGUF file in llama.cpp: tokens in, final hidden states and logits out, in one decode."""

import ctypes
import weakref
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from trimtab.backends.llamacpp.library import (
    IN_TORCH,
    MAX_ROWS,
    has_tiles,
    last_words,
    library,
)
from trimtab.backends.prefix import common_length
from trimtab.errors import InputError, ModelError

OUTPUT_VALUES = 2**25
"""Logits that one decode may leave behind: llama.cpp keeps those of every token whose state is
asked for. 134 MB, and as much again for computing them."""

MIN_BATCH_TOKENS, MAX_BATCH_TOKENS = 32, 512
MIN_CONTEXT_TOKENS = 512


@dataclass(frozen=True)
class Read:
    """What llama.cpp makes of the new tokens of one row.

    Attributes:
        hidden: Final hidden states, shape [new tokens, hidden].
        logits: Its own logits after the last of the new tokens, shape [asked, vocab].
    """

    hidden: NDArray[np.float32]
    logits: NDArray[np.float32]


@final
class Engine:
    """A model in llama.cpp, which keeps the keys and values of each row that it has read.

    A caller says what a row has read, as tokens, and what is new. Whatever of that is not there
    any more (rows were reordered, cut back, read for somebody else) is read again, so that no
    answer depends on what was asked before.
    """

    def __init__(self, path: Path, *, in_float32: bool = False) -> None:
        """Map a file into memory.

        Args:
            path: A GGUF file.
            in_float32: Keep keys and values in float32, and attend without llama.cpp's fused
                kernel, which rounds them to float16 whatever they are kept in. Products with
                quantised weights are rounded all the same.

        Raises:
            MissingDependencyError: llama-cpp-python is not installed.
            ModelError: llama.cpp cannot load the file.
        """
        self._lib = lib = library()
        self._path = path
        self._in_float32 = in_float32
        params = lib.llama_model_default_params()
        params.load_mode = lib.LLAMA_LOAD_MODE_MMAP
        # llama.cpp sets a thread's tiles up once, and torch's products, on the same threads, let go
        # of theirs afterwards: the next one of llama.cpp's would end the process.
        params.use_extra_bufts = not has_tiles()
        self._model = _Model(lib, lib.llama_model_load_from_file(str(path).encode(), params))
        model = self._model.handle
        if not model:
            raise ModelError(
                f"llama.cpp cannot load {path}: {last_words()}",
                hint=f"download the file again, or open it in torch: {path} without llamacpp:",
            )
        if lib.llama_model_has_encoder(model) or not lib.llama_model_has_decoder(model):
            raise ModelError(
                f"{path} is no model that continues a text", hint="use a decoder-only model"
            )
        self.hidden_size = int(lib.llama_model_n_embd_out(model))
        self.vocab_size = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)))
        self.max_tokens = int(lib.llama_model_n_ctx_train(model))
        fitting = OUTPUT_VALUES // self.vocab_size
        self.batch_tokens = max(MIN_BATCH_TOKENS, min(fitting, MAX_BATCH_TOKENS))
        self._batch = _Batch(lib, self.batch_tokens)
        self._context: Context | None = None
        self._lora: Any = None

    def with_lora(self, path: Path) -> "Engine":
        """The same weights with a LoRA beside them, and keys and values of its own.

        Args:
            path: A GGUF adapter to this file; not needed any more once it is read.

        Raises:
            ModelError: llama.cpp does not take it.
        """
        lora = self._lib.llama_adapter_lora_init(self._model.handle, str(path).encode())
        if not lora:
            raise ModelError(
                f"llama.cpp does not take the LoRA to {self._path}: {last_words()}",
                hint=IN_TORCH,
            )
        other = copy(self)
        other._batch, other._context = _Batch(self._lib, self.batch_tokens), None
        # Freed with the model.
        other._lora = lora
        return other

    def read(
        self,
        past: Sequence[Sequence[int]],
        new: Sequence[Sequence[int]],
        *,
        logits: int = 0,
        room: int = 0,
    ) -> list[Read]:
        """Read new tokens of some rows.

        Args:
            past: Tokens that each row has read before.
            new: Tokens that follow, of each row.
            logits: How many of a row's last new tokens are answered with logits.
            room: Tokens that a row is to have in the end, if that is known.

        Raises:
            InputError: A row is longer than the model's positions.
            ModelError: There are more rows than llama.cpp keeps, or it fails.
        """
        context = self._ready(past, new, room)
        hidden = [np.zeros((len(ids), self.hidden_size), np.float32) for ids in new]
        kept = [min(logits, len(ids)) for ids in new]
        own = [np.zeros((count, self.vocab_size), np.float32) for count in kept]
        begins = [context.rewind(row, ids) for row, ids in enumerate(past)]
        firsts = [len(ids) for ids in past]
        ends = [first + len(ids) for first, ids in zip(firsts, new, strict=True)]
        skipped = [end - count for end, count in zip(ends, kept, strict=True)]
        for tokens in _batches([*map(_joined, past, new, begins)], begins, self.batch_tokens):
            self._decode(context, tokens)
            for number, token in enumerate(tokens):
                row = token.sequences[0]
                if (offset := token.position - firsts[row]) >= 0:
                    hidden[row][offset] = context.state(number, self.hidden_size)
                if (offset := token.position - skipped[row]) >= 0:
                    own[row][offset] = context.logits(number, self.vocab_size)
        return [Read(*both) for both in zip(hidden, own, strict=True)]

    def _decode(self, context: "Context", tokens: Sequence["Token"]) -> None:
        try:
            self.decode(context, tokens)
        except ModelError:
            self._context = None
            raise
        for token in tokens:
            context.held[token.sequences[0]].append(token.token_id)

    def decode(self, context: "Context", tokens: Sequence["Token"]) -> None:
        """Read tokens in one pass.

        Args:
            context: Gets their keys and values, and gives their states.
            tokens: At most `batch_tokens`.

        Raises:
            ModelError: llama.cpp fails; what the context holds is not known then.
        """
        batch = self._batch.filled(tokens)
        code = self._lib.llama_decode(context.handle, batch)
        if code:
            raise ModelError(
                f"llama.cpp failed to read with {self._path} (code {code}): {last_words()}",
                hint="give a shorter text or fewer prompts at once, if memory is short",
            )

    def _ready(
        self, past: Sequence[Sequence[int]], new: Sequence[Sequence[int]], room: int
    ) -> "Context":
        """A context with room for these rows: the one that is there, or a larger one."""
        longest = max((len(old) + len(ids) for old, ids in zip(past, new, strict=True)), default=0)
        if self.max_tokens and longest > self.max_tokens:
            raise InputError(
                f"{self._path.name} is to read {longest} tokens and has positions for"
                f" {self.max_tokens}",
                hint="give a shorter text, or shorter windows",
            )
        if len(new) > MAX_ROWS:
            raise ModelError(
                f"llama.cpp was given {len(new)} rows at once and keeps {MAX_ROWS}",
                hint="give fewer prompts at once",
            )
        found = self._context
        if found is None or found.rows < len(new) or found.row_tokens < longest:
            wanted = max(longest, room, MIN_CONTEXT_TOKENS)
            tokens = 1 << (wanted - 1).bit_length()
            # The old one goes first: both may not fit into memory.
            self._context = found = None
            found = self.context(len(new), min(tokens, self.max_tokens or tokens))
            self._context = found
        return found

    def context(self, rows: int, row_tokens: int, *, shared: bool = False) -> "Context":
        """New keys and values.

        Args:
            rows: Sequences, at most `MAX_ROWS`.
            row_tokens: Tokens of each.
            shared: A token may belong to several sequences; `row_tokens` are then those of all.

        Raises:
            ModelError: There is no room for them.
        """
        lib = self._lib
        params = lib.llama_context_default_params()
        params.n_seq_max, params.n_ctx = rows, row_tokens if shared else rows * row_tokens
        params.kv_unified = shared
        params.n_batch = params.n_ubatch = self.batch_tokens
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        if self._in_float32:
            params.type_k = params.type_v = lib.GGML_TYPE_F32
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # States of every token, not one of a text.
        params.embeddings, params.pooling_type = True, lib.LLAMA_POOLING_TYPE_NONE
        handle = lib.llama_init_from_model(self._model.handle, params)
        if not handle:
            raise ModelError(
                f"llama.cpp has no room for {rows} x {row_tokens} tokens of {self._path.name}:"
                f" {last_words()}",
                hint="give shorter texts or fewer prompts at once",
            )
        if self._lora is not None:
            loras, scales = (
                (lib.llama_adapter_lora_p_ctypes * 1)(self._lora),
                (ctypes.c_float * 1)(1),
            )
            if lib.llama_set_adapters_lora(handle, loras, 1, scales):
                lib.llama_free(handle)
                raise ModelError(
                    f"llama.cpp does not put the LoRA beside {self._path.name}: {last_words()}",
                    hint=IN_TORCH,
                )
        return Context(self._model, handle, rows)


@dataclass(frozen=True)
class Token:
    """A token to be read.

    Attributes:
        token_id: The token.
        position: Tokens before it in its sequence.
        sequences: That it belongs to; it sees what belongs to the first.
        asked: Its state and logits are wanted.
    """

    token_id: int
    position: int
    sequences: Sequence[int]
    asked: bool = True


def _joined(past: Sequence[int], new: Sequence[int], begin: int) -> list[int]:
    return [*past[begin:], *new]


def _batches(
    rows: Sequence[Sequence[int]], begins: Sequence[int], size: int
) -> Iterator[list[Token]]:
    """All tokens of all rows, in the order of each row, some at a time."""
    tokens = [
        Token(token_id, begin + offset, (row,))
        for row, (ids, begin) in enumerate(zip(rows, begins, strict=True))
        for offset, token_id in enumerate(ids)
    ]
    for first in range(0, len(tokens), size):
        yield tokens[first : first + size]


@final
class _Model:
    """A model in llama.cpp, freed when nothing refers to it any more."""

    def __init__(self, lib: Any, handle: Any) -> None:
        self.lib = lib
        self.handle = handle
        if handle:
            weakref.finalize(self, lib.llama_model_free, handle)


@final
class _Batch:
    """Memory for the tokens of a pass."""

    def __init__(self, lib: Any, tokens: int) -> None:
        self._batch = lib.llama_batch_init(tokens, 0, MAX_ROWS)
        weakref.finalize(self, lib.llama_batch_free, self._batch)

    def filled(self, tokens: Sequence[Token]) -> Any:
        """llama.cpp's own batch of these tokens."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for number, token in enumerate(tokens):
            batch.token[number] = token.token_id
            batch.pos[number] = token.position
            batch.n_seq_id[number] = len(token.sequences)
            for place, sequence in enumerate(token.sequences):
                batch.seq_id[number][place] = sequence
            batch.logits[number] = token.asked
        return batch


@final
class Context:
    """Keys and values of some rows in llama.cpp, and the tokens that they are of."""

    def __init__(self, model: _Model, handle: Any, rows: int) -> None:
        self._lib = lib = model.lib
        self.handle = handle
        self.rows = rows
        self.row_tokens = int(lib.llama_n_ctx_seq(handle))
        self.held: list[list[int]] = [[] for _ in range(rows)]
        weakref.finalize(self, _free_context, model, handle)

    def rewind(self, row: int, past: Sequence[int]) -> int:
        """Forget what of a row does not begin these tokens; how many of them are left."""
        held = self.held[row]
        shared = common_length(held, past)
        memory = self._lib.llama_get_memory(self.handle)
        # Asked even where nothing is to go: an interrupted decode may have left more than is held.
        if not self._lib.llama_memory_seq_rm(memory, row, shared, -1):
            # A recurrent state cannot go back.
            self._lib.llama_memory_seq_rm(memory, row, -1, -1)
            shared = 0
        del held[shared:]
        return shared

    def cut(self, sequence: int, length: int) -> None:
        """Forget all but the first tokens of a sequence that shares its tokens with others."""
        memory = self._lib.llama_get_memory(self.handle)
        if not self._lib.llama_memory_seq_rm(memory, sequence, length, -1):
            raise ModelError(
                "llama.cpp cannot go back in a text with this model, so it reads no tree",
                hint=IN_TORCH,
            )

    def copy(self, sequence: int, other: int) -> None:
        """Let another sequence, which has none, have a sequence's tokens too."""
        memory = self._lib.llama_get_memory(self.handle)
        self._lib.llama_memory_seq_cp(memory, sequence, other, -1, -1)

    def state(self, place: int, size: int) -> NDArray[np.float32]:
        """The state of a token of the last decode; the next one overwrites it."""
        found = self._lib.llama_get_embeddings_ith(self.handle, place)
        return np.ctypeslib.as_array(found, (size,))

    def logits(self, place: int, size: int) -> NDArray[np.float32]:
        """The logits after a token of the last decode; the next one overwrites them."""
        found = self._lib.llama_get_logits_ith(self.handle, place)
        return np.ctypeslib.as_array(found, (size,))


def _free_context(model: _Model, handle: Any) -> None:
    """Free a context while its model, which is given for that, is still there."""
    model.lib.llama_free(handle)
