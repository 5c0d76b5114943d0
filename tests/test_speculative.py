"""Speculative steering, against plain steering of the same host."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import chisquare
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    OpenAIGPTConfig,
)

from trimtab.backends.chat import prompt_ids
from trimtab.backends.hf import HFModel, adopt_model
from trimtab.backends.live import Live
from trimtab.backends.open import open_model
from trimtab.backends.pair import Pair
from trimtab.backends.pair_passes import serves_both
from trimtab.carriers.expert import attach_lora
from trimtab.config import Dtype
from trimtab.steering.drafting import Draft, Drafter, Written, text_ahead
from trimtab.steering.evidence import Mixture
from trimtab.steering.predictors import Rows, Steering
from trimtab.steering.processor import steered_by

HOST = "tiny:qwen3?vocab=bpe&hidden=32"
SMALL = "tiny:llama?hidden=32&vocab=bpe"
BYTES = "tiny:llama?hidden=32"
PROMPT = "The rudder turns the hull and the"
KEPT = {"output_scores": True, "return_dict_in_generate": True, "do_sample": False}
NEAR = 1e-4
"""Two tokens that are as likely as this may change places with the rounding of a product."""


def sharp(ref: str, factor: float = 6, dtype: Dtype = "float32") -> HFModel:
    """A random model that is sure of what it says."""
    model = open_model(ref, dtype=dtype)
    with torch.no_grad():
        model.unembedding.weight.mul_(factor)
    return model


class Forced(LogitsProcessor):
    """Leaves one token only at each of the first places."""

    def __init__(self, start: int, token_ids: tuple[int, ...]) -> None:
        self.start, self.token_ids = start, token_ids

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        place = input_ids.shape[1] - self.start
        if place >= len(self.token_ids):
            return scores
        only = torch.full_like(scores, -torch.inf)
        only[:, self.token_ids[place]] = 0.0
        return only


@pytest.fixture(scope="module")
def host() -> HFModel:
    return sharp(HOST)


def sure_pair(ref: str, factor: float = 10) -> Pair:
    """Expert and reference that are sure of what they say, each of something else."""
    return Pair(sharp(ref + "&seed=7", factor), sharp(ref + "&seed=8", factor))


def lora_pair(ref: str, folder: Path, factor: float = 10, dtype: Dtype = "float32") -> Pair:
    """A pair of one set of weights, so that one pass serves both and a copy drafts."""
    base = sharp(ref, factor, dtype)
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(open_model(ref, dtype="float32").model, lora).save_pretrained(folder)
    pair = Pair(base, attach_lora(base.model, folder))
    assert serves_both(pair)
    return pair


def ids_of(host: HFModel, prompt: str = PROMPT) -> Tensor:
    return torch.tensor([host.context_ids() + host.encode(prompt)])


def written(host: HFModel, pair: Pair, draft_tokens: int, **options: Any) -> Any:
    """What a steered `generate` returns, with the expert drafting so many tokens."""
    with drafting(host, Live(pair, host, draft_tokens=draft_tokens)) as model:
        return model.generate(**{"inputs": ids_of(host), "max_new_tokens": 24, **KEPT, **options})


@contextmanager
def drafting(host: HFModel, live: Live) -> Iterator[Any]:
    with steered_by(host, Mixture(Steering(("live",), live=live))):
        yield host.model


def assert_same(plain: Any, ours: Any, prompt_tokens: int) -> int:
    """Same tokens from same scores, until two tokens are as good as equal; how many."""
    pairs = zip(plain.scores, ours.scores, strict=False)
    for place, (one, other) in enumerate(pairs, start=prompt_tokens):
        assert torch.equal(plain.sequences[:, :place], ours.sequences[:, :place])
        finite = one.isfinite()
        assert torch.equal(finite, other.isfinite())
        torch.testing.assert_close(other[finite], one[finite], atol=2e-4, rtol=1e-4)
        best = one[0].softmax(-1).topk(2).values
        if best[0] - best[1] < NEAR:
            return place - prompt_tokens
    assert torch.equal(plain.sequences, ours.sequences)
    return len(plain.scores)


@contextmanager
def passes(model: Any) -> Iterator[list[int]]:
    """Tokens of each forward pass of a model."""
    found: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _module, _args, options: found.append(options["input_ids"].shape[1]),
        with_kwargs=True,
    )
    try:
        yield found
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("family", "small"),
    [("qwen3", SMALL), ("gpt2", SMALL), ("gemma2", SMALL), ("gemma2", BYTES), ("gemma3", BYTES)],
)
def test_greedy_is_plain_greedy(family: str, small: str) -> None:
    host, pair = sharp(f"tiny:{family}?vocab=bpe&hidden=32"), sure_pair(small)
    plain = written(host, pair, 0)
    with passes(host.model) as read:
        ours = written(host, pair, 5)
    assert assert_same(plain, ours, ids_of(host).shape[1]) >= 12
    assert max(read[1:]) > 1


@pytest.mark.parametrize("small", [SMALL, BYTES, HOST])
def test_what_a_text_repeats_is_drafted_without_the_expert(small: str, host: HFModel) -> None:
    live = Live(sure_pair(small), host, draft_tokens=6)
    line = "Haul in the sheet, ease the helm."
    context = line + line[:20]
    draft = Drafter(live, host).draft(
        Written(context.encode(), host.encode(context), None), 4, lambda _ids, _logits: (0, None)
    )
    said = b"".join(host.vocabulary.token_bytes[i] or b"" for i in draft.token_ids)
    assert len(draft) == 4 and line[20:].encode().startswith(said) and len(said) > 0
    assert draft.proposals == [None] * 4
    assert not live.caches(0).both.tokens and not live.caches(0).expert.tokens


@pytest.mark.parametrize("small", [SMALL, BYTES, HOST])
def test_no_draft_is_longer_than_the_small_models_read(small: str, host: HFModel) -> None:
    live = Live(sure_pair(small), host, draft_tokens=6)
    longest = live.pair.reference.max_tokens
    assert longest is not None
    line = "Haul in the sheet, ease the helm."
    context = line + line[:20]
    chat = [5] * (longest - len(context) - 2)
    answer = Written(context.encode(), host.encode(context), chat)
    draft = Drafter(live, host).draft(answer, 4, lambda _ids, _logits: (9, None))
    texts = [host.vocabulary.token_bytes[i] or b"" for i in draft.token_ids]
    read = context.encode() + b"".join(texts)
    live.read([read], start=chat, host_ids=[host.encode(read.decode())])


def test_text_ahead_needs_no_tokens_of_the_host(host: HFModel) -> None:
    live = Live(sure_pair(HOST), host, draft_tokens=6)
    assert live.is_one_vocabulary
    known = Written(PROMPT.encode(), host.encode(PROMPT), None)
    unknown = Written(PROMPT.encode(), (), None)
    assert text_ahead(live, unknown, 4) == text_ahead(live, known, 4) != ""


def test_a_chat_repeats_what_it_answers(host: HFModel) -> None:
    live = Live(sure_pair(SMALL), host, draft_tokens=6)
    said = b"Ease the helm, and haul in the sheet."
    answer = "Ease the helm, and"
    ids = host.encode(answer)
    with_message, without = (
        Drafter(live, host).draft(
            Written(answer.encode(), ids, [5, 6], text), 4, lambda _ids, _logits: (9, None)
        )
        for text in (said, b"")
    )
    spelled = b"".join(host.vocabulary.token_bytes[i] or b"" for i in with_message.token_ids)
    assert spelled and said[len(answer) :].startswith(spelled)
    assert with_message.token_ids != without.token_ids


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("small", [SMALL, BYTES])
def test_a_copy_of_the_expert_drafts_what_the_expert_then_decides(
    small: str, host: HFModel, tmp_path: Path
) -> None:
    pair = lora_pair(small, tmp_path)
    plain = written(host, pair, 0)
    with passes(host.model) as read:
        ours = written(host, pair, 5)
    assert assert_same(plain, ours, ids_of(host).shape[1]) >= 12
    assert max(read[1:]) > 1


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("small", [SMALL, BYTES])
def test_in_half_precision_drafts_change_near_ties_alone(small: str, tmp_path: Path) -> None:
    host, pair = sharp(HOST, dtype="bfloat16"), lora_pair(small, tmp_path, dtype="bfloat16")
    plain = written(host, pair, 0, output_logits=True)
    with passes(host.model) as read:
        ours = written(host, pair, 5)
    assert max(read[1:]) > 1
    new_ids = [one.sequences[0, read[0] :].tolist() for one in (plain, ours)]
    same = next((n for n, (a, b) in enumerate(zip(*new_ids, strict=True)) if a != b), 23)
    assert same >= 4
    for place in range(same + 1):
        logits, one, other = plain.logits[place], plain.scores[place], ours.scores[place]
        # Either has rounded the largest logit once.
        rounding = 2 * torch.finfo(torch.bfloat16).eps * float(logits.abs().max())
        torch.testing.assert_close(other, one, atol=rounding, rtol=0)
        best = one[0].topk(2).values
        assert new_ids[0][place] == new_ids[1][place] or best[0] - best[1] <= 2 * rounding


@pytest.mark.parametrize("small", [SMALL, BYTES])
def test_other_processors_see_the_text_before_each_place(host: HFModel, small: str) -> None:
    options = {"no_repeat_ngram_size": 2, "repetition_penalty": 1.2, "min_new_tokens": 9}
    pair = sure_pair(small)
    plain, ours = (written(host, pair, n, **options) for n in (0, 4))
    assert assert_same(plain, ours, ids_of(host).shape[1]) >= 12


@pytest.mark.parametrize("small", [SMALL, BYTES])
def test_each_place_has_its_own_candidates(
    host: HFModel, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So near that a place's candidates are its neighbours' tail.
    monkeypatch.setattr("trimtab.steering.field.CANDIDATE_NATS", 2.0)
    pair = sure_pair(small)
    plain, ours = (written(host, pair, n) for n in (0, 5))
    assert assert_same(plain, ours, ids_of(host).shape[1]) >= 12


def test_a_forced_token_inside_a_draft_is_written(host: HFModel) -> None:
    pair, end = sure_pair(SMALL), min(host.end_ids)
    options = {"max_new_tokens": 6, "forced_eos_token_id": end, "eos_token_id": end}
    with passes(host.model) as read:
        ours = written(host, pair, 5, **options)
    assert ours.sequences[0, -1] == end and max(read[1:]) > 1
    assert_same(written(host, pair, 0, **options), ours, ids_of(host).shape[1])


def test_a_draft_that_stands_saves_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.steering.drafting.UNLIKELY", 0.0)
    host = sharp(HOST)
    pair = Pair(sharp(HOST), sharp(HOST))
    # Of no text, and of parts of characters, which no tokenizer writes, the expert has no say.
    texts = enumerate(host.vocabulary.token_bytes)
    options = {
        "max_new_tokens": 21,
        "suppress_tokens": [i for i, text in texts if text is None or not text.isascii()],
    }
    with passes(host.model) as read:
        ours = written(host, pair, 4, **options)
    # A prompt gives one token, and each pass four drafts and the token after them.
    assert read == [ids_of(host).shape[1], 5, 5, 5, 5]
    assert_same(written(host, pair, 0, **options), ours, read[0])


def test_places_after_a_refused_draft_are_not_steered(
    host: HFModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.steering.drafting.UNLIKELY", 0.0)
    steered, plain = list[Rows](), Mixture.logprobs
    monkeypatch.setattr(
        Mixture,
        "logprobs",
        lambda self, rows, trust: steered.append(rows) or plain(self, rows, trust),
    )
    with passes(host.model) as read:
        ours = written(host, sure_pair(SMALL), 5)
    tokens = ours.sequences.shape[1] - ids_of(host).shape[1]
    assert len(steered) == tokens < 1 + sum(read[1:])


def with_settings(ref: str, **settings: Any) -> HFModel:
    """A toy whose configuration says something else."""
    plain = open_model(ref, dtype="float32")
    config: Any = plain.model.config
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
    return adopt_model(ref, model, plain.tokenizer)


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("small", [SMALL, BYTES])
def test_caches_hold_what_was_written_and_nothing_else(
    window: bool, small: str, host: HFModel
) -> None:
    # Of the last eight tokens only.
    one = with_settings("tiny:gemma3?vocab=bpe&hidden=32", sliding_window=8) if window else host
    pair = sure_pair(small)
    plain = written(one, pair, 0, max_new_tokens=24)
    live = Live(pair, one, draft_tokens=5)
    with drafting(one, live) as model:
        ours = model.generate(ids_of(one), max_new_tokens=24, **KEPT)
    assert assert_same(plain, ours, ids_of(one).shape[1]) >= 12
    read = ours.sequences[:, :-1]
    anew = one.model(read, use_cache=True).past_key_values
    assert ours.past_key_values.get_seq_length() == read.shape[1]
    for kept, expected in zip(ours.past_key_values.layers, anew.layers, strict=True):
        seen = 7 if window else read.shape[1]
        assert kept.keys.shape[2] == seen
        torch.testing.assert_close(kept.keys, expected.keys[:, :, -seen:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(kept.values, expected.values[:, :, -seen:], atol=1e-4, rtol=1e-4)
    for cached, model in (
        (live.caches(0).expert, expert_of(pair)),
        (live.caches(0).reference, pair.reference),
    ):
        states = model.hidden(torch.tensor([cached.tokens]))[0]
        torch.testing.assert_close(cached.states, states, atol=1e-4, rtol=1e-4)


def expert_of(pair: Pair) -> HFModel:
    with pair.as_expert() as expert:
        return expert


def plain_distribution(
    host: HFModel, pair: Pair, options: dict[str, Any]
) -> dict[tuple[int, ...], float]:
    """Probability of each continuation, from plain steering's own scores."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    with drafting(host, Live(pair, host, draft_tokens=0)) as model:
        for length in range(1, options["max_new_tokens"] + 1):
            longer = {}
            for begun, prob in found.items():
                forced = LogitsProcessorList([Forced(options["inputs"].shape[1], begun)])
                asked = {**options, "max_new_tokens": length, "logits_processor": forced}
                probs = model.generate(**{**KEPT, **asked}).scores[-1][0].softmax(-1)
                for token_id in torch.nonzero(probs)[:, 0].tolist():
                    longer[(*begun, token_id)] = prob * float(probs[token_id])
            found = longer
    return found


SAMPLES = 120
LETTERS = (b"q", b"z", b"x", b"j")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("way", ["copy", "text", "repeats"])
def test_samples_have_plain_steerings_distribution(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.steering.drafting.UNLIKELY", 0.0)
    host, small = sharp(HOST + "&layers=1"), (BYTES if way == "text" else SMALL) + "&layers=1"
    # A prompt of one token is no evidence, so that runs are short.
    pair, prompt = sure_pair(small, 10 if way == "text" else 4), ids_of(host)[:, -1:]
    if way == "copy":
        pair = lora_pair(small, tmp_path, 4)
    if way == "repeats":
        monkeypatch.setattr("trimtab.steering.repeats.LEAST_BYTES", 1)
        prompt = ids_of(host, "qzxjq")
    options = {"do_sample": True, "top_k": 2, "top_p": 0.95, "temperature": 1.3}
    options |= {"inputs": prompt, "max_new_tokens": 5}
    # An early end would make continuations of several lengths.
    options["suppress_tokens"] = sorted(host.end_ids)
    if way != "text":
        # Of few letters many that are drafted stand.
        texts = enumerate(host.vocabulary.token_bytes)
        options["suppress_tokens"] = [i for i, text in texts if text not in LETTERS]
    expected = plain_distribution(host, pair, options)
    assert sum(expected.values()) == pytest.approx(1, abs=1e-4)
    drafts, plain = list[Draft](), Drafter.draft
    monkeypatch.setattr(
        Drafter, "draft", lambda self, *asked: drafts.append(plain(self, *asked)) or drafts[-1]
    )
    found = list[tuple[int, ...]]()
    torch.manual_seed(11)
    with drafting(host, Live(pair, host, draft_tokens=3)) as model, passes(model) as read:
        for _ in range(SAMPLES):
            found.append(tuple(model.generate(**options)[0, prompt.shape[1] :].tolist()))
    assert len(read) < 5 * SAMPLES
    # Where a draft has fallen there is room for a shorter one.
    assert way == "text" or {2, 3, 4} <= set(read)
    assert any(draft and draft.proposals[0] is None for draft in drafts) == (way != "copy")
    assert set(found) <= set(expected)
    pvalues = [pvalue(expected, found, places) for places in (slice(0, 3), slice(2, 5))]
    assert len(pvalues) * min(pvalues) > 0.01


def pvalue(
    expected: dict[tuple[int, ...], float], found: list[tuple[int, ...]], places: slice
) -> float:
    """How often tokens at some places would be as far from what is expected, by chance."""
    hoped: Counter[tuple[int, ...]] = Counter()
    for tokens, prob in expected.items():
        hoped[tokens[places]] += prob * len(found)
    seen = Counter(tokens[places] for tokens in found)
    # What is seldom counts together, with at least one of the others.
    often = [tokens for tokens, number in hoped.most_common()[:-1] if number >= 5]
    assert len(often) >= 6
    counts = [[of[tokens] for tokens in often] for of in (seen, hoped)]
    seen_each, hoped_each = ([*some, len(found) - sum(some)] for some in counts)
    return float(chisquare(seen_each, hoped_each, sum_check=False).pvalue)


@pytest.mark.parametrize("small", [SMALL, BYTES])
def test_an_end_token_inside_a_draft_ends_the_text(small: str, host: HFModel) -> None:
    pair, prompt_tokens = sure_pair(small), ids_of(host).shape[1]
    ids = written(host, pair, 0).sequences[0].tolist()
    fresh = [i for i in range(prompt_tokens, len(ids)) if ids[i] not in ids[prompt_tokens:i]]
    for place in fresh[1:6]:
        ended = written(host, pair, 5, eos_token_id=[ids[place]]).sequences[0].tolist()
        assert ended == ids[: place + 1]


def test_the_experts_own_end_is_drafted(host: HFModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = sure_pair(SMALL)
    ids = written(host, pair, 0).sequences[0].tolist()
    monkeypatch.setattr(host.model.generation_config, "eos_token_id", [ids[-5], 257])
    assert ids[-5] in host.end_ids
    plain, ours = (written(host, pair, n).sequences for n in (0, 5))
    assert torch.equal(plain, ours)


class Listener:
    """Hears every token of a generation, as transformers' streamers do."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.heard += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_hears_every_token_once(host: HFModel) -> None:
    listener = Listener()
    ids = written(host, sure_pair(SMALL), 5, streamer=listener).sequences[0].tolist()
    assert listener.heard == ids and listener.ended == 1


@pytest.mark.parametrize(
    "options",
    [
        {"inputs": torch.tensor([[84, 104], [84, 105]])},
        {"attention_mask": torch.tensor([[0, 1]]), "inputs": torch.tensor([[258, 84]])},
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"use_cache": False},
        {"output_hidden_states": True},
        {"cache_implementation": "static"},
        {"logits_processor": LogitsProcessorList([Forced(0, ())])},
        # Transformers takes it for padding.
        {"inputs": torch.tensor([[258, 258, 84, 104]]), "pad_token_id": 258},
    ],
)
def test_what_takes_more_than_scores_runs_plain(
    host: HFModel, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = sure_pair(SMALL)
    torch.manual_seed(0)
    expected = written(host, pair, 0, max_new_tokens=2, **options)
    drafted: list[int] = []
    monkeypatch.setattr(Drafter, "draft", lambda *_: drafted.append(1))
    torch.manual_seed(0)
    found = written(host, pair, 5, max_new_tokens=2, **options)
    assert not drafted and torch.equal(found.sequences, expected.sequences)


def test_what_only_the_model_knows_runs_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    host, pair = sharp("tiny:gpt2?vocab=bpe&hidden=32"), sure_pair(SMALL)
    kinds = torch.full_like(ids_of(host), 9)
    expected = written(host, pair, 0, token_type_ids=kinds)
    monkeypatch.setattr(Drafter, "draft", lambda *_: pytest.fail("drafted"))
    found = written(host, pair, 5, token_type_ids=kinds)
    assert torch.equal(found.sequences, expected.sequences)


def test_a_host_that_takes_no_cache_runs_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = open_model(HOST, dtype="float32").tokenizer
    config = OpenAIGPTConfig(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        host = adopt_model("gpt", AutoModelForCausalLM.from_config(config), tokenizer)
    expected = written(host, sure_pair(SMALL), 0, max_new_tokens=4)
    monkeypatch.setattr(Drafter, "draft", lambda *_: pytest.fail("drafted"))
    found = written(host, sure_pair(SMALL), 5, max_new_tokens=4)
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 1024,
        },
    ],
)
def test_positions_that_depend_on_a_passs_length_run_plain(
    rope: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = with_settings(HOST, rope_parameters={"rope_theta": 1e4, **rope})
    expected = written(host, sure_pair(SMALL), 0)
    monkeypatch.setattr(Drafter, "draft", lambda *_: pytest.fail("drafted"))
    assert torch.equal(written(host, sure_pair(SMALL), 5).sequences, expected.sequences)


def test_the_cache_that_hub_files_call_hybrid_is_none(
    host: HFModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.model.generation_config, "cache_implementation", "hybrid")
    with passes(host.model) as read:
        ours = written(host, sure_pair(SMALL), 5)
    assert max(read[1:]) > 1
    assert_same(written(host, sure_pair(SMALL), 0), ours, read[0])


@pytest.mark.parametrize("do_sample", [False, True])
def test_nothing_is_drafted_where_no_text_may_follow(host: HFModel, do_sample: bool) -> None:
    texts, ends = host.vocabulary.token_bytes, host.end_ids
    only = next(i for i, text in enumerate(texts) if text is None and i not in ends)
    asked = {"suppress_tokens": [i for i in range(len(texts)) if i != only], "do_sample": do_sample}
    with passes(host.model) as read:
        ours = written(host, sure_pair(SMALL), 5, max_new_tokens=4, **asked)
    assert ours.sequences[0, -4:].tolist() == [only] * 4 and read[1:] == [1, 1, 1]


def test_an_encoder_decoder_runs_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    host = sharp("tiny:bart?hidden=32")
    source = torch.tensor([prompt_ids(host, PROMPT)])
    expected = written(host, sure_pair(BYTES), 0, inputs=source)
    monkeypatch.setattr(Drafter, "draft", lambda *_: pytest.fail("drafted"))
    assert torch.equal(
        written(host, sure_pair(BYTES), 5, inputs=source).sequences, expected.sequences
    )
