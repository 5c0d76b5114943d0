"""Encoder-decoder hosts: what they read, how a target is steered, and what it costs."""

import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from torch import Tensor
from transformers import MarianConfig, MarianMTModel, MarianTokenizer

from bench.compatibility.adapter import small_adapter
from trimtab.backends.chat import prompt_ids
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.backends.tokenizers import read_vocabulary
from trimtab.config import (
    EvaluateConfig,
    GenerateConfig,
    MountConfig,
)
from trimtab.errors import InputError, ModelError
from trimtab.evaluate import evaluate
from trimtab.generate import generate, steered
from trimtab.mount import mount
from trimtab.steering.evidence import keep_own
from trimtab.steering.mounted import Mounted
from trimtab.steering.predictors import Steering
from trimtab.steering.processor import open_live
from trimtab.steering.rows import SOURCE_HOST_PRIOR, blend_on
from trimtab.steering.scoring import score_document
from trimtab.store.adapter_schema import Blend

WORDS = "keel rudder tiller anchor hull mast sail rope winch buoy harbour tide".split()
SOURCES = ("Le gouvernail tourne la coque.", "Une ancre.")
TARGET = "The rudder turns the hull."
FAMILIES = ("tiny:t5?hidden=32", "tiny:bart?hidden=32", "tiny:marian?hidden=32&vocab=bpe")
CARRIERS = [("head",), ("memory",), ("expert",), ("head", "memory", "expert")]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_adapter(tmp_path_factory.mktemp("adapter"), "tiny:llama?hidden=32")


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Marian model on disk, with one SentencePiece model a side over one vocabulary."""
    folder = tmp_path_factory.mktemp("marian")
    text = files("trimtab").joinpath("data/tiny_corpus.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip()]
    spelling = [*(chr(c) for c in range(33, 127)), *"éàçùÉ«»"]
    pieces: dict[str, int] = {"</s>": 0, "<unk>": 1}
    for side, size in (("source", 160), ("target", 190)):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines if side == "target" else [w[::-1] for w in lines]),
            model_prefix=str(folder / side),
            vocab_size=size,
            required_chars="".join(spelling),
            hard_vocab_limit=False,
            minloglevel=2,
        )
        (folder / f"{side}.model").rename(folder / f"{side}.spm")
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{side}.spm"))
        for number in range(3, model.get_piece_size()):
            pieces.setdefault(model.id_to_piece(number), len(pieces))
    pieces["<pad>"] = len(pieces)
    (folder / "vocab.json").write_text(json.dumps(pieces))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "MarianTokenizer"})
    )
    config = MarianConfig(
        vocab_size=len(pieces),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        eos_token_id=0,
        pad_token_id=pieces["<pad>"],
        decoder_start_token_id=pieces["<pad>"],
        bad_words_ids=[[pieces["<pad>"]]],
        forced_eos_token_id=0,
        num_beams=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        made = MarianMTModel(config)
        made.final_logits_bias.normal_()
    made.save_pretrained(folder)
    return str(folder)


def source(host: HFModel, text: str) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([prompt_ids(host, text)])}


def seated(adapter: Path, host: HFModel) -> Mounted:
    settings = {"adapter": adapter, "host": host.ref, "dtype": "float32", "cache": False}
    return mount(MountConfig.model_validate(settings), host=host)


def run(adapter: Path | None, host: str, **options: Any):
    settings = {"host": host, "prompt": SOURCES, "adapter": adapter, "dtype": "float32"}
    return generate(GenerateConfig.model_validate({"max_new_tokens": 6, **settings, **options}))


@pytest.mark.parametrize("ref", [*FAMILIES, "marian"])
def test_logits_of_the_decoders_states_are_the_models_own(ref: str, marian: str) -> None:
    host = open_model(marian if ref == "marian" else ref, dtype="float32")
    read = torch.tensor([host.encode_source(SOURCES[0])])
    target = torch.tensor([host.context_ids() + host.encode(TARGET)])
    with torch.no_grad():
        own = host.model(input_ids=read, decoder_input_ids=target).logits
        ours = host.unembedding.logits(host.hidden(target, encoder_ids=read))
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
    assert (host.unembedding.bias is None) is ("t5" in ref)
    other = host.hidden(target, encoder_ids=torch.tensor([host.encode_source("Une ancre.")]))
    assert not torch.allclose(host.unembedding.logits(other), own, atol=1e-3)


def test_a_target_begins_as_generation_begins_it(marian: str) -> None:
    for ref, expected in (
        ("tiny:t5", [258]),
        ("tiny:bart", [257, 256]),
        ("tiny:marian", [258]),
        (marian, None),
    ):
        host = open_model(ref, dtype="float32")
        found = host.model.generate(**source(host, "x"), max_new_tokens=3, num_beams=1)
        first = host.context_ids()
        assert found[0, : len(first)].tolist() == first
        assert expected in (None, first)


def test_sources_and_targets_are_encoded_as_the_tokenizer_does(marian: str) -> None:
    host = open_model(marian, dtype="float32")
    tokenizer = host.tokenizer
    assert isinstance(tokenizer, MarianTokenizer)
    text = "The rudder turns the hull"
    assert host.encode_source(text) == tokenizer(text)["input_ids"]
    assert [*host.encode(text), 0] == tokenizer(text_target=text)["input_ids"]
    assert host.encode(text) != host.encode_source(text)[:-1]
    assert host.vocabulary.prefix_space
    assert host.vocabulary.bos_id is None
    spelled = b"".join(host.vocabulary.token_bytes[i] or b"" for i in host.encode(text))
    assert spelled == b" " + text.encode()
    # Such a tokenizer has no line's end, and another mark shows how a text goes on.
    following = host.encode_following("rudder")
    assert b"".join(host.vocabulary.token_bytes[i] or b"" for i in following) == b"rudder"


def test_a_source_beyond_the_positions_is_refused(marian: str) -> None:
    with pytest.raises(InputError, match=r"a source text has \d+ tokens, .* positions for 64"):
        run(None, marian, prompt=("rudder " * 60,))
    # A target ends where the decoder's positions end.
    assert max(run(None, marian, max_new_tokens=500).tokens) <= 63


def test_a_vocabulary_a_side_is_refused(marian: str) -> None:
    host = open_model(marian, dtype="float32")
    host.tokenizer.separate_vocabs = True  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="one vocabulary for sources and another"):
        read_vocabulary(host.tokenizer, 10)


@pytest.mark.parametrize("ref", [*FAMILIES, "marian"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "top_k": 50, "seed": 3}])
def test_strength_zero_is_the_host_itself(
    adapter: Path, marian: str, ref: str, options: dict[str, Any]
) -> None:
    host = marian if ref == "marian" else ref
    plain = run(None, host, **options)
    assert run(adapter, host, strength=0, **options).texts == plain.texts
    assert plain.texts[0] == "" or plain.texts[0][0] != " "


@pytest.mark.parametrize(
    ("ref", "carriers"),
    [*(("marian", carriers) for carriers in CARRIERS), *((ref, CARRIERS[-1]) for ref in FAMILIES)],
)
def test_generation_and_measurement_agree(
    adapter: Path, marian: str, ref: str, carriers: tuple[Any, ...]
) -> None:
    """Two ways to the same figure: a step of `generate` after a target's beginning, and a row."""
    host = open_model(marian if ref == "marian" else ref, dtype="float32")
    mounted = seated(adapter, host)
    live = open_live(mounted, host, dtype="float32") if "expert" in carriers else None
    row = {1: carriers[0].replace("expert", "live"), 3: "all"}[len(carriers)]
    steering = Steering(
        rows=(row,),
        heads={"head": mounted.head} if mounted.head and "head" in carriers else {},
        memories={"memory": mounted.memory} if mounted.memory and "memory" in carriers else {},
        live=live,
        blend=blend_on(mounted.manifest.blend, reads_source=True),
    )
    windows = {"window_tokens": 48, "stride_tokens": 24}
    scored = score_document(host, TARGET, steering, source=SOURCES[0], **windows)
    ids = host.encode(TARGET)
    assert list(scored.token_ids) == ids
    assert sum(scored.sizes) == len(TARGET.encode())
    is_text = torch.tensor([bool(text) for text in host.vocabulary.token_bytes])
    for step in (0, 1, 5):
        begun = torch.tensor([host.context_ids() + ids[:step]])
        with steered(host, mounted, carriers=carriers, live=live) as model:
            found: Any = model.generate(
                **source(host, SOURCES[0]),
                decoder_input_ids=begun,
                max_new_tokens=1,
                num_beams=1,
                forced_eos_token_id=None,
                forced_bos_token_id=None,
                output_scores=True,
                return_dict_in_generate=True,
            )
        logprobs = found.scores[0][0]
        assert float(logprobs.exp().sum()) == pytest.approx(1, abs=1e-4)
        plain = host.logits(begun, encoder_ids=source(host, SOURCES[0])["input_ids"])[0, -1]
        plain = plain.log_softmax(-1)
        allowed = ~logprobs.isneginf()
        # The end of a target is the host's own affair.
        same = ~is_text & allowed
        torch.testing.assert_close(logprobs[same], plain[same], atol=1e-4, rtol=1e-4)
        # A row of `evaluate` has no such rule: there the end takes part.
        expected = float(scored.rows[row].logprobs[step])
        assert float(logprobs[ids[step]]) == pytest.approx(expected, abs=0.05)
        if step:
            assert (logprobs[is_text] - plain[is_text]).abs().max() > 1e-3


@pytest.mark.parametrize("ref", [FAMILIES[1], "marian"])
def test_beams_are_steered(adapter: Path, marian: str, ref: str) -> None:
    """A beam's score is the sum of the steered log-probabilities of its tokens."""
    host = open_model(marian if ref == "marian" else ref, dtype="float32")
    mounted = seated(adapter, host)
    live = open_live(mounted, host, dtype="float32")
    carriers = ("head", "memory", "expert")
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True}
    options |= {"max_new_tokens": 4, "eos_token_id": None, "forced_eos_token_id": None}
    with steered(host, mounted, carriers=carriers, live=live, strength=1.5) as model:
        beams: Any = model.generate(
            **source(host, SOURCES[0]), num_beams=3, length_penalty=0.0, **options
        )
    with steered(host, mounted, carriers=carriers, live=live, strength=1.5) as model:
        total = 0.0
        start = beams.sequences.shape[1] - len(beams.scores)
        for step in range(len(beams.scores)):
            # No evidence: each step is a generation of its own whose target has just begun.
            forced = [beams.sequences[0, start + step].item()]
            path = beams.sequences[0, start : start + step].tolist() + forced
            single: Any = model.generate(
                **source(host, SOURCES[0]),
                num_beams=1,
                prefix_allowed_tokens_fn=None,
                logits_processor=[_Forces(path, start)],
                **options,
            )
            total += float(single.scores[step][0].max())
    assert float(beams.sequences_scores[0]) == pytest.approx(total, abs=1e-3)


class _Forces:
    """Lets a generation follow a path: a logits processor after ours."""

    def __init__(self, path: list[int], start: int) -> None:
        self._path, self._start = path, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = input_ids.shape[1] - self._start
        if place >= len(self._path):
            return scores
        only = torch.full_like(scores, -torch.inf)
        only[:, self._path[place]] = scores[:, self._path[place]]
        return only


def test_keep_own_keeps_and_sums_to_one() -> None:
    torch.manual_seed(1)
    host, steered_logprobs = (torch.randn(3, 7).log_softmax(-1) for _ in range(2))
    own = torch.tensor([True, False, False, False, False, False, True])
    kept = keep_own(steered_logprobs, host, own)
    torch.testing.assert_close(kept.exp().sum(-1), torch.ones(3))
    torch.testing.assert_close(kept[:, own], host[:, own])
    ratio = kept[:, ~own] - steered_logprobs[:, ~own]
    torch.testing.assert_close(ratio, ratio[:, :1].expand(-1, 5))


@pytest.mark.parametrize("ref", [FAMILIES[1], "marian"])
def test_pairs_are_evaluated(adapter: Path, marian: str, tmp_path: Path, ref: str) -> None:
    host = open_model(marian if ref == "marian" else ref, dtype="float32")
    pairs = [{"source": s, "target": f"{TARGET} {n}"} for n, s in enumerate(SOURCES)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    settings = {"adapter": adapter, "host": host.ref, "data": (str(tmp_path / "pairs.jsonl"),)}
    settings |= {"out": tmp_path / "report", "dtype": "float32", "window_tokens": 48}
    settings |= {"stride_tokens": 24}
    rows = ("reference", "expert", "head+memory", "live", "all")
    found = evaluate(EvaluateConfig.model_validate(settings | {"rows": rows}))
    ((result,), scored) = found.report.hosts, found.scored[""]
    nats = 0.0
    for pair, kept in zip(pairs, scored, strict=True):
        ids = host.encode(pair["target"])
        read = torch.tensor([host.encode_source(pair["source"])])
        start = host.context_ids()
        logits = host.logits(torch.tensor([start + ids]), encoder_ids=read)[0]
        logprobs = logits.log_softmax(-1)[len(start) - 1 : -1]
        nats -= float(logprobs.gather(1, torch.tensor(ids)[:, None]).sum())
        assert kept.small["expert"].scored_bytes == len(pair["target"].encode()) - 1
    size = sum(len(pair["target"].encode()) for pair in pairs)
    assert result.test_bytes == size
    assert result.domain["host"].mean == pytest.approx(nats / size / 0.6931472, rel=1e-3)
    assert set(rows) <= set(result.domain)
    # Each target begins without evidence, and yet costs at most this much more than the host's.
    share = Blend().share
    for kept in scored:
        host_logprobs = kept.on_host.rows["host"].logprobs
        at_most = -math.log(SOURCE_HOST_PRIOR) - len(host_logprobs) * math.log(1 - share)
        for row in ("head+memory", "live", "all"):
            dearer = float((host_logprobs - kept.on_host.rows[row].logprobs).sum())
            assert dearer <= at_most + 1e-3


def test_a_host_without_an_encoder_reads_no_pairs(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"source": "x", "target": "y"}')
    settings = {"adapter": adapter, "host": "tiny:qwen3", "data": (str(tmp_path / "pairs.jsonl"),)}
    with pytest.raises(InputError, match=r"pairs.jsonl:1 has a source, which tiny:qwen3"):
        evaluate(EvaluateConfig.model_validate(settings | {"out": tmp_path / "report"}))
