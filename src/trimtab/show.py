"""Say readably what an adapter is, after checking every file of it."""

from dataclasses import dataclass
from pathlib import Path

from trimtab.store.adapter_schema import AdapterManifest
from trimtab.store.card import READ_BACK, flat, readable_bytes, readable_value
from trimtab.store.local import LocalAdapter
from trimtab.store.manifest import read_manifest


@dataclass(frozen=True)
class ShowResult:
    """An adapter that was looked at.

    Attributes:
        folder: Where it lies.
        manifest: What it says.
    """

    folder: Path
    manifest: AdapterManifest

    def summary(self) -> str:
        """Describe the adapter in plain lines of text."""
        manifest, base = self.manifest, self.manifest.base_model
        total = sum(entry.bytes for entry in manifest.files.values())
        revision = f" at {base.revision}" if base.revision else ""
        facts = {
            "made": f"{manifest.created:%Y-%m-%d %H:%M} UTC",
            "small model": f"{base.ref}{revision} (hidden size {base.hidden})",
            "vocabulary": base.vocabulary_sha256[:16],
            "unembedding": base.unembedding_sha256[:16],
            "recorded": f"{manifest.provenance.tokens:,} domain tokens",
            "files": f"{len(manifest.files)}, {readable_bytes(total)}, every sha256 as stated",
            "licences": f"adapter {manifest.licences.adapter}; data {manifest.licences.data};"
            f" models {manifest.licences.models}",
        }
        lines = [f"{manifest.name}  ({self.folder})", *_aligned(facts), ""]
        lines += [*_carriers(manifest), "", "blend", *_aligned(_blend(manifest))]
        if manifest.metrics:
            lines += ["", "metrics", *_aligned(flat(manifest.metrics))]
        return _printable(lines)


def show(adapter: Path) -> ShowResult:
    """Read an adapter and check every file of it.

    Args:
        adapter: Adapter folder.

    Returns:
        The adapter's manifest, and its description as `summary()`.

    Raises:
        AdapterError: It is no adapter, or a file is missing, changed, unlisted, or a link.
    """
    return ShowResult(adapter, read_manifest(adapter, read_again=True))


def describe_list(adapters: list[LocalAdapter]) -> str:
    """Describe found adapters, one a line.

    Args:
        adapters: What `list_adapters` found.

    Returns:
        Lines of name, carriers, size, small model and folder; a remark when there are none.
    """
    if not adapters:
        return "no adapters here; make one with `trimtab fit`"
    head = ("name", "carriers", "size", "small model", "folder")
    rows = [head, *(_row(adapter) for adapter in adapters)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines += [f"cannot read {found.problem}" for found in adapters if found.problem]
    return _printable(lines)


def _row(adapter: LocalAdapter) -> tuple[str, str, str, str, str]:
    manifest = adapter.manifest
    if manifest is None:
        return ("?", "?", "?", "?", str(adapter.folder))
    size = readable_bytes(sum(entry.bytes for entry in manifest.files.values()))
    carriers = ",".join(manifest.carriers)
    return (manifest.name, carriers, size, manifest.base_model.ref, str(adapter.folder))


def _carriers(manifest: AdapterManifest) -> list[str]:
    lines = ["carriers"]
    for name, carrier in manifest.carriers.items():
        hidden = {"kind", "files", "contains_text", "gate", "own_gate", "bytes_gate"}
        kept = carrier.model_dump(mode="json", exclude=hidden, exclude_none=True)
        told = {key: value for key, value in kept.items() if value != []}
        settings = ", ".join(f"{key} {readable_value(value)}" for key, value in told.items())
        lines.append(f"  {name}: {readable_bytes(manifest.bytes_of(name))}, {settings}")
        lines.append(f"    {READ_BACK[name].replace('**', '')}")
    return [*lines, f"  beside them, to be mounted with: {readable_bytes(manifest.bytes_beside)}"]


def _blend(manifest: AdapterManifest) -> dict[str, str]:
    """How the carriers are weighed, in words."""
    blend = manifest.blend
    found = {
        "host's prior": f"{blend.host_prior:g}: trust in the bare host before the text has said"
        " anything; the others share the rest",
        "share": f"{blend.share:g} of the evidence is dealt out anew at each token, so that a text"
        " may turn",
    }
    has_memory = "memory" in manifest.carriers
    if has_memory:
        shifts = ", ".join(f"{shift:+g}" for shift in blend.gate_shifts)
        found["memory's gate"] = f"log-odds {shifts}: how readily it is followed, a predictor each"
    if "expert" in manifest.carriers:
        for name, (host, expert, reference) in blend.live.items():
            by = {"host": host, "expert": expert, "reference": -reference}
            powers = " ".join(f"{who}^{power:g}" for who, power in by.items() if power)
            is_joined = has_memory and name in blend.live_with_memory
            also = ", also with the memory" if is_joined else ""
            found[f"live {name}"] = f"{powers}{also}"
    return found


def _printable(lines: list[str]) -> str:
    # Names come from files of strangers: their control characters must not reach a terminal.
    text = "\n".join(lines)
    return "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in text)


def _aligned(facts: dict[str, str]) -> list[str]:
    width = max(map(len, facts))
    return [f"  {key.ljust(width)}  {value}" for key, value in facts.items()]
