"""The manifest of a recording: what it holds, how it is encoded, where it came from."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, FiniteFloat, JsonValue, ValidationError, model_validator

from trimtab.config import TuneMethod
from trimtab.errors import RecordingError
from trimtab.store.adapter_schema import BaseModelReference, FileEntry, Part, Sha256
from trimtab.store.files import read_json

FORMAT = "trimtab-recording"
FORMAT_VERSION = 1
MANIFEST_NAME = "recording.json"
PARTIAL_NAME = "partial.json"
"""What an unfinished recording is of; gone when it is finished."""
DOCUMENTS_NAME = "documents.json"
"""Names and lengths of the recorded documents."""
UNEMBEDDING_NAME = "unembedding-expert.safetensors"
"""The expert's head, where a full fine-tune moved it."""
CODE_NAME = "code.safetensors"
"""What the shards of the compact encoding are read with."""

Split = Literal["train", "held_out", "general"]
SPLITS: tuple[Split, ...] = ("train", "held_out", "general")
EXPERT_SPLITS: tuple[Split, ...] = ("train",)
"""Text that the expert is recorded on: of all other, `fit` asks what the reference thinks alone."""
RECORD_AGAIN = "delete the folder and make it again with `trimtab record`"


def shard_name(split: Split, index: int) -> str:
    """File name of a split's shard, counted from 0."""
    return f"{split}-{index:05d}.safetensors"


class ExactEncoding(Part):
    """Both final hidden states; logits are recomputed through the unembedding."""

    kind: Literal["exact"] = "exact"
    """Discriminator."""


class SparseEncoding(Part):
    """The likeliest tokens of expert and reference, their tails and normalisers."""

    kind: Literal["sparse"] = "sparse"
    """Discriminator."""
    top_k: int = Field(ge=1)
    """Tokens kept per position."""
    id_bits: int = Field(ge=1, le=31)
    """Bits of a packed token id."""


class SampledEncoding(Part):
    """Counted draws from the expert's distribution at temperature 1 (RS-KD)."""

    kind: Literal["sampled"] = "sampled"
    """Discriminator."""
    draws: int = Field(ge=1)
    """Draws per position."""
    id_bits: int = Field(ge=1, le=31)
    """Bits of a packed token id."""
    count_bits: int = Field(ge=1, le=31)
    """Bits of a packed count, from which 1 was subtracted."""


class CompactEncoding(Part):
    """The reference's states, and of the expert's what they differ by (`trimtab.compact`)."""

    kind: Literal["compact"] = "compact"
    """Discriminator."""
    step: FiniteFloat = Field(gt=0)
    """Precision of the difference's coordinates, in the root of nats."""
    likely_tokens: int = Field(ge=1)
    """The reference's likeliest tokens, which tell how a logit matters."""
    flattening: FiniteFloat = Field(gt=0)
    """Power of their probabilities."""
    row_nats: FiniteFloat = Field(gt=0)
    """KL(expert, stored) of one position from which on its step is halved."""
    id_bits: int = Field(ge=1, le=31)
    """Bits of a packed token id."""


Encoding = Annotated[
    ExactEncoding | SparseEncoding | SampledEncoding | CompactEncoding,
    Field(discriminator="kind"),
]


class ShardEntry(Part):
    """One file of recorded positions."""

    file: str
    """Name inside the recording: SPLIT-NNNNN.safetensors."""
    split: Split
    """What text it is of."""
    rows: int = Field(ge=1)
    """Recorded positions."""
    states: Literal["float16", "float32"]
    """Type of its hidden states; float32 where some are too large for float16."""
    sha256: Sha256
    """Digest of the full content."""
    bytes: int = Field(ge=0)
    """Size."""


class SplitEntry(Part):
    """One kind of recorded text."""

    tokens: int = Field(ge=0)
    """Recorded positions."""
    documents: int = Field(ge=0)
    """Recorded documents."""
    text_sha256: Sha256
    """Digest of the documents' names and texts before they were cut to the token limit."""


class RecordedDocument(Part):
    """One recorded text, as documents.json lists it."""

    name: str
    """Name of the document in its corpus."""
    tokens: int = Field(ge=1)
    """Recorded positions."""


class MovedHead(Part):
    """How the stored head of a full fine-tune makes logits, apart from its weights."""

    scale: FiniteFloat = 1.0
    """Multiplies W h."""
    softcap: FiniteFloat | None = None
    """Bound on the logits."""


class RecordingManifest(Part):
    """Everything that recording.json says."""

    format: Literal["trimtab-recording"] = FORMAT
    """Names the format."""
    format_version: Literal[1] = FORMAT_VERSION
    """Version of the format."""
    contains_text: Literal[True] = True
    """Token ids are the text."""
    base: BaseModelReference
    """The reference."""
    method: TuneMethod
    """How the expert was tuned."""
    encoding: Encoding
    """Form of the soft targets, with its own parameters."""
    vocab: int = Field(ge=1)
    """Rows of the unembedding."""
    dtype: str
    """Arithmetic of the forward passes."""
    expert_head: MovedHead | None = None
    """Present where the expert's head is stored beside the shards."""
    splits: dict[Split, SplitEntry]
    """The kinds of recorded text."""
    expert_splits: tuple[Split, ...] = SPLITS
    """Those that hold what the expert thinks; all, where a recording does not say."""
    shards: tuple[ShardEntry, ...]
    """All shards, by split and in order."""
    files: dict[str, FileEntry]
    """All other files."""
    config: dict[str, JsonValue]
    """Resolved configuration of `record`, apart from the folder written to."""
    packages: dict[str, str]
    """Versions of the packages that computed it."""
    seed: int
    """Seed of the sampled encoding and of the choice of documents under a token limit."""
    inputs: dict[str, Sha256]
    """Digest of every input: the expert's files and the text of each split."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, split in self.splits.items():
            shards = [shard for shard in self.shards if shard.split == name]
            wanted = [shard_name(name, index) for index in range(len(shards))]
            if [shard.file for shard in shards] != wanted:
                raise ValueError(f"the shards of {name} are not {', '.join(wanted)}")
            rows = sum(shard.rows for shard in shards)
            if rows != split.tokens:
                raise ValueError(f"the shards of {name} hold {rows} of {split.tokens} tokens")
        needed = {DOCUMENTS_NAME} | ({UNEMBEDDING_NAME} if self.expert_head else set())
        needed |= {CODE_NAME} if isinstance(self.encoding, CompactEncoding) else set()
        if set(self.files) != needed or set(self.splits) != set(SPLITS):
            raise ValueError(f"expected the files {sorted(needed)} and the splits {SPLITS}")
        return self

    @property
    def hidden(self) -> int:
        """Size of a hidden state."""
        return self.base.hidden

    @property
    def tokens(self) -> int:
        """Recorded positions of all splits."""
        return sum(split.tokens for split in self.splits.values())

    def has_expert(self, split: Split) -> bool:
        """Whether positions of a split hold what the expert thinks there, if there are any."""
        return split in self.expert_splits and self.splits[split].tokens > 0

    @property
    def read_tokens(self) -> int:
        """Recorded positions, those that the expert read too counted twice."""
        return self.tokens + sum(self.splits[name].tokens for name in self.expert_splits)

    @property
    def bytes_per_token(self) -> float:
        """Size of the training text's shards, and of what they share, over its positions."""
        shared = self.files[CODE_NAME].bytes if CODE_NAME in self.files else 0
        size = sum(shard.bytes for shard in self.shards if shard.split == "train")
        return (shared + size) / max(1, self.splits["train"].tokens)


def read_recording_manifest(folder: Path) -> RecordingManifest:
    """Read recording.json; the files that it names are not looked at.

    Raises:
        RecordingError: None there, unfinished, of another format or version, an unknown key, or
            a value that cannot be.
    """
    if not (folder / MANIFEST_NAME).is_file():
        raise _absent(folder)
    raw = read_json(folder / MANIFEST_NAME, "recording manifest", error=RecordingError)
    if raw.get("format") != FORMAT:
        raise RecordingError(
            f"{folder} has format {raw.get('format')!r}, expected {FORMAT!r}",
            hint="name a folder that `trimtab record` wrote",
        )
    if raw.get("format_version") != FORMAT_VERSION:
        raise RecordingError(
            f"{folder} has format version {raw.get('format_version')!r}; this trimtab reads "
            f"version {FORMAT_VERSION}",
            hint="upgrade trimtab, or record again with this one",
        )
    try:
        return RecordingManifest.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "contents"
        said = {
            "extra_forbidden": "unknown key",
            "missing": "it is missing, as in recordings of an older trimtab",
        }
        found = said.get(problem["type"], problem["msg"])
        raise RecordingError(
            f"{folder / MANIFEST_NAME}: {where}: {found}", hint=RECORD_AGAIN
        ) from error


def _absent(folder: Path) -> RecordingError:
    if (folder / PARTIAL_NAME).is_file():
        return RecordingError(
            f"the recording {folder} is unfinished",
            hint="run the same `trimtab record` command again; it continues where it stopped",
        )
    return RecordingError(
        f"{folder} holds no recording (no {MANIFEST_NAME})",
        hint="name a folder that `trimtab record` wrote",
    )
