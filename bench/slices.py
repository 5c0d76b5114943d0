r"""What rows pay for digits, white space, accents and other scripts, apart.

    python -m bench.slices --scores FOLDER --host MODEL --texts GLOB --out RESULT.json

Reads the token scores that an evaluation of MODEL has kept (`scores` in its folder); no model is
run. Between tokenizers these are the places where tokens of one are least like tokens of the other.
"""

import argparse
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from trimtab.backends.open import open_model
from trimtab.errors import InputError
from trimtab.metrics import DocumentScore, bits_per_byte, bootstrap, paired_difference
from trimtab.steering.kept import Kept, read_scores
from trimtab.store.files import package_versions, write_json

KINDS = ("other script", "digits", "white space", "accents", "rest")
"""Of tokens; one that is of several is of the first."""


def kinds_of(pieces: Sequence[bytes]) -> list[str]:
    """The kind of each token of a text.

    `other script`: it holds a letter that is not Latin, or a part of one. `digits`: a digit.
    `white space`: nothing but white space, a line's end or two blanks at least. `accents`: a sign
    beyond ASCII. `rest`: all others.

    Args:
        pieces: The bytes of each token; characters may be divided among several.
    """
    text = b"".join(pieces).decode(errors="surrogateescape")
    of_bytes = [kind for sign in text for kind in [_kind(sign)] * _size(sign)]
    found, start = list[str](), 0
    for piece in pieces:
        kinds = {*of_bytes[start : start + len(piece)]}
        start += len(piece)
        if piece and not piece.strip() and (len(piece) > 1 or piece in b"\r\n\t"):
            kinds = {"white space"}
        found.append(next(kind for kind in KINDS if kind in kinds or kind == "rest"))
    return found


def _size(sign: str) -> int:
    return len(sign.encode(errors="surrogateescape"))


def _kind(sign: str) -> str:
    if sign.isdecimal():
        return "digits"
    if sign.isascii():
        return "rest"
    is_other = sign.isalpha() and not unicodedata.name(sign, "").startswith("LATIN")
    return "other script" if is_other else "accents"


def figures(
    documents: Sequence[Kept], token_bytes: Sequence[bytes | None]
) -> Mapping[str, Mapping[str, Any]]:
    """Bits per byte of each row for each kind of token, and beside the host, by kind.

    Errors are by bootstrap over documents; a change's is of the paired difference.

    Args:
        documents: Scores of some documents, the bare host among their rows.
        token_bytes: Of the host.
    """
    kinds = [
        kinds_of([token_bytes[i] or b"" for i in kept.on_host.token_ids]) for kept in documents
    ]
    return {kind: found for kind in KINDS if (found := _of_kind(documents, kinds, kind))}


def _of_kind(
    documents: Sequence[Kept], kinds: Sequence[Sequence[str]], kind: str
) -> Mapping[str, Any]:
    rows = {row: list(_paid(documents, kinds, kind, row)) for row in documents[0].on_host.rows}
    host = rows["host"]
    if not host:
        return {}
    whole = bits_per_byte(host)
    found = {}
    for row, scores in rows.items():
        estimate, change = bootstrap(scores), paired_difference(scores, host)
        found[row] = {
            "bits_per_byte": {"mean": estimate.mean, "stderr": estimate.stderr},
            "change_percent": {
                "mean": 100 * change.mean / whole,
                "stderr": 100 * change.stderr / whole,
            },
        }
    return {
        "tokens": sum(of_document.count(kind) for of_document in kinds),
        "bytes": sum(score.scored_bytes for score in host),
        "documents": len(host),
        "rows": found,
    }


def _paid(
    documents: Sequence[Kept], kinds: Sequence[Sequence[str]], kind: str, row: str
) -> Iterator[DocumentScore]:
    """What a row paid for one kind of token in each document that has any."""
    for kept, of_document in zip(documents, kinds, strict=True):
        places = [place for place, one in enumerate(of_document) if one == kind]
        scored_bytes = sum(kept.on_host.sizes[place] for place in places)
        if scored_bytes:
            nats = -float(kept.on_host.rows[row].logprobs[places].double().sum())
            yield DocumentScore(nats, scored_bytes)


def read_documents(
    folder: Path, texts: Sequence[str], token_bytes: Sequence[bytes | None]
) -> list[Kept]:
    """Kept scores of the documents that are parts of some texts.

    Args:
        folder: Of the score files.
        texts: The files, as patterns.
        token_bytes: Of the host.

    Raises:
        InputError: There are none.
    """
    paths = [Path(path) for pattern in texts for path in glob(pattern, recursive=True)]
    whole = [path.read_bytes() for path in paths if path.is_file()]
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        kept = read_scores(path)
        if kept is None:
            continue
        spelled = b"".join(token_bytes[i] or b"" for i in kept.on_host.token_ids)
        if any(spelled.strip() in text for text in whole):
            found.append(kept)
    if not found:
        raise InputError(
            f"{folder} keeps no scores of {', '.join(texts)}",
            hint="name the folder `scores` of an evaluation, and the texts that it scored",
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scores", type=Path, required=True, help="folder of kept scores")
    parser.add_argument("--host", required=True, help="the model that they are of")
    parser.add_argument("--texts", nargs="+", required=True, help="files that were scored")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    token_bytes = open_model(given.host).vocabulary.token_bytes
    documents = read_documents(given.scores, given.texts, token_bytes)
    found = figures(documents, token_bytes)
    for kind, of_kind in found.items():
        changes = ", ".join(
            f"{row} {one['change_percent']['mean']:+.1f} +- {one['change_percent']['stderr']:.1f} %"
            for row, one in of_kind["rows"].items()
            if row != "host"
        )
        host = of_kind["rows"]["host"]["bits_per_byte"]["mean"]
        print(f"{kind}: {of_kind['tokens']:,} tokens, host {host:.3f}; {changes}")
    write_json(
        given.out,
        {
            "schema": 1,
            "what": "bits per byte by kind of token, beside the bare host",
            "host": Path(given.host).parent.name if Path(given.host).is_file() else given.host,
            "documents": len(documents),
            "kinds": found,
            "packages": package_versions(),
        },
    )


if __name__ == "__main__":
    main()
