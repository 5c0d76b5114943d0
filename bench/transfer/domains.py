"""Text domains of the transfer suite: `python -m bench.transfer.domains NAME --to FOLDER`."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.transfer import sources
from bench.transfer.debian import Package, is_fetched, sha256_of_texts
from bench.transfer.sources import Corpus
from bench.transfer.splits import Budget, Cut, middle, parts, size, split, whole
from examples.demo import corpus
from trimtab.cli_errors import run_program
from trimtab.errors import InputError

TEXTS = Path("build/texts")
SOURCE_FILE = "source.json"


@dataclass(frozen=True)
class Domain:
    """A kind of text that an expert learns.

    Attributes:
        name: Its name in commands and results.
        title: Its name for people.
        licence: Terms of its text.
        read: Fetches the texts, unless the cache has them, and reads them.
        packages: Debian packages that `read` needs.
        budget: How much text is laid out unless a caller says otherwise; for about 25 thousand
            training tokens and at least 20 thousand test tokens of Qwen2.5's tokenizer.
        held_out: How texts are cut for test and validation.
        train: How texts are cut for training.
    """

    name: str
    title: str
    licence: str
    read: Callable[[Path], Corpus]
    packages: tuple[Package, ...]
    budget: Budget
    held_out: Cut = parts
    train: Cut = parts


_OTHER_SCRIPT = Budget(
    train_bytes=48_000, validation_bytes=10_000, test_bytes=40_000, document_bytes=2_500
)
"""Of texts that SmolLM2's tokenizer cuts into tokens of one or two bytes."""

_ALL = (
    Domain(
        "zig",
        "Zig's standard library",
        corpus.ZIG_LICENCE,
        sources.read_zig,
        (),
        Budget(train_bytes=80_000),
        held_out=middle,
        train=whole,
    ),
    Domain(
        "german-handbook",
        "Debian administrator's handbook in German",
        sources.HANDBOOK.licence,
        partial(sources.read_handbook, "de-DE", sources.is_english),
        (sources.HANDBOOK,),
        Budget(train_bytes=97_000, test_bytes=84_000),
    ),
    Domain(
        "russian-handbook",
        "Debian administrator's handbook in Russian",
        sources.HANDBOOK.licence,
        partial(sources.read_handbook, "ru-RU", partial(sources.is_outside, sources.CYRILLIC)),
        (sources.HANDBOOK,),
        _OTHER_SCRIPT,
    ),
    Domain(
        "japanese-handbook",
        "Debian administrator's handbook in Japanese",
        sources.HANDBOOK.licence,
        partial(sources.read_handbook, "ja-JP", partial(sources.is_outside, sources.JAPANESE)),
        (sources.HANDBOOK,),
        _OTHER_SCRIPT,
    ),
    Domain(
        "german-medical",
        "German medical terms (ICPC-2 thesaurus)",
        sources.GNUMED.licence,
        sources.read_medical,
        (sources.GNUMED,),
        Budget(
            train_bytes=72_000, validation_bytes=15_000, test_bytes=58_000, document_bytes=2_500
        ),
    ),
    Domain(
        "licences",
        "Licences and founding documents of free software",
        sources.BASE_FILES.licence,
        sources.read_licences,
        (sources.BASE_FILES, sources.LICENSEE, sources.DOC_DEBIAN),
        Budget(train_bytes=118_000, validation_bytes=25_000, test_bytes=100_000),
    ),
)
DOMAINS = {domain.name: domain for domain in _ALL}
"""The suite's domains by name."""


def domain_of(name: str) -> Domain:
    """The domain of a name.

    Raises:
        InputError: There is none.
    """
    if name not in DOMAINS:
        raise InputError(f"there is no domain {name!r}", hint=f"choose one of {', '.join(DOMAINS)}")
    return DOMAINS[name]


def lay_out(
    domain: Domain,
    folder: Path,
    *,
    seed: int = 0,
    budget: Budget | None = None,
    cache: Path = TEXTS,
) -> dict[str, Any]:
    """Make a folder hold `train`, `validation`, `test`, `general/KIND` and `source.json`.

    The folder is written whole or not at all, and replaced if it holds another layout; nothing
    else may be kept in it. The same domain, seed, budget and packages give the same bytes.

    Args:
        domain: The domain.
        folder: The folder.
        seed: Seed of the split.
        budget: How much text (default: the domain's).
        cache: Where fetched text is kept.

    Returns:
        What `source.json` holds: sources with versions and fingerprints; documents, bytes and
        fingerprint of each split and each kind of general text.

    Raises:
        SourceError: A package cannot be fetched.
        InputError: There is too little text for the budget, or the folder holds other things.
        StorageError: The disk is full or the folder cannot be written.
    """
    budget = budget or domain.budget
    found = domain.read(cache)
    dealt = split(found.texts, budget, held_out=domain.held_out, train=domain.train, seed=seed)
    kinds, general_sources = sources.general_kinds(budget, cache)
    groups = dict(dealt)
    groups |= {f"general/{kind}": texts for kind, texts in kinds.items()}
    record = {
        "schema": 1,
        "domain": domain.name,
        "title": domain.title,
        "licence": domain.licence,
        "seed": seed,
        "budget": asdict(budget),
        "sources": [asdict(source) for source in found.sources],
        "general_sources": [asdict(source) for source in general_sources],
        "texts": {group: _described(texts) for group, texts in groups.items()},
    }
    files = {
        f"{group}/{name}": text for group, texts in groups.items() for name, text in texts.items()
    }
    files[SOURCE_FILE] = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    corpus.write_texts(folder, files)
    return record


def _described(texts: dict[str, str]) -> dict[str, Any]:
    return {
        "documents": len(texts),
        "bytes": sum(map(size, texts.values())),
        "sha256": sha256_of_texts(texts),
    }


def summary(record: dict[str, Any]) -> str:
    """A layout in words."""
    lines = [f"{record['title']}, seed {record['seed']}"]
    for key in ("sources", "general_sources"):
        for source in record[key]:
            lines.append(f"  {source['package']} {source['version']}: {source['licence']}")
            lines.append(f"    sha256 {source['sha256']}")
    lines.append(f"  {'':16} documents     bytes  sha256")
    for group, found in record["texts"].items():
        numbers = f"{found['documents']:>9} {found['bytes']:>9,}"
        lines.append(f"  {group:16} {numbers}  {found['sha256'][:16]}")
    return "\n".join(lines)


def _say_downloads(domain: Domain) -> None:
    packages = [*domain.packages, sources.LIBREOFFICE]
    lines = [
        f"{package.download_mb:>5} MB  Debian {package.name}: {package.licence}"
        for package in packages
        if not is_fetched(package, TEXTS)
    ]
    if domain.name == "zig" and not corpus.is_fetched(TEXTS):
        lines.insert(0, f"{corpus.ZIG_DOWNLOAD_MB:>5} MB  {corpus.ZIG_LICENCE}")
    if lines:
        print("This will be downloaded, and none of it is run as code:", *lines, sep="\n")
        print("Who goes on accepts these terms; Ctrl-C stops.", flush=True)


def main(words: Sequence[str] | None = None) -> None:
    """Lay out a domain from the command line; exits with the same statuses as `trimtab`."""
    parser = argparse.ArgumentParser(prog="bench.transfer.domains", description=__doc__)
    parser.add_argument("name", help=f"domain: {', '.join(DOMAINS)}")
    parser.add_argument("--to", type=Path, required=True, help="folder of the layout")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split [0]")
    sizes = [field.name for field in fields(Budget) if field.type is int]
    for name in sizes:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="BYTES")
    given = parser.parse_args(words)
    wanted = {name: getattr(given, name) for name in sizes}
    changed = {name: value for name, value in wanted.items() if value is not None}

    def lay() -> None:
        domain = domain_of(given.name)
        budget = replace(domain.budget, **changed)
        _say_downloads(domain)
        print(summary(lay_out(domain, given.to, seed=given.seed, budget=budget)))

    run_program(lay)


if __name__ == "__main__":
    main()
