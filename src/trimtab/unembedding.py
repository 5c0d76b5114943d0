"""The last step of a language model: from its final hidden state to logits."""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trimtab.few_rows import product

BLOCK_TOKENS = 2048
"""Tokens whose logits a CPU computes at once: rows and results of so many stay in its caches, and
a vocabulary of a quarter million takes little more than half the time of one product. Not so in
bfloat16, where one product is the faster way (bench/results/2026-11-27-few-rows-passes.json)."""


class Unembeds(Protocol):
    """What makes a model's own logits of final hidden states, wherever its weights lie."""

    @property
    def device(self) -> torch.device:
        """Where it takes states."""
        ...

    def logits(self, hidden: Tensor, /) -> Tensor:
        """The model's logits, shape [..., vocab], for states of shape [..., hidden]."""
        ...


@dataclass(frozen=True)
class Unembedding:
    """All that turns a hidden state (the head's input) into a model's own logits.

    logits = cap(scale * (weight @ hidden) + bias), cap(z) = softcap * tanh(z / softcap).

    Attributes:
        weight: Token rows, shape [vocab, hidden]; the live parameter, never a copy.
        bias: Added to each logit, shape [vocab] (Marian's final_logits_bias, a head's bias).
        scale: Multiplies W h: T5's d^-0.5 with tied embeddings, Cohere's logit_scale,
            the inverse of Granite's logits_scaling.
        softcap: Gemma 2's bound on the logits.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.weight.device

    def logits(self, hidden: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Compute the model's logits, of all tokens or of some.

        Args:
            hidden: Final hidden states, shape [..., hidden], on any device.
            token_ids: Token rows to compute, shape [chosen]; None computes all.

        Returns:
            Logits in the weight's dtype and on its device, shape [..., vocab] or [..., chosen].
        """
        # A host that is spread over devices may have its head elsewhere than its last layer.
        hidden = hidden.to(self.weight.device, self.weight.dtype)
        chosen = slice(None) if token_ids is None else token_ids
        tokens = len(self.weight) if token_ids is None else len(token_ids)
        states = hidden.reshape(-1, hidden.shape[-1])
        if len(states) < 2 or tokens <= BLOCK_TOKENS or not self._is_for_blocks(hidden):
            return self._some(hidden, chosen)
        logits = states.new_empty(len(states), tokens)
        for start in range(0, tokens, BLOCK_TOKENS):
            block = slice(start, start + BLOCK_TOKENS)
            logits[:, block] = self._some(states, block if token_ids is None else token_ids[block])
        return logits.reshape(*hidden.shape[:-1], tokens)

    def _is_for_blocks(self, hidden: Tensor) -> bool:
        is_followed = torch.is_grad_enabled() and (
            hidden.requires_grad or self.weight.requires_grad
        )
        is_bfloat16 = self.weight.dtype is torch.bfloat16
        return self.device.type == "cpu" and not is_bfloat16 and not is_followed

    def _some(self, hidden: Tensor, chosen: Tensor | slice) -> Tensor:
        weight = self.weight[chosen]
        logits = product(hidden.reshape(-1, hidden.shape[-1]), weight)
        return self.of_linear(logits.reshape(*hidden.shape[:-1], len(weight)), chosen)

    def of_linear(self, logits: Tensor, chosen: Tensor | slice = slice(None)) -> Tensor:
        """Add scale, bias and cap to values of W h, which `linear` undoes.

        Args:
            logits: W h, shape [..., chosen].
            chosen: Token rows that these are, all by default.

        Returns:
            The model's logits, shape [..., chosen].
        """
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.bias is not None:
            logits = logits + self.bias[chosen]
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def linear(self, logits: Tensor) -> Tensor:
        """Undo cap, bias and scale: the values of W h that gave these logits.

        A soft-cap is inverted exactly inside (-softcap, softcap); logits at the bound are moved
        inside by 1e-6 of it, since arctanh has a pole there.

        Args:
            logits: A model's own logits, shape [..., vocab].

        Returns:
            W h, shape [..., vocab].
        """
        if self.softcap is not None:
            bounded = (logits / self.softcap).clamp(-1 + 1e-6, 1 - 1e-6)
            logits = self.softcap * torch.arctanh(bounded)
        if self.bias is not None:
            logits = logits - self.bias
        return logits / self.scale


def weight_sha256(weight: Tensor) -> str:
    """Hash a weight's shape and all its values, rounded to bfloat16.

    The rounding makes the hash of a model the same whether it was loaded as float32 or as
    bfloat16; a change below bfloat16's resolution is not seen.

    Args:
        weight: Any real weight, shape [rows, columns].
    """
    digest = hashlib.sha256(str(tuple(weight.shape)).encode())
    rows = max(1, 2**24 // max(1, weight.shape[-1]))
    for part in weight.detach().split(rows):
        rounded = part.to(torch.bfloat16).cpu().contiguous()
        digest.update(rounded.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
