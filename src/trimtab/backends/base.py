"""What a host lets us see, as a Protocol: whoever needs no more of it names this."""

from typing import Protocol

from trimtab.align.strings import Strings
from trimtab.vocab import Vocabulary


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
