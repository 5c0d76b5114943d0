"""A model that runs in llama.cpp, as transformers' `generate` and our steering see a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from trimtab.backends.llamacpp.engine import Engine
from trimtab.backends.llamacpp.trees import Line, Tree, TreeReader
from trimtab.errors import ModelError


@final
class TokenCache:
    """What the rows of a batch have read, as tokens; keys and values stay in llama.cpp.

    Attributes:
        rows: Token ids of each row, None in columns of padding.
        room: Columns that a row will have in the end, if that is known.
    """

    is_compileable = False

    def __init__(self, room: int = 0) -> None:
        """Begin without rows."""
        self.rows: list[list[int | None]] = []
        self.room = room

    def get_seq_length(self) -> int:
        """Columns that have been read."""
        return len(self.rows[0]) if self.rows else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns; their number is counted below zero, as transformers does."""
        if tokens_to_remove:
            self.rows = [row[:tokens_to_remove] for row in self.rows]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take up other rows: row i goes on from row beam_idx[i]."""
        self.rows = [list(self.rows[row]) for row in beam_idx.tolist()]

    def activate_past_recording(self) -> None:
        """All that was read can be gone back to anyway."""


@dataclass
class EngineOutput(ModelOutput):
    """What llama.cpp makes of a batch; columns of padding are zero.

    Attributes:
        last_hidden_state: Final hidden states of the new columns, shape [rows, columns, hidden].
        logits: Its own logits of the last columns, shape [rows, asked columns, vocab].
        past_key_values: What has been read.
    """

    last_hidden_state: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: TokenCache | None = None


@final
class EngineTrunk(nn.Module):
    """Everything of a model, the head included, in llama.cpp."""

    def __init__(self, engine: Engine) -> None:
        """Take an engine, which other modules may share."""
        super().__init__()
        self.engine = engine

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: TokenCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | None = None,
    ) -> EngineOutput:
        """Read new columns of a batch.

        Args:
            input_ids: Shape [rows, new columns].
            attention_mask: 1 for tokens and 0 for padding on either side; of the new columns, or
                of all.
            past_key_values: What the rows have read before; the new columns are added to it.
            use_cache: Give back what has been read, to go on from.
            logits_to_keep: Last columns to give the logits of; 0 for all, None for none.
        """
        columns = input_ids.shape[1]
        cache = TokenCache() if past_key_values is None else past_key_values
        old = cache.rows or [[] for _ in input_ids]
        new = _columns(input_ids, attention_mask)
        kept = columns if logits_to_keep == 0 else min(logits_to_keep or 0, columns)
        read = self.engine.read(
            [_tokens(row) for row in old],
            [_tokens(row) for row in new],
            logits=kept,
            room=cache.room,
        )
        cache.rows = [[*before, *after] for before, after in zip(old, new, strict=True)]
        states = torch.zeros(len(new), columns, self.engine.hidden_size)
        logits = torch.zeros(len(new), kept, self.engine.vocab_size)
        for row, (ids, one) in enumerate(zip(new, read, strict=True)):
            is_token = torch.tensor([token_id is not None for token_id in ids])
            states[row, is_token] = torch.from_numpy(one.hidden)
            asked = is_token[columns - kept :]
            if count := int(asked.sum()):
                logits[row, asked] = torch.from_numpy(one.logits[-count:])
        given = cache if use_cache is not False else None
        return EngineOutput(states, None if logits_to_keep is None else logits, given)


def _columns(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int | None]]:
    rows: list[list[int]] = input_ids.tolist()
    if attention_mask is None:
        return [list(row) for row in rows]
    masks = attention_mask[:, -input_ids.shape[1] :].tolist()
    return [
        [token_id if kept else None for token_id, kept in zip(row, mask, strict=True)]
        for row, mask in zip(rows, masks, strict=True)
    ]


def _tokens(row: Sequence[int | None]) -> list[int]:
    return [token_id for token_id in row if token_id is not None]


@final
class EngineModel(PreTrainedModel, GenerationMixin):
    """A host in llama.cpp whose tokens transformers chooses.

    Its logits are llama.cpp's own. `lm_head` is a copy of its head in torch, dequantised, for what
    has to read the head's rows: it takes no part in a forward pass.
    """

    base_model_prefix = "trunk"
    main_input_name = "input_ids"
    has_own_logits = True

    def __init__(self, config: PreTrainedConfig, engine: Engine, head: nn.Linear) -> None:
        """Put an engine under transformers' `generate`.

        Args:
            config: Of the model, as transformers would run it.
            engine: Runs it.
            head: Its head, dequantised.
        """
        super().__init__(config)
        self.trunk = EngineTrunk(engine)
        self.lm_head = head
        self._trees = TreeReader(engine)

    def get_output_embeddings(self) -> nn.Linear:
        """The head's copy."""
        return self.lm_head

    def get_input_embeddings(self) -> nn.Linear:
        """The head's copy again, which says where tensors are: no embedding is in torch."""
        return self.lm_head

    def tree_states(self, tree: Tree, wanted: Sequence[int], line: Line) -> Tensor:
        """Final hidden states of nodes of a tree, [wanted, hidden]; as `TreeReader.read`."""
        return torch.from_numpy(self._trees.read(tree, wanted, line))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: TokenCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
    ) -> EngineOutput:
        """As `EngineTrunk.forward`, with the logits of all columns unless fewer are asked for."""
        del return_dict
        return self.trunk(input_ids, attention_mask, past_key_values, use_cache, logits_to_keep)

    def prepare_inputs_for_generation(
        self,
        input_ids: Any,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `forward` is to be given: the tokens that no row has read, and the mask of all."""
        del is_first_iteration
        if inputs_embeds is not None:
            raise ModelError("llama.cpp hosts take tokens only", hint="give input_ids")
        new = slice(None) if next_sequence_length is None else slice(-next_sequence_length, None)
        return {
            "input_ids": input_ids[:, new],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
        }

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        del generation_mode, batch_size
        if generation_config.cache_implementation is not None:
            raise ModelError(
                f"cache_implementation={generation_config.cache_implementation} is asked for, and"
                " llama.cpp keeps keys and values itself",
                hint="leave it out",
            )
        given = model_kwargs.get("past_key_values")
        if given is not None and not isinstance(given, TokenCache):
            raise ModelError(
                f"past_key_values is a {type(given).__name__}, and llama.cpp keeps keys and values"
                " itself",
                hint="leave it out, or give a TokenCache",
            )
        if given is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = TokenCache(max_cache_length)
