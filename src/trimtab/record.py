"""Record what an expert and its reference think at every position of a text."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trimtab.backends.chat import Rendered, chat_renderer
from trimtab.backends.pair import Pair, PairStates, open_pair
from trimtab.behind import Do, one_behind
from trimtab.compact import SAMPLE_ROWS, StateCode, code_for
from trimtab.config import RecordConfig
from trimtab.encoding import bits_needed
from trimtab.errors import InputError
from trimtab.processes import Piece, do_pieces, process_count
from trimtab.soft_targets import (
    Encoder,
    Heads,
    passage_columns,
    run_passages,
    run_reference,
    shard_seed,
    state_columns,
)
from trimtab.store.expert import EXPERT_NAME, HELD_OUT_NAME, TRAIN_NAME, read_expert
from trimtab.store.files import (
    lock,
    package_versions,
    sha256_file,
    write_json,
)
from trimtab.store.recording import (
    file_entry,
    read_code,
    shard_entry,
    write_code,
    write_shard,
    write_unembedding,
)
from trimtab.store.recording_run import RecordingRun, begin_run, check_same_run
from trimtab.store.recording_schema import (
    CODE_NAME,
    DOCUMENTS_NAME,
    EXPERT_SPLITS,
    MANIFEST_NAME,
    PARTIAL_NAME,
    UNEMBEDDING_NAME,
    CompactEncoding,
    Encoding,
    ExactEncoding,
    MovedHead,
    RecordingManifest,
    SampledEncoding,
    SparseEncoding,
    Split,
    SplitEntry,
    read_recording_manifest,
    shard_name,
)
from trimtab.text.corpus import load_documents, read_documents, sha256_of_documents
from trimtab.text.passages import DocumentTokens, Passage, cut_shards, rows_of, tokenised
from trimtab.text.probe import probe_documents
from trimtab.types import Advance, Document, Progress, silent


@dataclass(frozen=True)
class RecordResult:
    """What recording gave.

    Attributes:
        folder: Folder of the recording.
        tokens: Recorded positions.
        read_tokens: The same, those that the expert read too counted twice.
        split_tokens: Recorded positions of each split.
        bytes_per_token: Size of the training text's shards, and of what they share, over its
            positions.
        encoding: exact, compact, sparse or sampled.
    """

    folder: Path
    tokens: int
    read_tokens: int
    split_tokens: Mapping[Split, int]
    bytes_per_token: float
    encoding: str

    def summary(self) -> str:
        """What was recorded, in one line."""
        parts = ", ".join(f"{name} {tokens:,}" for name, tokens in self.split_tokens.items())
        return (
            f"recording in {self.folder}: {self.tokens:,} tokens ({parts}), {self.encoding},"
            f" {self.bytes_per_token:,.0f} bytes a training token"
        )


def record(config: RecordConfig, *, progress: Progress = silent) -> RecordResult:
    """Run expert and reference over text and store their soft targets.

    Three splits are recorded: train (`data`, or what the expert was tuned on), held_out (what
    tuning held out; under a token limit, at most a fifth of it) and general. The expert reads the
    first alone, since a head learns what it changes there, and gates learn from the reference
    where neither model was tuned. An interrupted run continues at its first missing shard and
    ends with the same bytes on the same machine; a finished folder is returned as it is.

    Args:
        config: What to record, how, and where to.
        progress: Shows the forward passes.

    Returns:
        Where the recording is and how large.

    Raises:
        InputError: No finished expert, text that cannot be used, or a folder that holds other
            things or a recording with other settings or text.
        ModelError: The reference cannot be opened, or is not the one that was tuned.
        AdapterError: The expert's LoRA is broken.
        NumericalError: A hidden state that is not a finite number.
        StorageError: The folder cannot be written.
    """
    asked = _asked(config)
    with lock(config.out):
        if (config.out / MANIFEST_NAME).is_file():
            manifest = read_recording_manifest(config.out)
            found = RecordingRun.model_validate(
                manifest.model_dump(include={"config", "inputs", "packages"})
            )
            check_same_run(config.out, found, asked)
        else:
            manifest = _run(config, asked, progress)
        # Also here, for a run that was killed between finishing and cleaning up.
        (config.out / PARTIAL_NAME).unlink(missing_ok=True)
    return RecordResult(
        folder=config.out,
        tokens=manifest.tokens,
        read_tokens=manifest.read_tokens,
        split_tokens={name: split.tokens for name, split in manifest.splits.items()},
        bytes_per_token=manifest.bytes_per_token,
        encoding=manifest.encoding.kind,
    )


def _asked(config: RecordConfig) -> RecordingRun:
    # expert.json holds the fingerprints of all the expert's files, its documents included.
    read_expert(config.expert, verify=False)
    inputs = {"expert": sha256_file(config.expert / EXPERT_NAME)}
    for name, patterns in (("data", config.data), ("general", config.general)):
        if patterns:
            documents = read_documents(patterns, render_chat=_as_written)
            inputs[name] = sha256_of_documents(documents)
    if not config.general:
        inputs["general"] = sha256_of_documents(probe_documents())
    settings = config.model_dump(mode="json", exclude={"out", "processes"})
    return RecordingRun(config=settings, inputs=inputs, packages=package_versions())


def _as_written(messages: Sequence[Mapping[str, str]]) -> Rendered:
    """Stand in for a chat template, so that a finished folder is known without a model."""
    return repr([sorted(message.items()) for message in messages]), ()


def _run(config: RecordConfig, asked: RecordingRun, progress: Progress) -> RecordingManifest:
    begin_run(config.out, asked)
    pair = _open(config, progress)
    heads = Heads(pair.reference_unembedding, pair.expert_unembedding)
    splits = _splits(config, pair)
    code = None
    if config.encoding == "compact":
        code = _code(config, pair, heads, splits["train"], progress)
    encoding = _encoding(config, heads, code)
    _write_shards(config, pair, Encoder(heads, encoding, code), splits, progress)
    documents = {name: split.listed() for name, split in splits.items()}
    write_json(config.out / DOCUMENTS_NAME, documents)
    moved = _write_head(config, heads)
    files = [
        DOCUMENTS_NAME,
        *([UNEMBEDDING_NAME] if moved else []),
        *([CODE_NAME] if code else []),
    ]
    expert = read_expert(config.expert, verify=False)
    manifest = RecordingManifest(
        base=expert.base,
        method=expert.method,
        encoding=encoding,
        vocab=heads.vocab,
        dtype=str(heads.reference.weight.dtype).removeprefix("torch."),
        expert_head=moved,
        splits={name: split.entry() for name, split in splits.items()},
        expert_splits=EXPERT_SPLITS,
        shards=tuple(
            shard_entry(config.out / shard_name(name, index), name, rows=rows_of(shard))
            for name, split in splits.items()
            for index, shard in enumerate(split.shards)
        ),
        files={name: file_entry(config.out / name) for name in files},
        config=asked.config,
        packages=asked.packages,
        seed=config.seed,
        inputs=asked.inputs,
    )
    write_json(config.out / MANIFEST_NAME, manifest.model_dump(mode="json"))
    return manifest


def _open(config: RecordConfig, progress: Progress) -> Pair:
    pair = open_pair(config.expert, dtype=config.dtype, progress=progress)
    longest = pair.reference.max_tokens
    needed = config.window_tokens + len(pair.reference.context_ids())
    if longest is not None and needed > longest:
        raise InputError(
            f"a window of {needed} tokens exceeds the {longest} positions of {pair.reference.ref}",
            hint=f"set --window-tokens to at most {longest - needed + config.window_tokens}",
        )
    return pair


def _encoding(config: RecordConfig, heads: Heads, code: StateCode | None) -> Encoding:
    vocab = heads.vocab
    id_bits = bits_needed(vocab)
    if code is not None:
        return CompactEncoding(**asdict(code.precision), id_bits=id_bits)
    if config.encoding == "sparse":
        return SparseEncoding(top_k=min(config.top_k, vocab), id_bits=id_bits)
    if config.encoding == "sampled":
        count_bits = bits_needed(config.top_k)
        return SampledEncoding(draws=config.top_k, id_bits=id_bits, count_bits=count_bits)
    return ExactEncoding()


def _code(
    config: RecordConfig,
    pair: Pair,
    heads: Heads,
    train: "_SplitWork",
    progress: Progress,
) -> StateCode:
    """What shards are encoded with, which a sample of the text decides when a run begins."""
    if not heads.same:
        raise InputError(
            f"the expert {config.expert} has a head of its own, and the compact encoding keeps a"
            " difference of states that one head reads",
            hint="record with --encoding exact, or tune with --method lora",
        )
    path = config.out / CODE_NAME
    if not path.is_file():
        passages = [passage for shard in train.shards for passage in shard]
        every = max(1, train.tokens // SAMPLE_ROWS)
        sample = passages[::every]
        with progress("sampling states for the code (tokens)", rows_of(sample)) as advance:
            states = run_passages(pair, train.documents, sample, advance=advance)
        write_code(path, code_for(*states, heads.reference))
    return read_code(path, heads.reference)


@dataclass(frozen=True)
class _SplitWork:
    text_sha256: str
    documents: list[DocumentTokens]
    shards: list[list[Passage]]

    @property
    def tokens(self) -> int:
        return sum(len(document.token_ids) for document in self.documents)

    def entry(self) -> SplitEntry:
        return SplitEntry(
            tokens=self.tokens, documents=len(self.documents), text_sha256=self.text_sha256
        )

    def listed(self) -> list[dict[str, Any]]:
        return [
            {"name": document.name, "tokens": len(document.token_ids)}
            for document in self.documents
        ]


def _splits(config: RecordConfig, pair: Pair) -> dict[Split, _SplitWork]:
    documents = _documents(config, pair)
    limit = config.max_tokens
    held_out = _cut(config, documents["held_out"], pair, None if limit is None else limit // 5)
    left = None if limit is None else limit - held_out.tokens
    work: dict[Split, _SplitWork] = {
        "train": _cut(config, documents["train"], pair, left),
        "held_out": held_out,
        "general": _cut(config, documents["general"], pair, config.general_tokens),
    }
    if work["train"].tokens < 2:
        raise InputError(
            f"the text to record has {work['train'].tokens} tokens, expected at least 2",
            hint="give more text in data",
        )
    return work


def _documents(config: RecordConfig, pair: Pair) -> dict[Split, list[Document]]:
    render = chat_renderer(pair.reference)
    train, held_out = (load_documents(config.expert / name) for name in (TRAIN_NAME, HELD_OUT_NAME))
    return {
        "train": read_documents(config.data, render_chat=render) if config.data else train,
        "held_out": held_out,
        "general": read_documents(config.general, render_chat=render)
        if config.general
        else probe_documents(),
    }


def _cut(
    config: RecordConfig, documents: Sequence[Document], pair: Pair, max_tokens: int | None
) -> _SplitWork:
    texts = tokenised(
        documents,
        lambda document: pair.reference.encode(document.text, markup=document.markup),
        max_tokens=max_tokens,
        seed=config.seed,
    )
    shards = cut_shards(
        texts,
        window=config.window_tokens,
        stride=config.stride_tokens,
        shard_tokens=config.shard_tokens,
    )
    return _SplitWork(sha256_of_documents(documents), texts, shards)


def _write_shards(
    config: RecordConfig,
    pair: Pair,
    encoder: Encoder,
    splits: Mapping[Split, _SplitWork],
    progress: Progress,
) -> None:
    def of_both(path: Path, split: _SplitWork, shard: Sequence[Passage], advance: Advance) -> None:
        def states(advance: Advance) -> PairStates:
            return run_passages(pair, split.documents, shard, advance=advance)

        columns = passage_columns(split.documents, shard)
        seed = shard_seed(config.seed, path.name)
        encoded = encoder.run(states, seed, lambda rows: advance(2 * rows))
        finish(lambda: write_shard(path, columns | encoded()))

    def of_one(path: Path, split: _SplitWork, shard: Sequence[Passage], advance: Advance) -> None:
        columns = passage_columns(split.documents, shard)
        states = run_reference(pair.reference, split.documents, shard, advance=advance)
        finish(lambda: write_shard(path, columns | state_columns(states)))

    models = {name: 2 if name in EXPERT_SPLITS else 1 for name in splits}
    total = sum(models[name] * split.tokens for name, split in splits.items())
    title = "recording (tokens, each model's)"
    with progress(title, total) as advance, _finishing(config, pair) as finish:
        missing: list[Piece] = []
        sizes: list[int] = []
        for name, split in splits.items():
            write = of_both if name in EXPERT_SPLITS else of_one
            for index, shard in enumerate(split.shards):
                path = config.out / shard_name(name, index)
                sizes.append(models[name] * rows_of(shard))
                if path.is_file():
                    # Shards appear whole, so one that is there was finished by this same run.
                    advance(sizes[-1])
                else:
                    missing.append(Piece(partial(write, path, split, shard), sizes[-1]))
        missing.sort(key=lambda piece: -piece.size)
        count = process_count(sorted(sizes, reverse=True), config.processes)
        do_pieces(missing, advance, count)


def _finishing(config: RecordConfig, pair: Pair) -> AbstractContextManager[Do]:
    """When shards are encoded and written: at once, or while the next one's states are made."""
    if _is_on_gpu(pair) and config.encoding != "compact":
        return one_behind()
    # On a processor both would want the same cores. And compact encoding takes so much longer than
    # the passes that nothing is left to gain.
    return nullcontext(lambda work: work())


def _is_on_gpu(pair: Pair) -> bool:
    return pair.reference.unembedding.weight.is_cuda


def _write_head(config: RecordConfig, heads: Heads) -> MovedHead | None:
    """Keep the expert's head where its hidden states are kept and it is not the reference's."""
    if config.encoding != "exact" or heads.same:
        return None
    return write_unembedding(config.out / UNEMBEDDING_NAME, heads.expert)
