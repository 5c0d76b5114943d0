"""The README.md of an export, rendered from what export.json says and from nothing else."""

import json

from pydantic import BaseModel, ConfigDict, JsonValue

from trimtab.config import ExportKind
from trimtab.exporting.fidelity import Fidelity
from trimtab.store.adapter_schema import Licences

README_NAME = "README.md"


class ExportRecord(BaseModel):
    """Everything that export.json says: from what an export was made, and what was measured."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: str = "trimtab-export"
    """Names the file."""
    to: ExportKind
    """Form of the export."""
    adapter: str
    """Name of the adapter."""
    adapter_sha256: str
    """Of its manifest.json, which holds the digest of every file."""
    head_sha256: str
    """Of its head.safetensors."""
    host: str
    """The host as it was named."""
    host_vocabulary_sha256: str
    """Fingerprint of the host's vocabulary."""
    host_unembedding_sha256: str
    """Fingerprint of the host's unembedding."""
    strength: float
    """How far the head is followed."""
    settings: dict[str, JsonValue]
    """What the form decides: rank, dtype, names."""
    fidelity: dict[str, JsonValue]
    """The mounted head against the export, on the probe text."""
    head_size: dict[str, JsonValue]
    """The mounted head against the bare host."""
    offset_size: dict[str, JsonValue]
    """The mounted head against itself without its constant part."""
    notes: tuple[str, ...]
    """What a user must know: approximations and refusals."""
    left_out: tuple[str, ...]
    """What of the adapter the export does not hold."""
    licences: Licences
    """Terms, as the adapter states them."""
    packages: dict[str, str]
    """Versions of the packages that computed it."""
    files: dict[str, str]
    """sha256 of every other file of the export but README.md."""


def render_readme(record: ExportRecord, usage: str) -> str:
    """Render the README.

    Args:
        record: What export.json says.
        usage: Markdown that says how the engine loads the export.
    """
    sections = [
        _front_matter(record),
        f"# {plain(record.adapter)} on {plain(record.host)}, for {_ENGINES[record.to]}",
        "The head of a Trimtab adapter, seated on one host, as files that need no Trimtab. It fits"
        " this host and no other.",
        # First, for they may say that an engine refuses this host.
        "## What to know\n\n" + _listed(record.notes) if record.notes else "",
        f"## Load it\n\n{usage}",
        f"## How exact it is\n\n{_exactness(record)}",
        f"## What is left out\n\n{_listed(record.left_out)}",
        f"## Made from\n\n{_made_from(record)}",
        f"## Terms\n\n{_terms(record)}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


_ENGINES: dict[ExportKind, str] = {
    "peft": "PEFT",
    "gguf": "llama.cpp",
    "merged": "transformers",
    "onnx": "ONNX Runtime",
}


def plain(text: str) -> str:
    """Keep a value from ending its line, its code span or its cell."""
    return " ".join(text.split()).replace("`", "'").replace("|", "/").replace("<", "&lt;")


def _front_matter(record: ExportRecord) -> str:
    # A JSON string is a YAML string, so that no value can break out of its line.
    lines = ["---", f"base_model: {json.dumps(record.host, ensure_ascii=False)}"]
    if record.to == "peft":
        lines += ["library_name: peft", "base_model_relation: adapter"]
    licence = record.licences.adapter
    known = licence if licence != "not stated" else "unknown"
    lines += [f"license: {json.dumps(known, ensure_ascii=False)}", "tags:", "- trimtab", "---"]
    return "\n".join(lines)


def _exactness(record: ExportRecord) -> str:
    columns = {
        "this export": record.fidelity,
        "bare host": record.head_size,
        "head without its constant part": record.offset_size,
    }
    lines = [
        f"Measured when it was made, at {record.fidelity['positions']} positions of the adapter's"
        " general text, against the mounted head in Trimtab. The second and third column say how"
        " much there was to get wrong. Differences are of log-probabilities, in nats: a number that"
        " is added to all logits of a position changes nothing.",
        "",
        f"| mounted head against | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for key, meaning in _MEANINGS.items():
        cells = (f"{column[key]:.3g}" for column in columns.values())
        lines.append(f"| {meaning} | {' | '.join(cells)} |")
    return "\n".join(lines)


_MEANINGS = {
    "mean_kl_nats": "mean KL divergence, nats",
    "max_kl_nats": "largest KL divergence of a position, nats",
    "max_logprob_nats": "largest difference of any token's log-probability, nats",
    "same_top_share": "share of positions with the same likeliest token",
}


def _made_from(record: ExportRecord) -> str:
    facts = {
        "adapter": record.adapter,
        "its manifest.json, sha256": record.adapter_sha256,
        "its head.safetensors, sha256": record.head_sha256,
        "host": record.host,
        "its vocabulary, sha256": record.host_vocabulary_sha256,
        "its unembedding, sha256": record.host_unembedding_sha256,
        "strength": f"{record.strength:g}",
        **{key: str(value) for key, value in record.settings.items()},
        **{f"package {name}": version for name, version in record.packages.items()},
    }
    return "\n".join(f"* {plain(key)}: `{plain(value)}`" for key, value in facts.items())


def _terms(record: ExportRecord) -> str:
    terms = record.licences
    host = (
        "This folder contains the host's weights: the host's own terms apply to it."
        if record.to == "merged" or "host_gguf" in record.settings
        else "The host is not in this folder; its own terms apply to it."
    )
    return (
        f"* adapter: {plain(terms.adapter)}\n* training text: {plain(terms.data)}\n"
        f"* small model: {plain(terms.models)}\n* {host}"
    )


def _listed(lines: tuple[str, ...]) -> str:
    return "\n".join(f"* {plain(line)}" for line in lines)


def words(fidelity: Fidelity) -> str:
    """The two figures of a comparison that a terminal shows."""
    return (
        f"mean KL {fidelity.mean_kl_nats:.2g} nats, largest difference of a log-probability"
        f" {fidelity.max_logprob_nats:.2g} nats"
    )
