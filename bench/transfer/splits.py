"""Texts cut into documents and dealt to training, validation and test, family by family."""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeVar

from examples.demo import corpus
from trimtab.errors import InputError
from trimtab.text.duplicates import drop_near_duplicates
from trimtab.types import Document

T = TypeVar("T")

Cut = Callable[[str, int], list[str]]
"""Pieces of a text, each of at most so many bytes."""

LARGE_FAMILY_SHARE = 1 / 3
"""A family that holds more of all text is for training: as test text, most of it would be lost."""
_BREAKS = tuple(map(re.compile, (r"(?<=\n\n)", r"(?<=\n)", r"(?<=[.!?;:] )", r"(?<= )", "")))
"""Where a text may be cut, the best place first."""


@dataclass(frozen=True)
class Text:
    """A whole text of a domain.

    Attributes:
        name: Relative path, with `/`.
        family: Texts of one family lie in one split.
        text: The text.
        spare: Whether it is only taken for training, and only when the others are used up.
    """

    name: str
    family: str
    text: str
    spare: bool = False


@dataclass(frozen=True)
class Budget:
    """How much text is laid out; refuses sizes that nothing fits.

    Attributes:
        train_bytes: Bytes of training text.
        validation_bytes: Bytes of validation text, at least.
        test_bytes: Bytes of test text, at least.
        document_bytes: Largest document of validation, test and (in most domains) training.
        min_document_bytes: Smallest document of validation and test.
        max_family_share: Largest part of validation or test that one family may fill (but two
            documents in any case), so that no single family makes the result.
        general_bytes: Bytes of general text of each kind, at most.
        general_document_bytes: Largest document of general text.
    """

    train_bytes: int = 90_000
    validation_bytes: int = 20_000
    test_bytes: int = 80_000
    document_bytes: int = 4_000
    min_document_bytes: int = 1_000
    max_family_share: float = 0.34
    general_bytes: int = 8_000
    general_document_bytes: int = 1_200

    def __post_init__(self) -> None:
        smallest = min(self.train_bytes, self.validation_bytes, self.test_bytes, self.general_bytes)
        fits = 100 <= self.min_document_bytes < self.document_bytes
        if smallest <= 0 or not fits or self.general_document_bytes < 100:
            raise InputError(
                f"no text fits {self}",
                hint="give every split some bytes, and documents 100 bytes or more, the largest"
                " above the smallest",
            )


def size(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text.encode())


def whole(text: str, max_bytes: int) -> list[str]:  # noqa: ARG001 - a Cut
    """The text as it is, however large."""
    return [text]


def middle(text: str, max_bytes: int) -> list[str]:
    """One piece from the middle of the text; there is none if no line fits."""
    piece = corpus.middle(text, max_bytes)
    return [piece] if piece else []


def beginning(text: str, max_bytes: int) -> list[str]:
    """Whole lines from the beginning of the text; there is none if no line fits."""
    piece = text.encode()[:max_bytes].decode(errors="ignore")
    piece = piece if len(piece) == len(text) else piece[: piece.rfind("\n") + 1]
    return [piece] if piece else []


def parts(text: str, max_bytes: int) -> list[str]:
    """Pieces of like size that together are the text.

    They end at blank lines; where a paragraph is larger than a piece, at lines, then at
    sentences, then at words, then anywhere.
    """
    count = -(-size(text) // max_bytes)
    wanted = size(text) / max(count, 1)
    pieces: list[str] = []
    room = 0
    for unit in _units(text, max_bytes, 0):
        used = size(unit)
        if used > room or max_bytes - room >= wanted:
            pieces.append("")
            room = max_bytes
        pieces[-1] += unit
        room -= used
    return pieces


def _units(text: str, max_bytes: int, level: int) -> Iterator[str]:
    if size(text) <= max_bytes:
        if text:
            yield text
        return
    for unit in _BREAKS[level].split(text):
        yield from _units(unit, max_bytes, level + 1)


def cut(text: Text, cutter: Cut, max_bytes: int) -> list[Document]:
    """Documents of a text, named after it; blank ones are left out."""
    pieces = [piece.strip("\n") for piece in cutter(text.text, max_bytes)]
    pieces = [f"{piece}\n" for piece in pieces if piece.strip()]
    if len(pieces) == 1:
        return [Document(text.name, pieces[0])]
    path = PurePosixPath(text.name)
    return [
        Document(str(path.with_name(f"{path.stem}-{number:03}{path.suffix}")), piece)
        for number, piece in enumerate(pieces, 1)
    ]


def split(
    texts: Sequence[Text], budget: Budget, *, held_out: Cut, train: Cut, seed: int
) -> dict[str, dict[str, str]]:
    """Deal texts to the three splits.

    Families are drawn in an order that the seed gives, first for test, then for validation; the
    others, and a family with more than a third of all text, are for training. Documents are
    drawn from a split's families in turn. Test documents are no near-duplicates of each other,
    nor are validation documents. A text that repeats a whole text of test or validation is in no
    other split: a document from its middle would not show that. The test documents do not depend
    on the other budgets, and a larger budget of training text begins with the smaller one's.

    Args:
        texts: The domain's texts.
        budget: How much to take.
        held_out: How texts are cut for test and validation.
        train: How texts are cut for training.
        seed: Seed of all draws.

    Returns:
        Text by document name, under "test", "validation" and "train"; where documents are the
        middles of their texts, also "beginnings", those of the test documents' texts.

    Raises:
        InputError: There is too little text for the budget.
    """
    rest = sorted(texts, key=lambda text: text.name)
    order = _order(rest, seed)
    laid_out: dict[str, dict[str, str]] = {}
    for name, wanted in (("test", budget.test_bytes), ("validation", budget.validation_bytes)):
        deal = _Deal(name, wanted, budget, seed)
        chosen = deal.held_out([text for text in rest if not text.spare], order, held_out)
        laid_out[name] = {document.name: document.text for document, _ in chosen}
        if name == "test" and held_out is middle:
            starts = {d.name: beginning(text.text, budget.document_bytes) for d, text in chosen}
            laid_out["beginnings"] = {name: found[0] for name, found in starts.items() if found}
        sources = {text.name: text for _, text in chosen}
        used = {text.family for text in sources.values()}
        order = [family for family in order if family not in used]
        rest = _unlike([text for text in rest if text.family not in used], sources.values())
    deal = _Deal("train", budget.train_bytes, budget, seed)
    laid_out["train"] = deal.training(rest, train)
    return laid_out


def _order(texts: Sequence[Text], seed: int) -> list[str]:
    """Families that test and validation may use, in the order of the draw."""
    sizes: Counter[str] = Counter()
    for text in texts:
        if not text.spare:
            sizes[text.family] += size(text.text)
    most = LARGE_FAMILY_SHARE * sizes.total()
    order = [family for family in sorted(sizes) if sizes[family] <= most]
    random.Random(seed).shuffle(order)
    return order


def _unlike(texts: Sequence[Text], others) -> list[Text]:
    found = drop_near_duplicates(_documents(texts), _documents(others))
    kept = {document.name for document in found.kept}
    return [text for text in texts if text.name in kept]


def _documents(texts) -> list[Document]:
    return [Document(text.name, text.text) for text in texts]


@dataclass(frozen=True)
class _Deal:
    split: str
    wanted_bytes: int
    budget: Budget
    seed: int

    def held_out(
        self, texts: Sequence[Text], order: Sequence[str], cutter: Cut
    ) -> list[tuple[Document, Text]]:
        """Documents from the first families of the order that fill the budget."""
        budget = self.budget
        most = max(budget.max_family_share * self.wanted_bytes, 2 * budget.document_bytes)
        candidates: list[list[tuple[Document, Text]]] = []
        usable, chosen = 0.0, []
        for family in order:
            members = [text for text in texts if text.family == family]
            drawn = self._shuffled(members, cutter, budget.min_document_bytes)
            candidates.append(_first(drawn, most))
            usable += sum(size(document.text) for document, _ in candidates[-1])
            if usable >= self.wanted_bytes:
                chosen = self._distinct(in_turn(candidates))
                if _total(chosen) >= self.wanted_bytes:
                    return chosen
        raise self._too_little(_total(chosen) or int(usable))

    def training(self, texts: Sequence[Text], cutter: Cut) -> dict[str, str]:
        """Documents from all families in turn, the last one cut to fill the budget."""
        found: dict[str, str] = {}
        room = self.wanted_bytes
        for spare in (False, True):
            members = [text for text in texts if text.spare == spare]
            families = sorted({text.family for text in members})
            random.Random(f"{self.seed} families").shuffle(families)
            candidates = [
                self._shuffled([text for text in members if text.family == family], cutter, 0)
                for family in families
            ]
            for document, _ in in_turn(candidates):
                text = document.text
                if size(text) > room:
                    text = text.encode()[:room].decode(errors="ignore")
                    text = text[: text.rfind("\n") + 1]
                if text:
                    found[document.name] = text
                room -= size(document.text)
                if room <= 0:
                    return found
        raise self._too_little(self.wanted_bytes - room)

    def _shuffled(
        self, texts: Sequence[Text], cutter: Cut, min_bytes: int
    ) -> list[tuple[Document, Text]]:
        found = [
            (document, text)
            for text in texts
            for document in cut(text, cutter, self.budget.document_bytes)
            if size(document.text) >= min_bytes
        ]
        family = texts[0].family if texts else ""
        random.Random(f"{self.seed} {family}").shuffle(found)
        return found

    def _distinct(self, drawn: Sequence[tuple[Document, Text]]) -> list[tuple[Document, Text]]:
        """The drawn documents up to the budget, without near-duplicates of earlier ones."""
        chosen: list[tuple[Document, Text]] = []
        for document, text in drawn:
            if _total(chosen) >= self.wanted_bytes:
                break
            if not drop_near_duplicates([document], [earlier for earlier, _ in chosen]).dropped:
                chosen.append((document, text))
        return chosen

    def _too_little(self, found_bytes: int) -> InputError:
        return InputError(
            f"this text fills {found_bytes:,} bytes of {self.split} documents, where"
            f" {self.wanted_bytes:,} are wanted",
            hint="ask for less, or allow one family a larger share",
        )


def _total(chosen: Sequence[tuple[Document, Text]]) -> int:
    return sum(size(document.text) for document, _ in chosen)


def _first(drawn: list[tuple[Document, Text]], most_bytes: float) -> list[tuple[Document, Text]]:
    """As many as fit, but one in any case."""
    count = 1
    while count < len(drawn) and _total(drawn[: count + 1]) <= most_bytes:
        count += 1
    return drawn[:count]


def in_turn(groups: Sequence[Sequence[T]]) -> list[T]:
    """The first of each group, then the second of each, and so on."""
    turns = max(map(len, groups), default=0)
    return [group[turn] for turn in range(turns) for group in groups if turn < len(group)]
