"""What a host lets us see, as Protocols: a verb names the one that it needs."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from trimtab.align.strings import Strings
from trimtab.unembedding import Unembedding
from trimtab.vocab import Vocabulary


@runtime_checkable
class GivesText(Protocol):
    """A host that continues text; all that an API without logprobs offers."""

    def complete(self, prompt: str, *, max_new_tokens: int) -> str:
        """Continue a prompt greedily."""
        ...


@runtime_checkable
class GivesTopLogprobs(Protocol):
    """A host that shows its most likely next tokens."""

    def top_logprobs(self, text: str, *, top_k: int) -> Mapping[str, float]:
        """Natural-log probabilities of the most likely next token strings."""
        ...


@runtime_checkable
class GivesStrings(Protocol):
    """A host whose tokens' bytes are known, whatever else it shows."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The bytes of every token id."""
        ...

    @property
    def strings(self) -> Strings:
        """Its tokens as strings, and where its tokenizer cuts."""
        ...


@runtime_checkable
class GivesLogits(GivesStrings, Protocol):
    """A host that shows all its logits and whose tokens' bytes are known."""

    @property
    def ref(self) -> str:
        """What the user called it."""
        ...

    def logits(self, token_ids: Tensor) -> Tensor:
        """The model's own logits, shape [batch, seq, vocab], for ids of shape [batch, seq]."""
        ...


@runtime_checkable
class GivesHidden(GivesLogits, Protocol):
    """A host that shows the input of its language-model head."""

    @property
    def unembedding(self) -> Unembedding:
        """Its last step, made of the live parameters."""
        ...

    def hidden(self, token_ids: Tensor) -> Tensor:
        """Final hidden states, shape [batch, seq, hidden]; unembedding.logits(h) are the logits."""
        ...


@runtime_checkable
class Trains(GivesHidden, Protocol):
    """A model whose weights we may train: the small one, never a host."""

    @property
    def model(self) -> nn.Module:
        """The live model."""
        ...

    def encode(self, text: str) -> Sequence[int]:
        """Token ids of a text without special tokens."""
        ...
