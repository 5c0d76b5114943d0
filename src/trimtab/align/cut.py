"""What the end of a host's last token says about the text after it."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.align.candidates import Candidates
from trimtab.align.strings import Strings

ASKED_TOKENS = 64
"""Likeliest small tokens, and host tokens, of which it is asked whether the host still cuts."""

SHARE_BEYOND = 0.1
"""Share that a small token keeps where the host still cuts only before what goes beyond it."""


@dataclass(frozen=True)
class HostCut:
    """Where the host has ended its last token, though the text goes on.

    Attributes:
        strings: The host's.
        last: The host's last token.
        following: Likely next tokens of the host before which it still ends there, sorted.
    """

    strings: Strings
    last: int
    following: Sequence[bytes]

    @staticmethod
    def of(strings: Strings, last: int, host_probs: Tensor, candidates: Candidates) -> "HostCut":
        """Ask about the host's likeliest candidates, with probabilities of shape [candidates]."""
        likely = host_probs[candidates.order].topk(min(len(candidates.order), ASKED_TOKENS))
        texts = [candidates.texts[place] for place in likely.indices.tolist()]
        return HostCut(strings, last, sorted(t for t in texts if strings.still_ends(last, t)))

    def share_of(self, text: bytes) -> float:
        """How much of a text's probability is of texts before which the host ends its token.

        After "u" comes no "8" where "u8" is a token. After " re" comes no "b", which would make
        " reb", and still "base" may come.
        """
        if self.strings.still_ends(self.last, text):
            return 1.0
        place = bisect.bisect_left(self.following, text)
        goes_beyond = place < len(self.following) and self.following[place].startswith(text)
        return SHARE_BEYOND if goes_beyond else 0.0

    def left_of(self, logprobs: Tensor, rest: bytes, small: Strings) -> "Left":
        """Ask about the likeliest small tokens whether they would have changed the last token.

        Args:
            logprobs: Of the next small token, shape [vocab of small].
            rest: Bytes of the context that it repeats.
            small: The small model's strings.
        """
        asked = small.likeliest_beyond(rest, logprobs, ASKED_TOKENS)
        suffixes = [small.bytes_of(i)[len(rest) :] for i in asked.tolist()]
        shares = torch.tensor([self.share_of(suffix) for suffix in suffixes])
        probs = logprobs[asked].exp()
        others = (probs * shares).sum() / probs.sum().clamp_min(1e-30)
        return Left(asked, shares, float(others) if len(asked) else 1.0)


@dataclass(frozen=True)
class Left:
    """What a host's cut leaves of a distribution over the next small token.

    The tokens that are not asked, which are many and unlikely, keep the share that those that are
    asked keep on average; and so does their sum.

    Attributes:
        asked: Small tokens that were asked about, shape [asked].
        shares: What is left of each, shape [asked].
        others: What is left of any other, and of all together.
    """

    asked: Tensor
    shares: Tensor
    others: float

    def of(self, logprobs: Tensor) -> Tensor:
        """Logarithms of what is left, shape [vocab of small]; they sum to less than one."""
        scaled = logprobs + math.log(self.others) if self.others else logprobs - torch.inf
        return scaled.index_copy(0, self.asked, logprobs[self.asked] + self.shares.log())
