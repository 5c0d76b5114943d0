"""Steered generation on a real tiny adapter, against a slow reference of every step."""

import functools
import itertools
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from saving import saved
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from bench.compatibility.adapter import with_plain_gate
from trimtab.align.covers import covers_of
from trimtab.align.cut import HostCut, Left
from trimtab.align.strings import Strings
from trimtab.backends.chat import chat_prompt
from trimtab.backends.hf import HFModel
from trimtab.backends.live import Live
from trimtab.backends.open import open_model
from trimtab.backends.pair import Pair
from trimtab.backends.reading import RowText
from trimtab.blend import BlendWeights
from trimtab.carriers.memory import CONTEXT_BYTES, last_bytes
from trimtab.carriers.search import MAPPED_MATCH_WEIGHT, TEMPERATURE, look_up
from trimtab.config import FitConfig, GenerateConfig, MountConfig, RecordConfig, TuneConfig
from trimtab.errors import AdapterError, InputError, ModelError
from trimtab.fit import fit
from trimtab.generate import GenerateResult, generate, steered
from trimtab.mount import mount
from trimtab.record import record
from trimtab.steering.evidence import Mixture, ReadPrompt, readable
from trimtab.steering.mounted import Mounted
from trimtab.steering.predictors import Rows, Steering, blend_at, predicted
from trimtab.steering.processor import mixture_of, open_live, steered_by
from trimtab.steering.rows import families, row_of, with_memory
from trimtab.steering.scoring import score_document
from trimtab.store.adapter_schema import Blend
from trimtab.store.card import write_adapter
from trimtab.store.manifest import read_manifest
from trimtab.tune import tune
from trimtab.vocab import Vocabulary

BLEND = Blend()
FAMILIES = families(BLEND)
HOST = "tiny:qwen3?vocab=bpe&hidden=32"
WORDS = "keel rudder tiller anchor hull mast sail rope winch buoy harbour tide".split()
PROMPTS = ("The rudder turns the hull and the", "The m", "In the harbour the tide, äöü")


def domain_text(seed: int) -> str:
    chosen = random.Random(seed)
    one = [chosen.choice(WORDS) for _ in range(60)]
    return "\n".join(f"The {a} turns the {b}." for a, b in zip(one[::2], one[1::2], strict=True))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_adapter(tmp_path_factory.getbasetemp())


@functools.cache
def made_adapter(base: Path) -> Path:
    """Made once a run: pytest takes a fixture for another one in each module that imports it."""
    folder = base / "shared-adapter"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(domain_text(number))
    for name in ("one", "two"):
        (folder / f"{name}.md").write_text(f"Plain prose {name}, about nothing in particular. " * 6)
    tuning = {
        "model": "tiny:llama?hidden=32",
        "data": (str(folder / "*.txt"),),
        "out": folder / "expert",
        "learning_rate": 1e-2,
        "window_tokens": 128,
        "held_out": 0.25,
        "validations": 1,
        "dtype": "float32",
    }
    tune(TuneConfig.model_validate(tuning))
    recording = {
        "expert": folder / "expert",
        "out": folder / "recording",
        "general": (str(folder / "*.md"),),
        "window_tokens": 256,
        "stride_tokens": 192,
        "dtype": "float32",
    }
    record(RecordConfig.model_validate(recording))
    fitting = {
        "recording": folder / "recording",
        "out": folder / "adapter",
        "rank": 8,
        "learning_rate": 3e-2,
        "epochs": 4,
        "active_tokens": 256,
        "general_weight": 0.1,
        "key_size": 16,
    }
    return with_plain_gate(fit(FitConfig.model_validate(fitting)).folder)


@pytest.fixture(scope="module")
def host() -> HFModel:
    return open_model(HOST, dtype="float32")


@pytest.fixture(scope="module")
def mounted(adapter: Path, host: HFModel) -> Mounted:
    return mount(MountConfig.model_validate({"adapter": adapter, "host": HOST}), host=host)


def run(adapter: Path | None, *prompts: str, **options: object) -> GenerateResult:
    config = {"host": HOST, "prompt": prompts, "adapter": adapter, "dtype": "float32"}
    options = {"max_new_tokens": 8, **options}
    return generate(GenerateConfig.model_validate(config | options))


def inputs(host: HFModel, *prompts: str) -> dict[str, Tensor]:
    return padded(host, [host.context_ids() + host.encode(prompt) for prompt in prompts])


def padded(host: HFModel, ids: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, ids))
    pad = host.tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in ids]),
    }


# The reference: one position at a time, from the mounted tensors and the formulas alone.


def reference_predictors(mounted: Mounted, strength: float, logits: Tensor, h: Tensor, text: bytes):
    """Distributions of host, head, and a memory at each shift of its gate beside either."""
    head = mounted.head
    assert head
    features = torch.stack([row @ h for row in head.reading.matrix]) + head.reading.bias
    shift = torch.stack([row @ features for row in head.rows]) + head.bias
    plain = logits.exp() / logits.exp().sum()
    shifted = (logits + strength * shift).exp() / (logits + strength * shift).exp().sum()
    remembered = [
        reference_remembered(mounted, strength, p, h, text, shift)
        for p in (plain, shifted)
        for shift in BLEND.gate_shifts
    ]
    return torch.stack([plain, shifted, *remembered]).double()


def reference_remembered(
    mounted: Mounted, strength: float, probs: Tensor, h: Tensor, text: bytes, shift: float
):
    assert mounted.memory
    memory, seated = mounted.memory.memory, mounted.memory
    question = seated.reading.matrix @ h + seated.reading.bias
    cosines = memory.keys.float() @ question / question.norm()
    stored = memory.text.numpy().tobytes()
    # Which entries are found is compared with a brute force elsewhere; ties are free.
    weight = torch.tensor([MAPPED_MATCH_WEIGHT])
    near = look_up(memory, seated.index, question[None], last_bytes([text]), weight)
    near = near.entries.unique()
    found = []
    for cosine, entry in zip(cosines[near].tolist(), near.tolist(), strict=True):
        end, matched = int(memory.positions[entry]), 0
        padded = bytes(CONTEXT_BYTES) + text
        while matched < CONTEXT_BYTES and stored[end - 1 - matched] == padded[-1 - matched] != 0:
            matched += 1
        score = cosine / TEMPERATURE + MAPPED_MATCH_WEIGHT * matched
        found.append((score, matched / CONTEXT_BYTES, int(seated.values[entry, 0])))
    scores = torch.tensor([score for score, _, _ in found]).softmax(0).tolist()
    said = torch.zeros_like(probs)
    for weight, (_, _, token) in zip(scores, found, strict=True):
        if token >= 0:
            said[token] += weight
    matches = [m for _, m, _ in found]
    weighted = sum(w * m for w, m in zip(scores, matches, strict=True))
    overlap = ((said * probs).sum() + 1e-4).log()
    entropy = -(probs * probs.log()).sum()
    features = [1.0, max(matches), weighted, said.max(), overlap, entropy, probs.max().log()]
    odds = shift + sum(w * float(f) for w, f in zip(memory.gate, features, strict=True))
    gate = min(strength * float(torch.sigmoid(torch.tensor(odds))), 1 - 1e-6)
    mixed = (1 - gate) * probs + gate * said
    return mixed / mixed.sum()


def reference_next(
    host: HFModel,
    mounted: Mounted,
    strength: float,
    ids: list[int],
    prompt: int,
    message: range | None = None,
):
    """Distribution after `ids`, of which the first `prompt` tokens are evidence; or a message."""
    hidden = host.hidden(torch.tensor([ids]))[0]
    logits = host.logits(torch.tensor([ids]))[0]
    names = host.vocabulary.token_bytes
    message = message or range(prompt)
    shown = [(names[i] or b"") if t in message or t >= prompt else b"" for t, i in enumerate(ids)]
    text = [b"".join(shown[: t + 1]) for t in range(len(ids))]
    prior = torch.tensor([0.5] + [0.5 / 7] * 7, dtype=torch.float64)
    weights = prior
    for t in range(prompt - 1):
        if names[ids[t + 1]] and t + 1 in message:
            each = reference_predictors(mounted, strength, logits[t], hidden[t], text[t])
            weights = weights * each[:, ids[t + 1]]
            weights = 0.998 * weights / weights.sum() + 0.002 * prior
    last = reference_predictors(mounted, strength, logits[-1], hidden[-1], text[-1])
    return weights @ last, weights


@pytest.mark.parametrize("prompt", PROMPTS[:2])
def test_generate_follows_the_slow_reference(host: HFModel, mounted: Mounted, prompt: str) -> None:
    batch = inputs(host, PROMPTS[0], prompt)
    with steered(host, mounted, strength=0.8) as model:
        result = model.generate(
            **batch, max_new_tokens=3, output_scores=True, return_dict_in_generate=True
        )
    ids, start = result.sequences[1].tolist(), batch["input_ids"].shape[1]
    padding = int((batch["attention_mask"][1] == 0).sum())
    for step, scores in enumerate(result.scores):
        read = ids[padding : start + step]
        expected, weights = reference_next(host, mounted, 0.8, read, start - padding)
        torch.testing.assert_close(scores[1].exp().double(), expected, atol=1e-5, rtol=1e-3)
        assert 0.001 < weights[0] < 0.9
        plain = host.logits(torch.tensor([read]))[0, -1].softmax(0)
        assert (scores[1].exp() - plain).abs().max() > 1e-3


def test_the_small_model_may_lie_elsewhere(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "moved")
    manifest = read_manifest(adapter)
    base = manifest.base_model.model_copy(update={"ref": "elsewhere/model.gguf"})
    write_adapter(tmp_path / "moved", manifest.model_copy(update={"base_model": base}))
    asked = {"carriers": ("expert",), "max_new_tokens": 4}
    lost = r"the expert of .* needs the small model elsewhere/model.gguf, and there is no file"
    with pytest.raises(ModelError, match=lost) as error:
        run(tmp_path / "moved", *PROMPTS, **asked)
    assert "--small" in error.value.hint
    found = run(tmp_path / "moved", *PROMPTS, small=manifest.base_model.ref, **asked)
    assert found.texts == run(adapter, *PROMPTS, **asked).texts
    with pytest.raises(ModelError, match=r"has sha256 .* expected"):
        run(tmp_path / "moved", *PROMPTS, small="tiny:llama?hidden=32&seed=9", **asked)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.3, "top_p": 0.9, "top_k": 40, "seed": 3}]
)
def test_strength_zero_is_the_host_itself(adapter: Path, options: dict[str, object]) -> None:
    plain = run(None, *PROMPTS, **options)
    assert run(adapter, *PROMPTS, strength=0, **options).texts == plain.texts
    assert run(adapter, *PROMPTS, **options).texts != plain.texts


@pytest.mark.parametrize("carriers", [("head", "memory"), ("expert",)])
def test_accelerate_may_place_the_host(
    carriers: tuple[str, ...], adapter: Path, host: HFModel, tmp_path: Path
) -> None:
    saved(host, tmp_path)
    asked = {"host": str(tmp_path), "prompt": ("The rudder",), "adapter": adapter}
    asked |= {"carriers": carriers, "max_new_tokens": 6, "dtype": "float32"}
    texts = [
        generate(GenerateConfig.model_validate(asked | placed)).texts
        for placed in ({}, {"device_map": "cpu"}, {"device_map": "auto"})
    ]
    assert texts[0] == texts[1] == texts[2] and texts[0][0]


def spread(host: HFModel, folder: Path, **on_disk: str) -> tuple[Any, Any]:
    """The host's model as accelerate spreads it over memory and disk, and its tokenizer."""
    host.model.save_pretrained(folder / "model")
    parts = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
    placed = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu"} | on_disk
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=placed, offload_folder=folder / "disk", dtype=torch.float32
    )
    return model, host.tokenizer


def test_a_host_spread_over_memory_and_disk_is_steered_alike(
    host: HFModel, mounted: Mounted, live: Live, tmp_path: Path
) -> None:
    batch, found = inputs(host, *PROMPTS[:2]), []
    lies_apart = spread(host, tmp_path, **{"model.layers.0": "disk", "model.norm": "disk"})
    assert {p.device.type for p in lies_apart[0].parameters()} == {"cpu", "meta"}
    for one in (host, lies_apart):
        with steered(one, mounted, carriers=("head", "memory", "expert"), live=live) as model:
            found.append(model.generate(**batch, **SCORES))
    assert torch.equal(found[0].sequences, found[1].sequences)
    for one, other in zip(found[0].scores, found[1].scores, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_head_on_disk_is_an_error(host: HFModel, mounted: Mounted, tmp_path: Path) -> None:
    headless = spread(host, tmp_path, lm_head="disk")
    with pytest.raises(ModelError, match="offloaded to disk"), steered(headless, mounted):
        pass


def test_strength_zero_gives_the_same_bits(host: HFModel, mounted: Mounted) -> None:
    options = {"max_new_tokens": 3, "output_scores": True, "return_dict_in_generate": True}
    batch = inputs(host, *PROMPTS)
    plain = host.model.generate(**batch, **options)
    with steered(host, mounted, strength=0) as model:
        same = model.generate(**batch, **options)
    assert all(torch.equal(a, b) for a, b in zip(plain.scores, same.scores, strict=True))


def state_of(host: HFModel) -> tuple[object, ...]:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.model.modules()]
    weights = {name: tensor.clone() for name, tensor in host.model.state_dict().items()}
    return sorted(vars(host.model)), sum(hooks), weights, [m.training for m in host.model.modules()]


def test_the_model_is_restored_after_an_exception(host: HFModel, mounted: Mounted) -> None:
    batch = inputs(host, *PROMPTS)
    names, hooks, weights, training = state_of(host)
    logits = host.model(**batch).logits
    with pytest.raises(ZeroDivisionError), steered(host, mounted) as model:
        assert torch.equal(model(**batch).logits, logits)
        model.generate(**batch, max_new_tokens=1)
        raise ZeroDivisionError
    after = state_of(host)
    assert after[:2] == (names, hooks) and after[3] == training
    assert all(torch.equal(weights[name], tensor) for name, tensor in after[2].items())
    assert torch.equal(host.model(**batch).logits, logits)


def test_a_live_model_and_tokenizer_are_restored_into_training(mounted: Mounted) -> None:
    fresh = open_model(HOST, dtype="float32")
    fresh.model.train()
    fresh.model.model.layers[0].eval()
    modes = [module.training for module in fresh.model.modules()]
    with steered((fresh.model, fresh.tokenizer), mounted) as model:
        assert not model.training
        model.generate(**inputs(fresh, "The m"), max_new_tokens=1)
    assert [module.training for module in fresh.model.modules()] == modes


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_a_batch_gives_what_its_prompts_give_alone(
    host: HFModel, mounted: Mounted, options: dict[str, int]
) -> None:
    with steered(host, mounted) as model:
        together = model.generate(**inputs(host, *PROMPTS), max_new_tokens=6, **options)
        for row, prompt in zip(together, PROMPTS, strict=True):
            alone = model.generate(**inputs(host, prompt), max_new_tokens=6, **options)
            assert torch.equal(row[-6:], alone[0, -6:])


def test_a_prompt_has_its_own_candidates_in_any_batch(
    host: HFModel, mounted: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.steering.field.CANDIDATES", len(host.vocabulary))
    monkeypatch.setattr("trimtab.steering.field.ROW_CANDIDATES", 4)
    with steered(host, mounted) as model:
        together = model.generate(**inputs(host, *PROMPTS), **SCORES)
        alone = model.generate(**inputs(host, PROMPTS[1]), **SCORES)
    for one, other in zip(together.scores, alone.scores, strict=True):
        torch.testing.assert_close(one[1], other[0], atol=1e-4, rtol=1e-4)


def test_several_sequences_of_a_prompt_share_its_evidence(host: HFModel, mounted: Mounted) -> None:
    with steered(host, mounted) as model:
        result = model.generate(
            **inputs(host, *PROMPTS[:2]),
            generation_config=GenerationConfig(do_sample=True, num_return_sequences=2, top_k=0),
            max_new_tokens=1,
            output_scores=True,
            return_dict_in_generate=True,
        )
    first = result.scores[0]
    assert torch.allclose(first[0], first[1]) and torch.allclose(first[2], first[3])
    assert not torch.allclose(first[1], first[2], atol=1e-3)


def test_without_a_cache_and_in_chunks_the_scores_are_the_same(
    host: HFModel, mounted: Mounted
) -> None:
    options = {"max_new_tokens": 3, "output_scores": True, "return_dict_in_generate": True}
    batch = inputs(host, PROMPTS[0])
    with steered(host, mounted) as model:
        runs = [
            model.generate(**batch, **options, **more).scores
            for more in ({}, {"use_cache": False}, {"prefill_chunk_size": 4})
        ]
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_forbidden_tokens_stay_forbidden(host: HFModel, mounted: Mounted) -> None:
    assert mounted.memory
    proposed = sorted(set(mounted.memory.values.flatten().tolist()) - {-1})
    with steered(host, mounted, carriers=("memory",)) as model:
        result = model.generate(
            **inputs(host, PROMPTS[0]),
            max_new_tokens=2,
            suppress_tokens=proposed,
            output_scores=True,
            return_dict_in_generate=True,
        )
    assert all(scores[0, proposed].isneginf().all() for scores in result.scores)


def test_a_prompt_of_one_token_has_the_prior(host: HFModel, mounted: Mounted) -> None:
    expected, weights = reference_next(host, mounted, 1.0, [84], 1)
    assert weights.tolist() == [0.5] + [0.5 / 7] * 7
    with steered(host, mounted) as model:
        result = model.generate(
            torch.tensor([[84]]), max_new_tokens=1, output_scores=True, return_dict_in_generate=True
        )
    torch.testing.assert_close(result.scores[0][0].exp().double(), expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["tiny:t5?hidden=32", "tiny:gemma2?hidden=32"])
def test_other_families_are_steered(adapter: Path, name: str) -> None:
    plain, followed = (run(adapter, *PROMPTS, host=name, strength=s, temperature=1) for s in (0, 2))
    assert followed.tokens and followed.texts != plain.texts


def test_seeds_and_chat(adapter: Path) -> None:
    texts = [run(adapter, *PROMPTS, temperature=1, seed=seed).texts for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert run(adapter, "The m", chat=True).texts != run(adapter, "The m").texts
    before = torch.random.get_rng_state()
    run(None, "The m", temperature=1, max_new_tokens=1)
    assert torch.equal(torch.random.get_rng_state(), before)


MESSAGES = ("The rudder turns the hull.", "The m", "What, äöü, is a user?")
OTHER_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<pad>{% endfor %}"
    "{% if add_generation_prompt %}<bos>answer: {% endif %}"
)
SCORES = {"max_new_tokens": 3, "output_scores": True, "return_dict_in_generate": True}


def chat_inputs(host: HFModel, *messages: str) -> dict[str, Tensor]:
    texts = [host.chat_text([{"role": "user", "content": message}]) for message in messages]
    return padded(host, [host.encode(text, markup=True) for text in texts])


@pytest.mark.parametrize("message", [*MESSAGES, "x", "xyz", " a ", "assistant", "user", "of<eos>x"])
@pytest.mark.parametrize("template", [None, OTHER_TEMPLATE])
def test_a_message_is_found_in_its_template(
    host: HFModel, message: str, template: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = open_model("tiny:gemma3", dtype="float32")
    monkeypatch.setattr(small.tokenizer, "chat_template", template)
    found = chat_prompt(host, message, small)
    names = host.tokenizer.convert_ids_to_tokens(list(found.token_ids))
    spelled = host.tokenizer.convert_tokens_to_string(
        names[found.message.start :][: len(found.message)]
    )
    assert spelled == message
    if template is None:
        assert found.opening_ids is None
        assert found.small_ids == (256, *message.encode())
    else:
        opening = (256, *b"[user] ")
        shown = small.encode(message, markup=True)
        assert found.opening_ids == opening
        assert found.small_ids == (*opening, *shown, 258, 256, *b"answer: ")


def test_a_chat_follows_the_slow_reference(
    host: HFModel, mounted: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The template's own words stand in the memory too, and must not be compared with it.
    template = OTHER_TEMPLATE.replace("answer: ", "The keel turns")
    monkeypatch.setattr(host.tokenizer, "chat_template", template)
    batch = chat_inputs(host, *MESSAGES)
    with steered(host, mounted, strength=0.8, messages=MESSAGES) as model:
        result = model.generate(**batch, **SCORES)
    prompt = batch["input_ids"].shape[1]
    for row, message in enumerate(MESSAGES):
        places = chat_prompt(host, message).message
        padding = int((batch["attention_mask"][row] == 0).sum())
        for step, scores in enumerate(result.scores):
            read = result.sequences[row, padding : prompt + step].tolist()
            expected, _ = reference_next(host, mounted, 0.8, read, prompt - padding, places)
            torch.testing.assert_close(scores[row].exp().double(), expected, atol=1e-5, rtol=1e-3)


@pytest.fixture(scope="module")
def byte_host() -> HFModel:
    return open_model("tiny:qwen3?hidden=32", dtype="float32")


@pytest.fixture(scope="module")
def byte_mounted(adapter: Path, byte_host: HFModel) -> Mounted:
    return mount(
        MountConfig.model_validate({"adapter": adapter, "host": byte_host.ref}), host=byte_host
    )


def decided_live(host: HFModel, draft_tokens: int = 0) -> Live:
    """Expert and reference that are sure of what they say, each of something else."""
    pair = [open_model(f"tiny:llama?hidden=32&seed={seed}", dtype="float32") for seed in (7, 8)]
    for model in pair:
        with torch.no_grad():
            model.unembedding.weight.mul_(10)
    return Live(Pair(*pair), host, draft_tokens=draft_tokens)


def reference_blends(host: HFModel, pair: Pair, ids: list[int], small_ids: list[int]) -> Tensor:
    """The host and every blend after `ids`, where the pair has read `small_ids`."""
    is_text = torch.tensor([text is not None for text in host.vocabulary.token_bytes])
    plain = host.logits(torch.tensor([ids]))[0, -1].double().softmax(-1)
    given = plain * is_text / plain[is_text].sum()
    expert = reference = given
    if small_ids:
        read = torch.tensor([small_ids])
        expert, reference = (
            logits[0, -1].double().masked_fill(~is_text, -torch.inf).softmax(-1)
            for logits in (pair.expert_logits(read), pair.reference_logits(read))
        )
    found = [plain]
    for name in FAMILIES["live"][1:]:
        by = BlendWeights(*BLEND.live[name])
        powers = given**by.host * expert**by.expert
        powers = torch.where(is_text, powers / reference**by.reference, 0.0)
        found.append(torch.where(is_text, powers / powers.sum() * plain[is_text].sum(), plain))
    return torch.stack(found)


@pytest.mark.parametrize("template", ["host's", OTHER_TEMPLATE, None])
def test_in_a_chat_the_expert_reads_its_own_template(
    byte_host: HFModel,
    byte_mounted: Mounted,
    template: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    live = decided_live(byte_host)
    small, message = live.pair.reference, MESSAGES[0]
    if template != "host's":
        monkeypatch.setattr(small.tokenizer, "chat_template", template)
    text = small.chat_text([{"role": "user", "content": message}]) if template else message
    before = text.split(message)[0]
    opening, small_ids = (small.encode(part, markup=True) for part in (before, text))
    batch = chat_inputs(byte_host, message)
    with steered(
        byte_host, byte_mounted, carriers=("expert",), live=live, messages=[message]
    ) as model:
        result = model.generate(**batch, **SCORES)
    ids, pair, prompt = result.sequences[0].tolist(), live.pair, batch["input_ids"].shape[1]
    start = ids.index(ord(">")) + 1
    assert bytes(ids[start : start + len(message)]) == message.encode()
    prior = torch.tensor([0.5] + [0.5 / 4] * 4, dtype=torch.float64)
    weights = prior
    for t in range(len(message)):
        read = [*opening, *ids[start : start + t]]
        each = reference_blends(byte_host, pair, ids[: start + t], read)
        weights = weights * each[:, ids[start + t]]
        weights = 0.998 * weights / weights.sum() + 0.002 * prior
    for step, scores in enumerate(result.scores):
        read = ids[: prompt + step]
        # One vocabulary: the small models read the host's own tokens of text.
        answer = [i for i in read[prompt:] if byte_host.vocabulary.token_bytes[i]]
        each = reference_blends(byte_host, pair, read, [*small_ids, *answer])
        torch.testing.assert_close(scores[0].exp().double(), weights @ each, atol=1e-6, rtol=1e-3)


def test_the_template_of_the_small_model_matters(
    byte_host: HFModel, byte_mounted: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = decided_live(byte_host)
    tokenizer, batch = live.pair.reference.tokenizer, chat_inputs(byte_host, MESSAGES[0])
    found = []
    for template in (tokenizer.chat_template, OTHER_TEMPLATE, None, "as text"):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        messages = () if template == "as text" else MESSAGES[:1]
        with steered(
            byte_host, byte_mounted, carriers=("expert",), live=live, messages=messages
        ) as model:
            found.append(model.generate(**batch, **SCORES).scores[0].exp())
    for one, other in itertools.combinations(found, 2):
        assert (one - other).abs().max() > 3e-4


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}])
def test_a_batch_of_chats_gives_what_each_gives_alone(
    byte_host: HFModel, byte_mounted: Mounted, options: dict[str, object]
) -> None:
    carriers, options = ("head", "memory", "expert"), {**SCORES, **options}
    runs = []
    for messages in (MESSAGES, *((message,) for message in MESSAGES)):
        live = decided_live(byte_host)
        live.pair.reference.tokenizer.chat_template = OTHER_TEMPLATE
        with steered(
            byte_host, byte_mounted, carriers=carriers, live=live, messages=messages
        ) as model:
            runs.append(model.generate(**chat_inputs(byte_host, *messages), **options))
    together, *each = runs
    for row, alone in enumerate(each):
        answer = alone.sequences[0, len(chat_inputs(byte_host, MESSAGES[row])["input_ids"][0]) :]
        begin = len(chat_inputs(byte_host, *MESSAGES)["input_ids"][0])
        assert torch.equal(together.sequences[row, begin : begin + len(answer)], answer)
        for ours, theirs in zip(together.scores, alone.scores, strict=False):
            own = ours[row * len(theirs) : (row + 1) * len(theirs)]
            torch.testing.assert_close(own, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("messages", [("The m",), ("The m", "The rudder"), ("The m",) * 3])
def test_prompts_that_are_not_the_messages_are_refused(
    host: HFModel, mounted: Mounted, messages: tuple[str, ...]
) -> None:
    batch = chat_inputs(host, "The m", "The mast")
    with (
        steered(host, mounted, messages=messages) as model,
        pytest.raises(ModelError, match=f"other prompts than the {len(messages)} messages"),
    ):
        model.generate(**batch, max_new_tokens=1)


def test_generate_chats_with_an_expert(adapter: Path) -> None:
    options = {"carriers": ("head", "memory", "expert"), "chat": True}
    together = run(adapter, *MESSAGES, **options)
    assert together.texts == tuple(run(adapter, m, **options).texts[0] for m in MESSAGES)
    assert together.texts != run(adapter, *MESSAGES, carriers=("head", "memory", "expert")).texts
    for strength in (0, 2):
        answer = run(adapter, "The m", host="tiny:t5?hidden=32", strength=strength, **options)
        assert answer.tokens[0]


def test_streamed_pieces_are_the_text(adapter: Path) -> None:
    pieces: list[list[str]] = [[], [], []]
    settings = {"host": HOST, "prompt": PROMPTS, "adapter": adapter, "max_new_tokens": 24}
    config = GenerateConfig.model_validate(settings | {"temperature": 1.5, "dtype": "float32"})
    result = generate(config, on_text=lambda i, text: pieces[i].append(text))
    assert tuple("".join(parts) for parts in pieces) == result.texts
    assert all(part for parts in pieces for part in parts)
    assert result.tokens == (24, 24, 24)
    assert "3 continuations, 72 tokens" in result.summary()


def test_a_stop_string_is_cut_off_and_ends_its_prompt_only() -> None:
    plain = run(None, *PROMPTS, max_new_tokens=16)
    stop = plain.texts[0][3:6]
    assert len(stop) == 3
    stopped = run(None, *PROMPTS, max_new_tokens=16, stop=(stop,))
    assert stopped.texts == tuple(text.split(stop)[0] for text in plain.texts)
    assert stopped.tokens[0] < 16 and max(stopped.tokens) == 16


def test_end_tokens_of_the_generation_settings_end_a_text(host: HFModel, tmp_path: Path) -> None:
    batch = inputs(host, PROMPTS[0])
    third = int(host.model.generate(**batch, max_new_tokens=3)[0, -1])
    saved(host, tmp_path)
    GenerationConfig(eos_token_id=[257, third], temperature=0.1, do_sample=True).save_pretrained(
        tmp_path
    )
    whole, ended = (run(None, PROMPTS[0], host=str(path)) for path in (HOST, tmp_path))
    assert ended.tokens[0] <= 2 and whole.texts[0].startswith(ended.texts[0])


def test_a_long_prompt_uses_the_room_that_is_left() -> None:
    size = 2048 - 5
    result = run(None, "\x01" * size, host="tiny:llama?hidden=8&layers=1", max_new_tokens=50)
    assert result.tokens[0] <= 5
    with pytest.raises(InputError, match=r"prompt 2 has 2049 tokens, and .* positions for 2048"):
        run(None, "a", "\x01" * 2049, host="tiny:llama?hidden=8&layers=1")


def test_a_text_that_outgrows_the_small_model_ends_there(
    adapter: Path, host: HFModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(*prompts: str, **options: object) -> tuple[GenerateResult, list[str]]:
        config = {"host": HOST, "prompt": prompts, "adapter": adapter, "dtype": "float32"}
        config |= {"carriers": ("expert",), "max_new_tokens": 16, **options}
        notes: list[str] = []
        settings = GenerateConfig.model_validate(config)
        return generate(settings, host=host, on_note=notes.append), notes

    whole, unsaid = written(*PROMPTS[:2])
    positions = len(PROMPTS[0]) + 6
    # The host is open, and has positions for more.
    monkeypatch.setattr("trimtab.backends.tiny.MAX_POSITIONS", positions)
    found, notes = written(*PROMPTS[:2])
    assert not unsaid and found.texts[1] == whole.texts[1] and found.tokens[1] == 16
    assert 0 < found.tokens[0] < 16 and whole.texts[0].startswith(found.texts[0])
    assert len((PROMPTS[0] + found.texts[0]).encode()) > positions
    [note] = notes
    assert note.startswith(f"the continuation of prompt 1 ends after {found.tokens[0]} tokens")
    assert f"has positions for {positions} and no more" in note and found.notes == (note,)
    for draft_tokens in (0, 5):
        alone, notes = written(PROMPTS[0], draft_tokens=draft_tokens)
        assert (alone.texts[0], alone.tokens[0]) == (found.texts[0], found.tokens[0])
        assert len(notes) == 1
    just_all, notes = written(PROMPTS[0], max_new_tokens=found.tokens[0])
    assert just_all.tokens == found.tokens[:1] and not notes
    with pytest.raises(ModelError, match=f"which reads at most {positions}"):
        written(PROMPTS[1], PROMPTS[0] * 2)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"eos_token_id": None, "num_return_sequences": 2}]
)
def test_rows_that_outgrow_the_small_model_leave_the_others_alone(
    host: HFModel, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    live, asked = decided_live(host), {"max_new_tokens": 8, "do_sample": False, **options}
    asked["do_sample"] = "num_return_sequences" in options
    with steered_by(host, Mixture(Steering(("live",), live=live))) as outgrown:
        torch.manual_seed(1)
        whole = host.model.generate(**inputs(host, *PROMPTS[:2]), **asked)
        assert not outgrown.rows
        config: Any = live.pair.reference.model.config
        monkeypatch.setattr(config, "max_position_embeddings", len(PROMPTS[0]) + 3)
        torch.manual_seed(1)
        found = host.model.generate(**inputs(host, *PROMPTS[:2]), **asked)
    rows = len(whole) // 2
    assert torch.equal(found[rows:], whole[rows:]) or "num_return_sequences" in options
    assert outgrown.rows and found.shape[1] == whole.shape[1]


def test_what_cannot_be_generated_is_refused(adapter: Path) -> None:
    with pytest.raises(InputError, match="prompt 2 is empty"):
        run(None, "a", "")
    with pytest.raises(InputError, match="stop string is empty"):
        run(None, "a", stop=("x", ""))
    with pytest.raises(InputError, match="head are named, but no adapter"):
        run(None, "a", carriers=("head",))
    with pytest.raises(AdapterError, match="is no folder"):
        run(adapter / "nowhere", "a")


def test_carriers_that_are_not_there_are_listed(
    adapter: Path, host: HFModel, mounted: Mounted, tmp_path: Path
) -> None:
    settings = {"recording": adapter.parent / "recording", "out": tmp_path / "b", "epochs": 1}
    only_head = fit(FitConfig.model_validate(settings | {"rank": 2, "carriers": ("head",)})).folder
    with pytest.raises(AdapterError, match="carries head, and memory was asked for"):
        run(only_head, "a", carriers=("head", "memory"))
    assert run(only_head, "a").texts
    with (
        pytest.raises(AdapterError, match="nothing was asked for"),
        steered(host, mounted, carriers=()),
    ):
        pass
    other = open_model("tiny:llama?hidden=64", dtype="float32")
    with (
        pytest.raises(AdapterError, match=r"32 hidden features, and .* has 64"),
        steered(other, mounted),
    ):
        pass


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.5},
        {"prompt_lookup_num_tokens": 3},
        {"prompt_lookup_num_tokens": 1},
        {"penalty_alpha": 0.6},
        {"dola_layers": "high"},
        {"use_mtp": True},
        {"constraints": [1]},
        {"force_words_ids": [[84]]},
        {"generation_config": GenerationConfig(guidance_scale=2.0)},
        {"inputs_embeds": torch.zeros(1, 2, 32)},
    ],
)
def test_decoding_that_cannot_be_steered_is_refused(
    host: HFModel, mounted: Mounted, options: dict[str, object]
) -> None:
    with steered(host, mounted) as model, pytest.raises(ModelError, match="cannot be steered"):
        model.generate(**inputs(host, "The m"), max_new_tokens=2, **options)


def test_a_steered_model_is_not_steered_twice(host: HFModel, mounted: Mounted) -> None:
    with steered(host, mounted) as model:
        with pytest.raises(ModelError, match="steered already"), steered(host, mounted):
            pass
        assert "generate" in vars(model)
    assert "generate" not in vars(model)


def test_generation_agrees_with_what_is_evaluated(
    host: HFModel, mounted: Mounted, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The one difference: in a text that goes on, the host has cut each token; a prompt just ends.
    nothing = Left(torch.zeros(0, dtype=torch.long), torch.zeros(0), 1.0)
    monkeypatch.setattr(HostCut, "left_of", lambda *_: nothing)
    text = domain_text(9)[:60]
    ids = host.encode(text)
    assert mounted.head and mounted.memory
    heads, memories = {"head": mounted.head}, {"memory": mounted.memory}
    steering = Steering(tuple(FAMILIES), heads, memories, live=live)
    scored = score_document(host, text, steering, window_tokens=128, stride_tokens=64)
    rows = {
        "head": ("head",),
        "head+memory": ("head", "memory"),
        "live": ("expert",),
        "all": ("head", "memory", "expert"),
    }
    for row, carriers in rows.items():
        evaluated = scored.rows[row].logprobs
        with steered(host, mounted, carriers=carriers, live=live) as model:
            for place in (2, len(ids) // 2, len(ids) - 1):
                result = model.generate(
                    torch.tensor([ids[:place]]),
                    max_new_tokens=1,
                    output_scores=True,
                    return_dict_in_generate=True,
                )
                ours = float(result.scores[0][0, ids[place]])
                assert ours == pytest.approx(float(evaluated[place - 1]), abs=1e-3)


@pytest.fixture(scope="module")
def live(mounted: Mounted, host: HFModel) -> Live:
    return open_live(mounted, host, dtype="float32")


def test_where_a_prompt_ends_is_no_cut_of_the_host(
    host: HFModel, mounted: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    plain = HostCut.of

    def recorded(strings: Strings, last: int, *others: Any) -> HostCut:
        asked.append(last)
        return plain(strings, last, *others)

    monkeypatch.setattr("trimtab.backends.live.HostCut.of", recorded)
    prompt = host.encode("The rudder turns the hull of ")
    with steered(host, mounted, carriers=("expert",), live=decided_live(host)) as model:
        given = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt))}
        ids = model.generate(**given, max_new_tokens=3, do_sample=False)[0].tolist()
    written = ids[len(prompt) :]
    is_text = [host.vocabulary.token_bytes[i] is not None for i in written[:-1]]
    # Text that is known goes on after each of the prompt's tokens but the last, and the host
    # itself has written the new ones.
    assert asked == [*prompt[:-1], *(i for i, ok in zip(written, is_text, strict=False) if ok)]


def rows_of(host: HFModel, live: Live, text: str) -> Rows:
    ids = torch.tensor([host.encode(text)])
    question = (live.read([text.encode()]), range(1))
    logits, hidden = host.logits(ids)[0, -1:], host.hidden(ids)[0, -1:]
    return Rows(logits, hidden, (text.encode(),), (question,))


def everywhere(steering: Steering, rows: Rows) -> dict[str, Tensor]:
    """What each predictor says of every token, [rows, vocab]."""
    found = predicted(steering, rows)
    field, dense = found.field, found.logprobs
    return {name: field.everywhere(logprobs) for name, logprobs in dense.items()}


def test_live_blends_are_the_powers_of_the_three(host: HFModel, live: Live) -> None:
    rows = rows_of(host, live, "The m")
    steering = Steering(("live",), live=live, strength=0.7)
    found = everywhere(steering, rows)
    plain = rows.logits.softmax(-1)
    text = torch.tensor([name is not None for name in host.vocabulary.token_bytes])
    conditional = plain * text / plain[:, text].sum()
    reading, questions = rows.questions[0]
    pair = live.score(reading, questions, conditional, torch.arange(plain.shape[1]))
    expert, reference = (probs[0] / probs.sum() for probs in pair)
    assert (expert - reference).abs().max() > 1e-3
    for name in FAMILIES["live"][1:]:
        by = blend_at(BlendWeights(*BLEND.live[name]), 0.7)
        powers = conditional[0] ** by.host * expert**by.expert / reference**by.reference
        expected = torch.where(text, powers / powers[text].sum() * plain[0, text].sum(), plain[0])
        torch.testing.assert_close(found[name][0].exp(), expected, atol=1e-5, rtol=1e-2)


def test_the_tail_of_a_live_blend_keeps_the_hosts_proportions(host: HFModel, live: Live) -> None:
    logits = torch.linspace(0, 1, len(host.vocabulary))[None].clone()
    logits[:, :200] += 20
    rows = replace(rows_of(host, live, "The m"), logits=logits)
    found = everywhere(Steering(("live",), live=live), rows)
    merges = slice(260, None)
    for logprobs in found.values():
        torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(1))
        predictor = logprobs[0, merges].log_softmax(-1)
        torch.testing.assert_close(predictor, logits[0, merges].log_softmax(-1))


def test_the_experts_caches_change_nothing(host: HFModel, mounted: Mounted, live: Live) -> None:
    options = {"max_new_tokens": 4, "output_scores": True, "return_dict_in_generate": True}
    carriers = ("head", "memory", "expert")
    with steered(host, mounted, carriers=carriers, live=live) as model:
        # Caches of other texts are still there in the second run.
        together, again = (model.generate(**inputs(host, *PROMPTS), **options) for _ in range(2))
    for a, b in zip(together.scores, again.scores, strict=True):
        torch.testing.assert_close(a, b)
    fresh = open_live(mounted, host, dtype="float32")
    with steered(host, mounted, carriers=carriers, live=fresh) as model:
        # Each call of one new token reads all of its text anew.
        ids = inputs(host, PROMPTS[1])["input_ids"]
        steering = model.generate(ids, **options)
    alone = together.sequences[1, -4:].tolist()
    assert steering.sequences[0, -4:].tolist() == alone


def test_a_generation_keeps_the_caches_of_its_own_rows_alone(host: HFModel) -> None:
    live = decided_live(host)
    with steered_by(host, Mixture(Steering(("live",), live=live))):
        for prompts in (PROMPTS, PROMPTS[:2]):
            host.model.generate(**inputs(host, *prompts), max_new_tokens=2, do_sample=False)
    # Of a row that was forgotten nothing has been read.
    assert [bool(live.caches(row).reference.tokens) for row in range(3)] == [True, True, False]


def test_the_small_models_read_a_prompt_once(host: HFModel, mounted: Mounted) -> None:
    live = open_live(mounted, host, dtype="float32")
    text = domain_text(5)[:400]
    ids = torch.tensor(host.context_ids() + host.encode(text))
    pieces = tuple(host.vocabulary.token_bytes[i] for i in ids.tolist())
    prompt = ReadPrompt(ids, pieces, host.hidden(ids[None])[0])
    mixture = mixture_of(host, mounted, ("head", "memory", "expert"), 1.0, live)
    apart = mixture.weigh(host.unembedding, prompt)
    with tokens_read(live.pair) as read:
        weights = mixture.weigh(host.unembedding, replace(prompt, row=0))
        [reading] = live.read_rows([RowText(0, text.encode(), host.encode(text))])
    torch.testing.assert_close(weights, apart)
    assert len(text) <= sum(read) < 1.2 * len(text)
    fresh = live.read([text.encode()])
    for ours, own in zip(reading.states, fresh.states, strict=True):
        torch.testing.assert_close(ours[-1], own[-1], atol=1e-5, rtol=1e-4)
    live.forget(0)
    with (
        tokens_read(live.pair) as read,
        steered(host, mounted, carriers=("head", "memory", "expert"), live=live) as model,
    ):
        model.generate(ids[None], max_new_tokens=1, do_sample=False)
    assert sum(read) < 1.2 * len(text)


def test_rows_of_one_prompt_go_on_from_one_reading(
    host: HFModel, mounted: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = domain_text(5)[:400]
    asked = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 4, "top_k": 0}
    told = {"output_scores": True, "return_dict_in_generate": True}

    def written() -> tuple[Any, int]:
        live = open_live(mounted, host, dtype="float32")
        torch.manual_seed(3)
        carriers = ("head", "memory", "expert")
        with (
            tokens_read(live.pair) as read,
            steered(host, mounted, carriers=carriers, live=live) as model,
        ):
            return model.generate(**inputs(host, text), **asked, **told), sum(read)

    ours, tokens = written()
    monkeypatch.setattr(Live, "branch", lambda *_: None)
    apart, tokens_apart = written()
    assert len({tuple(row.tolist()) for row in ours.sequences}) == 3
    assert torch.equal(ours.sequences, apart.sequences)
    for a, b in zip(ours.scores, apart.scores, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert tokens < 1.5 * len(text) and tokens_apart > 2.5 * len(text)


@contextmanager
def tokens_read(pair: Pair) -> Iterator[list[int]]:
    """How many tokens each pass of a pair reads, however many models it serves."""
    read: list[int] = []
    trunk: Any = pair.reference.model.base_model
    handle = trunk.register_forward_pre_hook(
        lambda _module, _args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        yield read
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("carriers", "names"),
    [
        (("expert",), FAMILIES["live"]),
        (("head", "memory", "expert"), FAMILIES["all"]),
        (("head", "expert"), (*FAMILIES["live"], "head")),
        (
            ("memory", "expert"),
            (
                *FAMILIES["live"],
                *(n for b in ("host", "mean", "lean") for n in with_memory(b, BLEND)),
            ),
        ),
        (("memory",), ("host", "memory-2", "memory", "memory+2")),
    ],
)
def test_predictors_of_carriers(
    host: HFModel,
    mounted: Mounted,
    live: Live,
    carriers: tuple[str, ...],
    names: tuple[str, ...],
) -> None:
    assert mounted.head and mounted.memory
    heads = {"head": mounted.head} if "head" in carriers else {}
    memories = {"memory": mounted.memory} if "memory" in carriers else {}
    beside = live if "expert" in carriers else None
    steering = Steering((row_of(carriers),), heads, memories, live=beside, blend=BLEND)
    mixture = Mixture(steering)
    assert mixture.members == names
    found = everywhere(steering, rows_of(host, live, "The m"))
    for name in names:
        torch.testing.assert_close(found[name].exp().sum(-1), torch.ones(1))
    assert float(mixture.prior.sum()) == pytest.approx(1)


def test_the_real_expert_steers(adapter: Path) -> None:
    options = {"carriers": ("expert",), "max_new_tokens": 4}
    plain, first, again = (run(adapter, *PROMPTS[:2], strength=s, **options) for s in (0, 1, 1))
    assert plain.texts != first.texts == again.texts


# Speculative steering of one prompt; `test_speculative` compares its scores.


@pytest.mark.parametrize("ref", [HOST, "tiny:qwen3?hidden=32"])
@pytest.mark.parametrize("carriers", [("expert",), ("head", "memory", "expert")])
def test_drafts_change_no_text(adapter: Path, ref: str, carriers: tuple[str, ...]) -> None:
    asked = {"host": ref, "carriers": carriers, "max_new_tokens": 16}
    plain, ours = (run(adapter, PROMPTS[0], draft_tokens=n, **asked) for n in (0, 5))
    assert ours.texts == plain.texts and ours.tokens == plain.tokens
    host_alone = run(None, PROMPTS[0], host=ref, max_new_tokens=16)
    assert host_alone.texts != plain.texts
    untouched = run(adapter, PROMPTS[0], strength=0, draft_tokens=5, **asked)
    assert untouched.texts == host_alone.texts


def test_a_stop_string_inside_a_draft_ends_the_text(adapter: Path) -> None:
    asked = {"carriers": ("expert",), "host": "tiny:qwen3?hidden=32", "max_new_tokens": 16}
    whole = run(adapter, PROMPTS[0], draft_tokens=0, **asked)
    pieces: list[str] = []
    config = GenerateConfig.model_validate(
        {"prompt": PROMPTS[:1], "adapter": adapter, "dtype": "float32", "draft_tokens": 5}
        | {**asked, "stop": (whole.texts[0][5:8],)}
    )
    stopped = generate(config, on_text=lambda _, text: pieces.append(text))
    assert stopped.texts[0] == whole.texts[0].split(whole.texts[0][5:8])[0] == "".join(pieces)
    assert stopped.tokens[0] < 16
    plain = config.model_copy(update={"draft_tokens": 0})
    assert generate(plain).tokens == stopped.tokens


def test_drafts_change_nothing_in_a_chat(byte_host: HFModel, byte_mounted: Mounted) -> None:
    found, batch = [], chat_inputs(byte_host, MESSAGES[0])
    for draft_tokens in (0, 3):
        live = decided_live(byte_host, draft_tokens)
        live.pair.reference.tokenizer.chat_template = OTHER_TEMPLATE
        with steered(
            byte_host,
            byte_mounted,
            carriers=("head", "memory", "expert"),
            live=live,
            messages=MESSAGES[:1],
        ) as model:
            found.append(model.generate(**batch, **{**SCORES, "max_new_tokens": 8}))
    assert torch.equal(found[0].sequences, found[1].sequences)
    for one, other in zip(found[0].scores, found[1].scores, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@given(st.binary(max_size=12), st.text("aä€😀", max_size=6))
def test_readable_contexts_are_utf8_but_for_a_cut_end(noise: bytes, text: str) -> None:
    assert readable(text.encode()) == text.encode()
    for end in range(len(text.encode())):
        assert readable(text.encode()[:end]) == text.encode()[:end]
    mended = readable(noise)
    assert mended.decode("utf-8", "ignore") in noise.decode("utf-8", "replace")
    every_byte = Vocabulary(tuple(bytes([b]) for b in range(256)))
    assert len(covers_of(mended, str.encode, every_byte)[0].rest) < 4


def test_blends_begin_at_the_host() -> None:
    weights = BlendWeights(0.5, 1.0, 0.5)
    assert blend_at(weights, 0.0) == BlendWeights(1.0, 0.0, 0.0)
    assert blend_at(weights, 1.0) == weights


def test_last_bytes() -> None:
    long = bytes(range(65, 65 + 20))
    rows = last_bytes([b"", b"ab", long]).tolist()
    assert rows[0] == [0] * CONTEXT_BYTES
    assert rows[1] == [98, 97] + [0] * (CONTEXT_BYTES - 2)
    assert rows[2] == list(long[: -CONTEXT_BYTES - 1 : -1])
