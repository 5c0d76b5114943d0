"""The model card: an adapter's README.md, rendered from its manifest and from nothing else."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue

from trimtab.config import CarrierName
from trimtab.store.adapter_schema import AdapterManifest, BaseModelReference
from trimtab.store.files import write_atomic
from trimtab.store.manifest import with_files, write_manifest

CARD_NAME = "README.md"

READ_BACK: dict[CarrierName, str] = {
    "head": (
        "Weights of a low-rank layer; it stores no text. Which words the training text prefers"
        " can be read from them, and their strength; sentences cannot be looked up."
    ),
    "memory": (
        "**Contains training text.** Each entry holds what followed at one place of the training"
        " text. Who has the files can read these pieces, and can join many of them to longer"
        " passages; the documents are named. Share it only where you would share the text itself."
    ),
    "expert": (
        "Weights of a fine-tuned small model; it stores no text as such. Like any fine-tuned"
        " model it can repeat passages that it saw often when it is prompted for them."
    ),
}
"""What somebody who has a carrier's files can learn about the training text, in plain words."""


def write_adapter(folder: Path, manifest: AdapterManifest) -> AdapterManifest:
    """Complete an adapter directory whose payload is in place: card, fingerprints, manifest.

    Args:
        folder: Adapter directory with its carriers' files.
        manifest: What to say; its files are computed here.

    Returns:
        The manifest as written.

    Raises:
        AdapterError: Payload and carriers do not agree; see `write_manifest`.
        StorageError: The folder cannot be written.
    """
    complete = with_files(folder, manifest)
    write_atomic(folder / CARD_NAME, render_card(complete).encode())
    hashed = {path: entry for path, entry in complete.files.items() if path != CARD_NAME}
    return write_manifest(folder, manifest, hashed=hashed)


def render_card(manifest: AdapterManifest) -> str:
    """Render the model card.

    Args:
        manifest: A manifest with its files filled in.

    Returns:
        Markdown with YAML front matter.
    """
    sections = [
        _front_matter(manifest),
        f"# {_plain(manifest.name)}",
        _introduction(manifest),
        "## What it carries\n\n" + _carrier_table(manifest),
        "## What can be read back from it\n\n" + _read_back(manifest),
        "## Use\n\n" + _usage(manifest),
        _measured("Measured while it was made", flat(manifest.metrics)),
        "## Made from\n\n" + _made_from(manifest),
        "## Terms\n\n" + _terms(manifest),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(manifest: AdapterManifest) -> str:
    tags = ["trimtab", "adapter", *manifest.carriers]
    if manifest.contains_text:
        tags.append("contains-training-text")
    licence = manifest.licences.adapter
    known = licence if licence != "not stated" else "unknown"
    # A JSON string is a YAML string, so that no value can break out of its line.
    lines = [
        "---",
        "library_name: trimtab",
        *_base_lines(manifest.base_model),
        f"license: {json.dumps(known, ensure_ascii=False)}",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
    ]
    return "\n".join(lines)


def _base_lines(base: BaseModelReference) -> list[str]:
    """What a hub reads of the small model; it knows none that was named by a path."""
    name = base.ref.partition("@")[0]
    if base.revision is None or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return []
    return [f"base_model: {json.dumps(name, ensure_ascii=False)}", "base_model_relation: adapter"]


def _introduction(manifest: AdapterManifest) -> str:
    return (
        "A Trimtab adapter: what a fine-tuned small model learnt, in a form that steers larger"
        " models of other families without training them."
        f" Made on {manifest.created:%Y-%m-%d} from `{_plain(manifest.base_model.ref)}`."
    )


def _carrier_table(manifest: AdapterManifest) -> str:
    rows = ["| carrier | settings | size | contains text |", "|---|---|---|---|"]
    for name, carrier in manifest.carriers.items():
        hidden = {"kind", "files", "contains_text", "gate", "own_gate", "bytes_gate", "grown_from"}
        settings = ", ".join(
            f"{key} {json.dumps(value)}".replace('"', "")
            for key, value in carrier.model_dump(
                mode="json", exclude=hidden, exclude_none=True
            ).items()
        )
        text = "**yes**" if carrier.contains_text else "no"
        rows.append(f"| {name} | {settings} | {readable_bytes(manifest.bytes_of(name))} | {text} |")
    return "\n".join(rows)


def _read_back(manifest: AdapterManifest) -> str:
    lines = [f"* **{name}**: {READ_BACK[name]}" for name in manifest.carriers]
    lines.append(
        "* **manifest.json** names the settings and fingerprints of the inputs, not their content."
    )
    return "\n".join(lines)


def _usage(manifest: AdapterManifest) -> str:
    carriers = ",".join(manifest.carriers)
    lines = (
        "```sh\ntrimtab show FOLDER\ntrimtab mount FOLDER HOST\n"
        f'trimtab generate "PROMPT" --host HOST --adapter FOLDER --carriers {carriers}\n```'
    )
    if "expert" not in manifest.carriers:
        return lines
    return (
        f"{lines}\n\nThe expert runs in the small model. Where that does not lie as"
        f" `{_plain(manifest.base_model.ref)}`, name its place with `--small`."
    )


def _measured(title: str, values: Mapping[str, str]) -> str:
    if not values:
        return ""
    rows = [f"| {_plain(key)} | {_plain(value)} |" for key, value in values.items()]
    return f"## {title}\n\n" + "\n".join(["| measure | value |", "|---|---|", *rows])


def _made_from(manifest: AdapterManifest) -> str:
    base, provenance = manifest.base_model, manifest.provenance
    rows = {
        "small model": base.ref + (f" at {base.revision}" if base.revision else ""),
        "its vocabulary, sha256": base.vocabulary_sha256,
        "its unembedding, sha256": base.unembedding_sha256,
        "domain tokens recorded": f"{provenance.tokens:,}",
        "seed": str(provenance.seed),
        **{f"input {name}, sha256": digest for name, digest in provenance.inputs.items()},
        **{f"package {name}": version for name, version in provenance.packages.items()},
    }
    return "\n".join(f"* {_plain(key)}: `{_plain(value)}`" for key, value in rows.items())


def _terms(manifest: AdapterManifest) -> str:
    terms = manifest.licences
    return (
        f"* adapter: {_plain(terms.adapter)}\n* training text: {_plain(terms.data)}\n"
        f"* models it was made from: {_plain(terms.models)}"
    )


def _plain(text: str) -> str:
    """Keep a value from the manifest from ending its line, its code span or its cell."""
    return " ".join(text.split()).replace("`", "'").replace("|", "/").replace("<", "&lt;")


def flat(values: Mapping[str, JsonValue]) -> dict[str, str]:
    """Write nested values for people: the names on the way to each, and the value."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= {f"{key} {inner}": shown for inner, shown in flat(value).items()}
        else:
            found[key] = readable_value(value)
    return found


def readable_value(value: JsonValue) -> str:
    """Write one value for people: four digits of a number, a list with commas."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(readable_value, value))
    return value if isinstance(value, str) else json.dumps(value)


def readable_bytes(count: int) -> str:
    """Write a size for people, in powers of 1000."""
    if count < 1000:
        return f"{count} B"
    size = float(count)
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.5 or unit == "GB":
            break
    return f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"
