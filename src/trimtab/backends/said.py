"""What both small models say after some contexts, by the ways to read them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

from torch import Tensor

from trimtab.align.replies import Asked, Reply
from trimtab.align.strings import Strings
from trimtab.backends.reading import Who
from trimtab.backends.ways import Inside, Ways


@final
@dataclass(frozen=True)
class Said:
    """What both models say after the contexts of a part.

    Attributes:
        ways: Of each context.
        logprobs: By model, of the token after each node that matters, shape [nodes, vocab].
        place: Row of each node.
        small: The small model's strings.
    """

    ways: Sequence[Ways]
    logprobs: Mapping[Who, Tensor]
    place: Mapping[int, int]
    small: Strings

    def replies(self, who: Who, after_inside: Sequence[Tensor] = ()) -> list[list[Reply]]:
        """One model's replies to each context.

        Args:
            who: Which model.
            after_inside: Its probabilities of what follows each way of `inside`, each of shape
                [vocab] (default: these ways are left out).
        """
        known: list[list[tuple[Inside, Tensor]]] = [[] for _ in self.ways]
        for one, after in zip(self.inside if after_inside else (), after_inside, strict=True):
            known[one.question].append((one, after.log()))
        return [
            ways.replies(self.logprobs[who], self.place, self.small, inside)
            for ways, inside in zip(self.ways, known, strict=True)
        ]

    @cached_property
    def inside(self) -> list[Inside]:
        """Ways through the contexts' last tokens of which it is to be asked what follows.

        The expert says which, for both models, so that a blend's ratio compares like with like.
        """
        return [
            one
            for question, ways in enumerate(self.ways)
            for one in ways.inside(question, self.logprobs["expert"], self.place, self.small)
        ]

    @property
    def asked_inside(self) -> list[Asked]:
        """What is to be asked about these ways: nothing longer than what has been read."""
        return [Asked(one.question, one.node, one.token_id) for one in self.inside]
