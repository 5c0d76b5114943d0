"""Rows of different lengths that share each forward pass of a host."""

import inspect
from collections.abc import Iterable, Sequence
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, DynamicLayer

from trimtab.backends.cache_layers import GrowingLayer, Layer, layers_of
from trimtab.backends.hf import HFModel
from trimtab.backends.open import check_in_torch
from trimtab.backends.positions import keeps_single_tokens, positions_follow_length
from trimtab.errors import ModelError


def check_host(host: HFModel) -> None:
    """Refuse a host whose rows cannot be padded on the left, joined and taken apart.

    Raises:
        ModelError: The host is an encoder-decoder, remembers more than keys and values (recurrent
            layers), attends in chunks, has positions that depend on the longest row, or runs
            outside torch.
    """
    check_in_torch(host, "trimtab serve")
    found = None
    if host.is_encoder_decoder:
        found = "is an encoder-decoder"
    elif not keeps_single_tokens(host):
        found = "keeps more or less of a text than keys and values of single tokens"
    elif positions_follow_length(host):
        found = "has positions that depend on the longest text of a batch"
    if found:
        raise ModelError(
            f"{host.ref} {found}, and answers to several requests could not share its passes",
            hint="serve a decoder-only host with plain or sliding-window attention; `trimtab"
            " generate` runs the others",
        )


@final
class Batch:
    """The key-value caches of the rows that are being answered, padded on the left.

    All layers keep all tokens, those with a sliding window too: since rows end at the same column,
    the distance of two columns is the distance of their tokens, and the window is a matter of the
    mask. A window that forgot tokens would forget the same columns of all rows.
    """

    def __init__(self, host: HFModel) -> None:
        """Begin without rows."""
        self._host = host
        self._cache = DynamicCache()
        self._takes_positions = "position_ids" in inspect.signature(host.model.forward).parameters
        self.lengths: list[int] = []

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    def read(self, cache: DynamicCache, token_ids: Sequence[int]) -> Tensor:
        """Read more tokens of one row that is not in the batch yet.

        Args:
            cache: Of that row alone; empty at first.
            token_ids: The next tokens.

        Returns:
            Final hidden states, shape [tokens, hidden].
        """
        past = cache.get_seq_length()
        mask = torch.ones(1, past + len(token_ids), dtype=torch.long)
        places = torch.arange(past, past + len(token_ids))[None]
        return self._run(torch.tensor([list(token_ids)]), mask, places, cache)[0]

    def join(self, cache: DynamicCache, copies: int = 1) -> None:
        """Add rows that have all read the same, after those that are there."""
        length = cache.get_seq_length()
        longest = max([length, *self.lengths])
        ours = layers_of(self._cache) if self.lengths else [None] * len(cache.layers)
        self._cache = _cache_of(
            None if new is None else _joined(old, new, longest, copies)
            for old, new in zip(ours, layers_of(cache), strict=True)
        )
        self.lengths += [length] * copies

    def keep(self, rows: Sequence[int]) -> None:
        """Keep some rows, in this order, and let go of the others."""
        lengths = [self.lengths[row] for row in rows]
        if not rows:
            self._cache, self.lengths = DynamicCache(), lengths
            return
        index, longest = torch.tensor(list(rows)), max(lengths)

        def kept(side: Tensor) -> Tensor:
            # Columns in which no row has a token are cut off.
            return side[index.to(side.device), :, -longest:].contiguous()

        self._cache = _cache_of(
            None if layer is None else (kept(layer[0]), kept(layer[1]))
            for layer in layers_of(self._cache)
        )
        self.lengths = lengths

    def step(self, token_ids: Sequence[int]) -> Tensor:
        """Read one more token of each row; final hidden states, shape [rows, hidden]."""
        longest, lengths = max(self.lengths), torch.tensor(self.lengths)
        mask = (torch.arange(longest)[None] >= longest - lengths[:, None]).long()
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], 1)
        ids = torch.tensor(list(token_ids))[:, None]
        hidden = self._run(ids, mask, lengths[:, None], self._cache)[:, -1]
        self.lengths = [length + 1 for length in self.lengths]
        return hidden

    def _run(self, ids: Tensor, mask: Tensor, places: Tensor, cache: DynamicCache) -> Tensor:
        device = self._host.device
        options = {"position_ids": places.to(device)} if self._takes_positions else {}
        return self._host.model.base_model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            past_key_values=cache,
            use_cache=True,
            **options,
        ).last_hidden_state


def _cache_of(layers: Iterable[Layer]) -> DynamicCache:
    cache = DynamicCache()
    cache.layers.extend(
        DynamicLayer() if layer is None else GrowingLayer.of(*layer) for layer in layers
    )
    return cache


def _joined(ours: Layer, theirs: tuple[Tensor, Tensor], length: int, copies: int) -> Layer:
    if ours is None:
        return theirs[0].repeat(copies, 1, 1, 1), theirs[1].repeat(copies, 1, 1, 1)
    return _stacked(ours[0], theirs[0], length, copies), _stacked(
        ours[1], theirs[1], length, copies
    )


def _stacked(ours: Tensor, theirs: Tensor, length: int, copies: int) -> Tensor:
    theirs = theirs.to(ours.device).expand(copies, -1, -1, -1)
    return torch.cat([pad(side, (0, 0, length - side.shape[-2], 0)) for side in (ours, theirs)])
