"""The words of an adapter's manifest: what it holds, what it needs, where it came from.

docs/format.md is the normative description; store/manifest.py reads and writes it.
"""

import re
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    StringConstraints,
    field_validator,
    model_validator,
)

from trimtab.config import CarrierName

FORMAT = "trimtab-adapter"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
CARRIER_PATHS: dict[CarrierName, str] = {
    "head": "head.safetensors",
    "memory": "memory/",
    "expert": "expert/",
}
"""Where each carrier's payload lies: a file, or a folder (ending in a slash)."""

DATA_SUFFIXES = (".safetensors", ".parquet", ".json", ".jsonl", ".md", ".txt")
"""Files that hold data and nothing that runs; an adapter has no others."""

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def _checked_path(path: str) -> str:
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or re.search(r"[\\:\x00-\x1f]", path):
        raise ValueError(f"{path!r} is not a plain relative path inside the adapter")
    if path == MANIFEST_NAME or any(part.startswith(".") for part in parts):
        raise ValueError(f"{path!r} cannot be a payload file")
    if PurePosixPath(path).suffix not in DATA_SUFFIXES:
        raise ValueError(f"{path!r} is of no data format; allowed: {', '.join(DATA_SUFFIXES)}")
    return path


def carrier_of(path: str) -> CarrierName | None:
    """Tell which carrier a payload file belongs to; None for files that all share."""
    for carrier, place in CARRIER_PATHS.items():
        if path == place or (place.endswith("/") and path.startswith(place)):
            return carrier
    return None


class Part(BaseModel):
    """Base of all pieces of a manifest: frozen, no unknown keys, documented fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True
    )


class FileEntry(Part):
    """What a payload file must be."""

    sha256: Sha256
    """Digest of the full content, lower-case hexadecimal."""
    bytes: int = Field(ge=0)
    """Size."""


class Gate(Part):
    """When a memory speaks: a logistic function of named features of a look-up."""

    features: tuple[str, ...] = ()
    """Names of the features, in the order of the weights."""
    weights: tuple[FiniteFloat, ...] = ()
    """One weight per feature."""

    @model_validator(mode="after")
    def _one_weight_each(self) -> Self:
        if len(self.features) != len(self.weights):
            raise ValueError(f"{len(self.features)} features but {len(self.weights)} weights")
        return self


class HeadCarrier(Part):
    """A low-rank layer on the small model's final hidden state."""

    kind: Literal["head"] = "head"
    """Discriminator."""
    files: tuple[str, ...] = ()
    """Payload files; filled in on writing."""
    contains_text: Literal[False] = False
    """A head stores weights, no text."""
    rank: int = Field(ge=1)
    """Rank of the shift."""
    linear: bool = True
    """The shift is linear in the hidden state, so that it can be served as a LoRA on lm_head."""
    hidden: int = Field(ge=1)
    """Size of the hidden state that it reads: the small model's, or that of `host`."""
    host: str | None = None
    """The one host that a host-fit head works on; null where any can be mounted."""
    host_vocabulary_sha256: Sha256 | None = None
    """Fingerprint of that host's vocabulary."""
    host_unembedding_sha256: Sha256 | None = None
    """Fingerprint of that host's unembedding."""

    @model_validator(mode="after")
    def _host_is_whole(self) -> Self:
        named = (self.host, self.host_vocabulary_sha256, self.host_unembedding_sha256)
        if len({part is None for part in named}) != 1:
            raise ValueError("a host-fit head needs its host's name and both its fingerprints")
        return self


class Earlier(Part):
    """A memory that entries were appended to."""

    sha256: Sha256
    """Fingerprint of its file."""
    entries: int = Field(ge=0)
    """Its entries, which are the first of the larger one's."""


class MemoryCarrier(Part):
    """A nearest-neighbour store of what followed in the training text."""

    kind: Literal["memory"] = "memory"
    """Discriminator."""
    files: tuple[str, ...] = ()
    """Payload files; filled in on writing."""
    contains_text: Literal[True] = True
    """A memory's values are pieces of the training text."""
    entries: int = Field(ge=0)
    """Number of keys."""
    key_size: int = Field(ge=1)
    """Dimensions of a key."""
    values: Literal["hard", "soft"] = "hard"
    """What an entry says: the bytes that followed, or the expert's distribution."""
    gate: Gate = Gate()
    """When it speaks."""
    own_gate: Gate = Gate()
    """When it speaks if the model that made the keys asks with its own state."""
    bytes_gate: Gate = Gate()
    """When it speaks if its entries are found by bytes alone."""
    grown_from: tuple[Earlier, ...] = ()
    """What it was before entries were appended, the latest first."""


class ExpertCarrier(Part):
    """The tuned small model, as a LoRA over its named base."""

    kind: Literal["expert"] = "expert"
    """Discriminator."""
    files: tuple[str, ...] = ()
    """Payload files; filled in on writing."""
    contains_text: Literal[False] = False
    """An expert stores weights, no text."""
    method: Literal["lora"] = "lora"
    """Form of the weights."""
    rank: int = Field(ge=1)
    """LoRA rank."""


Carrier = Annotated[HeadCarrier | MemoryCarrier | ExpertCarrier, Field(discriminator="kind")]


class BaseModelReference(Part):
    """The small model that the carriers were made from."""

    ref: str
    """What its maker called it: hub name, folder, GGUF file, or tiny:NAME."""
    revision: str | None = None
    """Hub revision, where it has one."""
    vocabulary_sha256: Sha256
    """Fingerprint of its vocabulary: an adapter for another tokenizer is refused."""
    unembedding_sha256: Sha256
    """Fingerprint of its unembedding."""
    hidden: int = Field(ge=1)
    """Size of its hidden state."""


class Provenance(Part):
    """How the adapter was made."""

    tune: dict[str, JsonValue] = {}
    """Resolved configuration of `tune`."""
    record: dict[str, JsonValue] = {}
    """Resolved configuration of `record`."""
    fit: dict[str, JsonValue] = {}
    """Resolved configuration of `fit`."""
    packages: dict[str, str] = {}
    """Versions of the packages that computed it."""
    seed: int = 0
    """Seed of `fit`."""
    inputs: dict[str, Sha256] = {}
    """Fingerprint of each input (corpus, recording, expert)."""
    tokens: int = Field(default=0, ge=0)
    """Domain tokens that were recorded or appended."""


class Licences(Part):
    """Terms that come with the adapter, in words or as SPDX names."""

    adapter: str = "not stated"
    """Terms of the adapter itself."""
    data: str = "not stated"
    """Terms of the training text."""
    models: str = "not stated"
    """Terms of the models it was made from."""


_OWN_PREDICTORS = {
    *("host", "head", "memory", "bytes", "state", "shuffled"),
    *("proxy", "mixture", "bias", "temperature"),
}


class Blend(Part):
    """How predictors are made of the carriers and weighed against the bare host."""

    live: dict[str, tuple[FiniteFloat, FiniteFloat, FiniteFloat]] = {
        "expert-aligned": (0.0, 1.0, 0.0),
        "mean": (0.5, 0.5, 0.0),
        "lean": (0.3, 0.7, 0.0),
        "blend": (0.5, 0.8, 0.3),
    }
    """Exponents of host, expert and reference, by name.

    Chosen on licences and general text, beside the expert alone, and confirmed on Zig.
    """
    live_with_memory: tuple[str, ...] = ("mean", "lean")
    """Those of `live` that a memory is mixed into as well."""
    gate_shifts: tuple[FiniteFloat, ...] = (-2.0, 0.0, 2.0)
    """Added to the log-odds of the memory's gate, a predictor each."""
    host_prior: float = Field(default=0.5, gt=0, lt=1)
    """Trust in the bare host before any evidence; the others share the rest."""
    share: float = Field(default=0.002, gt=0, lt=1)
    """Part of the evidence that is dealt out anew at each token, so that a text may turn."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        unknown = set(self.live_with_memory) - set(self.live)
        if unknown:
            raise ValueError(f"live_with_memory names {sorted(unknown)}, which live lacks")
        if 0 not in self.gate_shifts or len(set(self.gate_shifts)) < len(self.gate_shifts):
            raise ValueError("gate_shifts needs 0, and each shift once")
        taken = [
            name
            for name in self.live
            if name.split("-")[0] in _OWN_PREDICTORS or not name.replace("-", "").isalnum()
        ]
        if taken:
            raise ValueError(f"live uses names that are taken or no words: {taken}")
        return self


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


class AdapterManifest(Part):
    """Everything that manifest.json says."""

    format: Literal["trimtab-adapter"] = FORMAT
    """Names the format."""
    format_version: Literal[1] = FORMAT_VERSION
    """Version of the format."""
    name: str = Field(min_length=1, max_length=200)
    """Name on the card."""
    created: AwareDatetime = Field(default_factory=_now)
    """When it was made, UTC, whole seconds."""
    base_model: BaseModelReference
    """The small model."""
    carriers: dict[CarrierName, Carrier] = Field(min_length=1)
    """What it carries; each key is the carrier's kind."""
    blend: Blend = Blend()
    """How its predictors are made and weighed."""
    metrics: dict[str, JsonValue] = {}
    """What was measured while it was made."""
    licences: Licences = Licences()
    """Terms of use."""
    provenance: Provenance = Provenance()
    """How it was made."""
    files: dict[str, FileEntry] = {}
    """Every payload file by its path inside the adapter; filled in on writing."""

    @field_validator("name")
    @classmethod
    def _one_line(cls, name: str) -> str:
        if not name.isprintable():
            raise ValueError("a name is one line of printable characters")
        return name

    @field_validator("created")
    @classmethod
    def _whole_seconds_utc(cls, created: datetime) -> datetime:
        return created.astimezone(UTC).replace(microsecond=0)

    @field_validator("carriers")
    @classmethod
    def _from_light_to_heavy(
        cls, carriers: dict[CarrierName, Carrier]
    ) -> dict[CarrierName, Carrier]:
        return {name: carriers[name] for name in CARRIER_PATHS if name in carriers}

    @field_validator("files")
    @classmethod
    def _plain_paths(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for path in files:
            _checked_path(path)
        return files

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, carrier in self.carriers.items():
            if name != carrier.kind:
                raise ValueError(f"carrier {name!r} is of kind {carrier.kind!r}")
            strange = [p for p in carrier.files if p not in self.files or carrier_of(p) != name]
            if strange:
                raise ValueError(
                    f"carrier {name!r} names files that are not listed or lie outside"
                    f" {CARRIER_PATHS[name]}: {strange}"
                )
        return self

    @property
    def head(self) -> HeadCarrier | None:
        """The head, if it carries one."""
        carrier = self.carriers.get("head")
        return carrier if isinstance(carrier, HeadCarrier) else None

    @property
    def memory(self) -> MemoryCarrier | None:
        """The memory, if it carries one."""
        carrier = self.carriers.get("memory")
        return carrier if isinstance(carrier, MemoryCarrier) else None

    @property
    def expert(self) -> ExpertCarrier | None:
        """The expert, if it carries one."""
        carrier = self.carriers.get("expert")
        return carrier if isinstance(carrier, ExpertCarrier) else None

    @property
    def contains_text(self) -> bool:
        """Some carrier holds pieces of the training text."""
        return any(carrier.contains_text for carrier in self.carriers.values())

    def bytes_of(self, carrier: CarrierName) -> int:
        """Size of a carrier's payload on disk; 0 if it is not carried."""
        files = self.carriers[carrier].files if carrier in self.carriers else ()
        return sum(self.files[path].bytes for path in files)

    @property
    def bytes_beside(self) -> int:
        """Size of what no carrier has to itself: what mounts all of them, and the card."""
        carried = sum(self.bytes_of(name) for name in self.carriers)
        return sum(entry.bytes for entry in self.files.values()) - carried
