"""Steering a model behind an API, over HTTP, against the same model opened here."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from endpoint_server import LACKING, Endpoint, continued, logits_of, serving, text_of
from endpoint_server import home as home  # a fixture
from scipy.stats import chisquare
from test_generate import HOST, PROMPTS
from test_generate import adapter as adapter  # a fixture
from test_generate import host as host  # a fixture

from trimtab.backends.chat import chat_ids, prompt_ids
from trimtab.backends.hf import HFModel
from trimtab.backends.live import Live
from trimtab.backends.pair import Pair
from trimtab.cli import main
from trimtab.cli_errors import CUT_SHORT
from trimtab.config import GenerateConfig
from trimtab.errors import AdapterError, InputError, ModelError
from trimtab.generate import GenerateResult, generate
from trimtab.hosted.answers import Place, Token, bytes_of
from trimtab.hosted.blending import Before, Blender
from trimtab.hosted.probing import LOOK_TOKENS
from trimtab.hosted.tokens import ToldTokens, open_known
from trimtab.hosted.writing import places_after
from trimtab.steering.beside import open_beside
from trimtab.steering.evidence import Mixture
from trimtab.steering.predictors import Steering
from trimtab.store.manifest import read_manifest

WHOLE = 1000


@pytest.fixture
def endpoint(host: HFModel) -> Iterator[Endpoint]:
    with serving(Endpoint(host)) as found:
        yield found


def asked(endpoint: Endpoint, adapter: Path | None, **options: Any) -> GenerateResult:
    config = {
        "host": "openai:toy",
        "api_url": endpoint.url,
        "adapter": adapter,
        "prompt": PROMPTS[:1],
        "max_new_tokens": 8,
        "dtype": "float32",
    }
    return generate(GenerateConfig.model_validate(config | options))


def local(adapter: Path, host: HFModel, **options: Any) -> GenerateResult:
    config = {
        "host": HOST,
        "adapter": adapter,
        "carriers": ("expert",),
        "prompt": PROMPTS[:1],
        "max_new_tokens": 8,
        "dtype": "float32",
    }
    return generate(GenerateConfig.model_validate(config | options), host=host)


@pytest.mark.parametrize("draft_tokens", [0, 3])
@pytest.mark.parametrize("echo", [True, False])
def test_all_logprobs_of_known_tokens_are_the_local_host(
    adapter: Path, host: HFModel, endpoint: Endpoint, draft_tokens: int, echo: bool
) -> None:
    endpoint.echo = echo
    options = {"api_tokenizer": HOST, "api_top_logprobs": WHOLE, "draft_tokens": draft_tokens}
    # Without evidence from the prompt the prior decides, as after a prompt of one token.
    prompt = PROMPTS if echo else ("T",)
    found = asked(endpoint, adapter, prompt=prompt, **options)
    assert found.texts == local(adapter, host, prompt=prompt).texts
    assert found.level.startswith("top ")


def test_told_tokens_and_text_prompts_are_nearly_the_local_host(
    adapter: Path, host: HFModel, endpoint: Endpoint
) -> None:
    # Bytes are their own strings, so that nothing is lost where the tokenizer is not known.
    found = asked(endpoint, adapter, api_top_logprobs=WHOLE)
    assert found.tokens == (8,)
    known = asked(endpoint, adapter, api_top_logprobs=WHOLE, api_tokenizer=HOST)
    assert found.texts[0][:4] == known.texts[0][:4]


@pytest.mark.parametrize("chat", [False, True])
def test_a_text_that_outgrows_the_small_model_ends_there(
    chat: bool, adapter: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint.completions, endpoint.chat, endpoint.readable = not chat, chat, True
    options = {"api_tokenizer": HOST, "api_top_logprobs": 20, "chat": chat, "max_new_tokens": 12}
    whole = asked(endpoint, adapter, **options)
    before = len("<user><eos><assistant>" if chat else "") + len(PROMPTS[0])
    monkeypatch.setattr("trimtab.backends.tiny.MAX_POSITIONS", before + 5)
    found = asked(endpoint, adapter, **options)
    assert 0 < found.tokens[0] < whole.tokens[0] == 12
    assert whole.texts[0].startswith(found.texts[0])
    assert found.notes[-1].startswith(
        f"the continuation of prompt 1 ends after {found.tokens[0]} tokens"
    )
    assert not any("ends after" in note for note in whole.notes)


def test_strength_zero_and_no_adapter_are_the_host(
    adapter: Path, host: HFModel, endpoint: Endpoint
) -> None:
    bare = local(adapter, host, strength=0).texts
    for options in ({"strength": 0.0}, {"adapter": None}):
        found = asked(endpoint, **{"adapter": adapter, **options})
        assert found.texts == bare
        assert found.level == "the host alone, unsteered"
    assert sum(body.get("max_tokens") == 8 for _, _, body in endpoint.seen) == 1


@pytest.mark.parametrize("top", [5, 20])
def test_a_few_logprobs_steer_as_well(
    adapter: Path, host: HFModel, endpoint: Endpoint, top: int
) -> None:
    endpoint.top = top
    found = asked(endpoint, adapter, api_tokenizer=HOST, strength=2.0, max_new_tokens=8)
    assert found.level == f"top {top} logprobs, blended with expert and reference"
    assert found.texts != local(adapter, host, strength=0, max_new_tokens=8).texts


def test_drafts_take_fewer_calls_for_the_same_text(adapter: Path, endpoint: Endpoint) -> None:
    endpoint.top, endpoint.echo = 20, False
    texts, calls = [], []
    for draft_tokens in (0, 4):
        endpoint.served.clear()
        options = {"draft_tokens": draft_tokens, "api_cache": False, "api_tokenizer": HOST}
        texts.append(asked(endpoint, adapter, max_new_tokens=8, **options).texts)
        calls.append(len(endpoint.served))
    assert texts[0] == texts[1]
    assert calls[1] < calls[0]


@pytest.mark.parametrize("chat", [False, True])
def test_an_api_that_draws_in_its_own_way_changes_no_greedy_choice(
    adapter: Path, endpoint: Endpoint, chat: bool
) -> None:
    endpoint.top, endpoint.echo, endpoint.readable, endpoint.chat = 20, False, True, True
    options: dict[str, Any] = {"chat": chat, "api_tokenizer": HOST, "api_top_logprobs": 20}
    plain = asked(endpoint, adapter, **options, api_cache=False)
    endpoint.temperature, endpoint.shortest, endpoint.name = False, 16, "own"
    own = asked(endpoint, adapter, host="openai:own", **options)
    assert own.level == plain.level and own.level.startswith("top 20")
    assert (own.texts, own.tokens) == (plain.texts, plain.tokens)
    assert not any("its own apply" in note for note in own.notes)
    drawn = asked(endpoint, adapter, host="openai:own", temperature=1.0, **options)
    assert any("its own apply" in note for note in drawn.notes)
    understood = [b for _, _, b in endpoint.seen if b["model"] == "own" and "temperature" not in b]
    assert understood and {b["max_tokens"] for b in understood} <= {1, 16}


@pytest.mark.parametrize("prompt", ["ä The rudder turns the", "The rudder turns"])
def test_a_draft_whose_place_cannot_be_told_changes_no_choice(
    adapter: Path, endpoint: Endpoint, prompt: str
) -> None:
    endpoint.lossy = endpoint.readable = True
    options: dict[str, Any] = {"prompt": (prompt,), "max_new_tokens": 8, "strength": 2.0}
    plain = asked(endpoint, adapter, **options)
    calls = len(endpoint.seen)
    drafted = asked(endpoint, adapter, draft_tokens=8, **options)
    assert (drafted.texts, drafted.tokens) == (plain.texts, plain.tokens)
    # One reads the prompt, the others read drafts.
    assert sum(bool(body.get("echo")) for _, _, body in endpoint.seen[calls:]) > 1


def test_the_places_after_a_text_are_those_after_all_of_it() -> None:
    def places(*names: str) -> list[Place]:
        return [Place(Token(bytes_of(name), -1.0, name), ()) for name in names]

    draft = places(" the", " cat", " sat")
    for before in (["<s>", "a", " fn"], ["a", " fn"], [" a fn"]):
        context = "".join(name for name in before if name != "<s>").encode()
        assert places_after(context, [*places(*before), *draft]) == draft
    lost = "\ufffd"
    for context, names in (
        ("🚀 fn", (lost, lost, " fn")),
        ("a 🚀", ("a", " ", lost)),
        ("é", (lost, lost, "é")),
        ("a</s>", ("a", "</s>")),
        ("a fnx", ("a", " fn")),
        ("a", (" a",)),
    ):
        assert not places_after(context.encode(), [*places(*names), *draft])
    # A place is known where only what stands at it is lost.
    assert len(places_after(b"a", places("a", lost, lost, " b"))) == 3


@pytest.mark.parametrize("name", ["<｜end▁of▁sentence｜>", "[EOS]", "<done>"])
@pytest.mark.parametrize("tokenizer", [None, HOST])
def test_an_end_of_any_name_ends_a_text(
    adapter: Path, endpoint: Endpoint, name: str, tokenizer: str | None
) -> None:
    endpoint.end_name, endpoint.end_lead = name, 20.0
    found = asked(endpoint, adapter, api_tokenizer=tokenizer)
    assert (found.texts, found.tokens) == (("",), (0,))


def test_stop_strings_and_sampling(adapter: Path, endpoint: Endpoint) -> None:
    plain = asked(endpoint, adapter, api_tokenizer=HOST).texts[0]
    stop = plain[3:5]
    assert (
        asked(endpoint, adapter, api_tokenizer=HOST, stop=(stop,)).texts[0]
        == plain[: plain.index(stop)]
    )
    sampled = {"temperature": 1.0, "top_p": 0.95, "top_k": 10, "api_tokenizer": HOST}
    ones = [asked(endpoint, adapter, seed=seed, **sampled).texts[0] for seed in (1, 1, 2, 3)]
    assert ones[0] == ones[1]
    assert len(set(ones)) > 1


@pytest.mark.parametrize("silent_end", [False, True])
def test_the_hosts_part_of_a_draw_is_its_whole_distribution(
    adapter: Path, host: HFModel, endpoint: Endpoint, silent_end: bool
) -> None:
    endpoint.top, endpoint.echo, endpoint.sharpness, endpoint.fresh = 5, False, 20.0, True
    endpoint.end_lead, endpoint.silent_end = -1.0, silent_end
    prompt, draws = "The m", 240
    expected, shown = steered(adapter, host, endpoint, prompt)
    found = asked(
        endpoint, adapter, prompt=(prompt,) * draws, max_new_tokens=1, temperature=1.0,
        api_tokenizer=HOST, api_cache=False, draft_tokens=2,
    ).texts  # fmt: skip
    observed = Counter(found)
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-4)
    # The host's own draws are not bound to what it has shown, or to what the expert expects.
    assert sum(count for text, count in observed.items() if text not in shown) > draws / 20
    # Texts in the order of their probability, in groups of which enough are drawn.
    counts, probs = [0], [0.0]
    for text in sorted(expected, key=lambda text: -expected[text]):
        if probs[-1] * draws >= 8:
            counts.append(0)
            probs.append(0.0)
        counts[-1] += observed[text]
        probs[-1] += expected[text]
    assert len(counts) >= 10
    p_value = chisquare(counts, draws * np.array(probs) / sum(probs)).pvalue
    assert p_value > 1e-3


def steered(
    adapter: Path, host: HFModel, endpoint: Endpoint, prompt: str
) -> tuple[dict[str, float], set[str]]:
    """The next text's probabilities when the host's part is whole, and what else may be chosen."""
    pair = open_beside(read_manifest(adapter), adapter, dtype="float32")
    tokens = open_known(HOST)
    live = Live(pair, tokens)
    mixture = Mixture(Steering(("live",), live=live, blend=read_manifest(adapter).blend))
    blender = Blender(mixture, live, tokens, by_ids=True)
    ids = prompt_ids(host, prompt)
    logprobs = logits_of(endpoint, ids)[-1].log_softmax(-1)
    texts = host.vocabulary.token_bytes
    top = [
        Token(texts[i], float(logprobs[i]), host.tokenizer.convert_ids_to_tokens(i), i)
        for i in logprobs.topk(5).indices.tolist()
    ]
    last = ids[-1]
    options = blender.options(Before(prompt.encode(), ids, last), top)
    share, others = blender.host_share, options.others.softmax(-1)
    assert 0.05 < share < 0.95
    mixed: dict[str, float] = defaultdict(float)
    for token_id, prob in enumerate(logprobs.exp().tolist()):
        mixed[text_of(host, [token_id])] += share * prob
    for option, prob in zip(options.each, others.tolist(), strict=True):
        mixed[(option.text or b"").decode("utf-8", "replace")] += (1 - share) * prob
        if option.text in [token.text for token in top]:
            whole = float(options.logprobs[options.each.index(option)].exp())
            own = float(logprobs[option.token_id].exp())
            left = float(options.others[options.each.index(option)].exp())
            assert whole == pytest.approx(share * own + (1 - share) * left, rel=1e-3)
    return mixed, {(o.text or b"").decode("utf-8", "replace") for o in options.each}


def test_what_the_host_has_drawn_is_taken_if_it_can_be_sent(adapter: Path) -> None:
    pair = open_beside(read_manifest(adapter), adapter, dtype="float32")
    live = Live(pair, ToldTokens.of((), ()))
    steering = Steering(("live",), live=live, blend=read_manifest(adapter).blend)
    blender = Blender(Mixture(steering), live, None, by_ids=False)
    taken = blender.option_of(Token(b" hull", -1.0, " hull"))
    assert taken and (taken.text, taken.ends) == (b" hull", False)
    end = blender.option_of(Token(None, -1.0, "</s>"))
    assert end and end.ends
    # A part of a character, and one whose bytes are not told.
    assert blender.option_of(Token(b"\xc3", -1.0, "bytes:\\xc3")) is None
    assert blender.option_of(Token(None, -1.0, "\ufffd")) is None


def test_a_chat_that_goes_on_from_a_beginning_is_blended(
    adapter: Path, host: HFModel, endpoint: Endpoint
) -> None:
    endpoint.completions, endpoint.chat, endpoint.readable = False, True, True
    found = asked(endpoint, adapter, chat=True, api_tokenizer=HOST, api_top_logprobs=20)
    assert found.level.startswith("top 20")
    assert found.tokens == (8,)
    with pytest.raises(ModelError, match="answers messages only"):
        asked(endpoint, adapter)


def test_a_chat_that_starts_anew_gets_the_best_of_candidates(
    adapter: Path, endpoint: Endpoint
) -> None:
    endpoint.completions, endpoint.chat, endpoint.prefill = False, True, False
    found = asked(endpoint, adapter, chat=True, api_candidates=3)
    assert found.level == "text only: of 3 candidates the one that the expert finds likeliest"
    with pytest.raises(ModelError, match="no log-probabilities that can be steered"):
        asked(endpoint, adapter, chat=True, api_level="top-k")


@pytest.mark.parametrize("several", [True, False])
def test_without_logprobs_the_small_models_choose(
    adapter: Path, host: HFModel, endpoint: Endpoint, several: bool
) -> None:
    endpoint.top, endpoint.several = 0, several
    found = asked(endpoint, adapter, api_candidates=6)
    sent = [body for _, _, body in endpoint.seen if body.get("max_tokens") == 8]
    assert sum(body.get("n", 1) for body in sent) == 6
    pair = open_beside(read_manifest(adapter), adapter, dtype="float32")
    texts = candidates(endpoint, 6)
    assert found.texts[0] in texts
    # The oracle scores each candidate by itself, token by token.
    scores = [slow_score(pair, PROMPTS[0], text) for text in texts]
    assert scores.index(max(scores)) == texts.index(found.texts[0])


def test_a_server_that_gives_fewer_candidates_is_asked_for_the_others(
    adapter: Path, endpoint: Endpoint
) -> None:
    endpoint.top, endpoint.most, endpoint.fresh = 0, 2, True
    asked(endpoint, adapter, api_candidates=5)
    sent = [body for _, _, body in endpoint.seen if body.get("max_tokens") == 8]
    assert [body.get("n", 1) for body in sent] == [5, 3, 1]
    # What has come is kept, each request by itself.
    before = len(endpoint.served)
    asked(endpoint, adapter, api_candidates=5)
    assert len(endpoint.served) == before + 1


def test_no_candidates_are_paid_that_the_small_models_cannot_read(
    adapter: Path, endpoint: Endpoint
) -> None:
    endpoint.top = 0
    asked(endpoint, adapter, api_candidates=2)
    calls = len(endpoint.seen)
    with pytest.raises(InputError, match="has positions for 2048") as error:
        asked(endpoint, adapter, api_candidates=2, prompt=("m" * 2041,), api_cache=False)
    assert error.value.hint and len(endpoint.seen) == calls


def test_the_budget_holds_for_each_candidate(adapter: Path, endpoint: Endpoint) -> None:
    endpoint.top, endpoint.several, endpoint.fresh = 0, False, True
    options: dict[str, Any] = {"api_tokenizer": HOST, "api_candidates": 6}
    assert not asked(endpoint, adapter, **options, seed=1).is_cut_short
    each, who = endpoint.served[-1].tokens, endpoint.served[-7].tokens
    endpoint.served.clear()
    # Each run asks first who answers, and then for candidates.
    cut = asked(endpoint, adapter, **options, api_budget_tokens=who + 4 * each - 1)
    assert len(endpoint.served) == 1 + 3 and endpoint.usage.tokens == who + 3 * each
    assert cut.is_cut_short and cut.texts[0]
    # What has come is kept, so that the same budget reaches further.
    again = asked(endpoint, adapter, **options, api_budget_tokens=who + 4 * each - 1)
    assert len(endpoint.served) == 2 + 6 and not again.is_cut_short
    whole = asked(endpoint, adapter, **options, api_budget_tokens=who + each)
    assert len(endpoint.served) == 3 + 6 and whole.texts == again.texts


@pytest.mark.parametrize("several", [True, False])
def test_candidates_of_another_seed_or_place_are_others(
    adapter: Path, endpoint: Endpoint, several: bool
) -> None:
    endpoint.top, endpoint.several, endpoint.fresh = 0, several, True
    options: dict[str, Any] = {"prompt": PROMPTS[:1] * 2, "api_candidates": 2}
    each = 1 if several else 2
    # Equal prompts have candidates of their own, and these are kept.
    for seed, requests in ((0, 2 * each), (0, 2 * each), (1, 4 * each)):
        asked(endpoint, adapter, **options, seed=seed)
        sent = [body for _, _, body in endpoint.seen if body.get("max_tokens") == 8]
        assert len(sent) == requests


def candidates(endpoint: Endpoint, count: int) -> list[str]:
    """What the endpoint has answered: it draws the same for the same place among candidates."""
    body = next(body for _, _, body in endpoint.seen if body.get("max_tokens") == 8)
    ids = prompt_ids(endpoint.model, body["prompt"])
    places = range(count) if endpoint.several else [0] * count
    return [
        text_of(endpoint.model, continued(endpoint, ids, body, n)[0][len(ids) :]) for n in places
    ]


def slow_score(pair: Pair, prompt: str, text: str) -> float:
    before, ids = pair.reference.encode(prompt), pair.reference.encode(prompt + text)
    total = 0.0
    for end in range(len(before), len(ids)):
        read = torch.tensor([ids[:end]])
        total += float(pair.expert_logits(read)[0, -1].log_softmax(-1)[ids[end]])
    return total / len(text.encode())


def test_a_chat_is_shown_the_experts_draft(adapter: Path, endpoint: Endpoint) -> None:
    endpoint.completions, endpoint.chat, endpoint.prefill = False, True, False
    found = asked(endpoint, adapter, chat=True, api_candidates=3, api_draft_tokens=6)
    assert found.level.endswith(", all having seen the expert's draft")
    sent = [body["messages"] for _, _, body in endpoint.seen if body.get("n") == 3]
    [[message]] = sent
    pair = open_beside(read_manifest(adapter), adapter, dtype="float32")
    ids = chat_ids(pair.reference, PROMPTS[0])
    # The oracle: the expert's likeliest token after all before it, read anew each time.
    draft = list(ids)
    for _ in range(6):
        with pair.as_expert() as expert:
            draft.append(int(expert.logits(torch.tensor([draft]))[0, -1].argmax()))
    said = text_of(pair.reference, draft[len(ids) :]).strip("\n ")
    assert message["content"].startswith(PROMPTS[0])
    assert said and message["content"].endswith(said)


def test_a_draft_needs_a_chat_and_candidates(adapter: Path, endpoint: Endpoint) -> None:
    endpoint.chat = endpoint.readable = True
    for options in ({}, {"chat": True}, {"chat": True, "adapter": None}, {"api_level": "text"}):
        with pytest.raises(InputError, match="is shown in a chat where candidates are chosen"):
            asked(endpoint, **{"adapter": adapter, "api_draft_tokens": 4, **options})


def test_anthropics_messages(adapter: Path, endpoint: Endpoint) -> None:
    endpoint.chat = True
    found = asked(endpoint, adapter, host="anthropic:toy", chat=True, api_candidates=3)
    assert found.level.startswith("text only")
    paths = {path for path, _, _ in endpoint.seen}
    assert paths == {"/v1/messages"}
    assert all("anthropic-version" in headers for _, headers, _ in endpoint.seen)


FAULTS = ("429", "500", "cut", "truncated", "slow", *LACKING)


def test_a_long_job_survives_all_faults_and_counts_each_token_once(
    adapter: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.hosted.client.FIRST_WAIT_SEC", 0.01)
    options = {"api_tokenizer": HOST, "prompt": PROMPTS, "max_new_tokens": 6}
    smooth = asked(endpoint, adapter, api_cache=False, **options)
    counted = len(endpoint.seen)
    waits: list[float] = []
    with sleeping(waits):
        endpoint.served.clear()
        endpoint.faults = [f for fault in FAULTS for f in (None, fault)]
        found = asked(endpoint, adapter, api_cache=False, api_timeout_sec=3, **options)
    assert found.texts == smooth.texts
    assert not endpoint.faults
    assert waits.count(7.0) == 1
    # What is whole is paid, also where it lacks what was asked for.
    usage = sum(endpoint.lacking, endpoint.usage)
    words = f"{usage.prompt_tokens:,} prompt and {usage.completion_tokens:,} completion tokens"
    assert words in found.notes[-1]
    assert len(endpoint.lacking) == len(LACKING)
    assert f"{len(FAULTS) - len(LACKING)} calls repeated" in found.notes[-1]
    assert len(endpoint.seen) - counted == len(endpoint.served) + len(FAULTS)


def test_an_interrupted_job_goes_on_and_pays_nothing_twice(
    adapter: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"api_tokenizer": HOST, "prompt": PROMPTS, "max_new_tokens": 6}
    smooth = asked(endpoint, adapter, api_cache=False, **options)
    alone = len(endpoint.served)
    endpoint.served.clear()
    endpoint.faults = [None] * 12 + ["500"] * 2
    with sleeping([]), pytest.raises(ModelError, match="has failed 2 times"):
        asked(endpoint, adapter, api_attempts=2, **options)
    assert 0 < len(endpoint.served) < alone
    assert asked(endpoint, adapter, **options).texts == smooth.texts
    assert len(endpoint.served) <= alone
    before = len(endpoint.seen)
    again = asked(endpoint, adapter, **options)
    assert again.texts == smooth.texts
    # Who answers is asked in each run.
    assert len(endpoint.seen) == before + 1
    assert f"used {endpoint.served[-1].in_words(1)}; " in again.notes[-1]


def test_the_budget_ends_a_run_and_a_larger_one_goes_on(adapter: Path, endpoint: Endpoint) -> None:
    options = {
        "api_tokenizer": HOST,
        "max_new_tokens": 8,
        "api_price_in": 1.0,
        "api_price_out": 2.0,
    }
    whole = asked(endpoint, adapter, api_cache=False, **options)
    endpoint.served.clear()
    cut = asked(endpoint, adapter, api_budget_tokens=60, **options)
    assert endpoint.usage.tokens <= 60
    assert "stopped by the budget" in cut.notes[-1]
    assert cut.is_cut_short and not whole.is_cut_short
    assert whole.texts[0].startswith(cut.texts[0]) and cut.texts != whole.texts
    assert asked(endpoint, adapter, **options).texts == whole.texts
    cost = endpoint.usage.prompt_tokens / 1e6
    assert "$" in whole.notes[1] and "$" in whole.notes[-1] and cost < 1


def test_a_text_that_the_budget_ended_has_an_exit_status_of_its_own(
    endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", PROMPTS[0], "--host", "openai:toy", "--api-url", endpoint.url]
    words += ["--api-tokenizer", HOST, "--max-new-tokens", "8"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--api-budget-tokens", "60"])
    refused = capsys.readouterr()
    assert end.value.code == 2 and "has not been looked at yet" in refused.err
    assert not endpoint.seen
    with pytest.raises(SystemExit):
        main(["hosts", "probe", "openai:toy", "--api-url", endpoint.url, "--api-tokenizer", HOST])
    assert 0 < endpoint.usage.tokens <= LOOK_TOKENS["openai"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([*words, "--api-budget-tokens", "10"])
    cut = capsys.readouterr()
    assert end.value.code == CUT_SHORT and "stopped by the budget of tokens" in cut.err
    with pytest.raises(SystemExit) as end:
        main(words)
    assert not end.value.code and capsys.readouterr().out.startswith(cut.out.rstrip("\n"))


def test_wrong_names_keys_and_addresses_are_errors_with_a_remedy(
    adapter: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match="the model other does not exist"):
        asked(endpoint, adapter, host="openai:other")
    with pytest.raises(InputError, match="names no model"):
        asked(endpoint, adapter, host="openai:")
    with pytest.raises(AdapterError, match="read a host's hidden states"):
        asked(endpoint, adapter, carriers=("head", "memory"))
    monkeypatch.setattr("trimtab.hosted.client.FIRST_WAIT_SEC", 0.0)
    with pytest.raises(ModelError, match="has failed 2 times: the connection failed") as failure:
        asked(endpoint, adapter, api_url="http://127.0.0.1:9/v1", api_attempts=2)
    assert failure.value.hint == "check the address and its port, and that the server runs"


def test_a_user_is_told_why_and_how_long_is_waited(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.hosted.client.FIRST_WAIT_SEC", 0.01)
    config = GenerateConfig(
        host="openai:any", prompt=("p",), api_url="http://127.0.0.1:9/v1", api_attempts=3
    )
    notes = list[str]()
    with pytest.raises(ModelError, match="has failed 3 times"):
        generate(config, on_note=notes.append)
    assert len(notes) == 2
    assert all(
        n.startswith("the connection failed: ") and "trying again in 0 s" in n for n in notes
    )


CANARY = "sk-canary-6d1f0b7e"


def test_the_key_is_nowhere(
    adapter: Path,
    endpoint: Endpoint,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TRIMTAB_API_KEY", CANARY)
    monkeypatch.setenv("TRIMTAB_DEBUG", "1")
    endpoint.key, endpoint.tells = CANARY, True
    said = [str(asked(endpoint, adapter))]
    config = {"host": "openai:toy", "api_url": endpoint.url, "prompt": PROMPTS[1:2]}
    # After the question who answers.
    endpoint.faults = [None, "error"]
    with sleeping([]):
        generate(GenerateConfig.model_validate(config), on_note=said.append)
    assert any("not for" in note and "[key]" in note for note in said)
    words = ["generate", "--host", "openai:toy", "--api-url", endpoint.url, "The keel"]
    words += ["--adapter", str(adapter), "--max-new-tokens", "2"]
    probe = ["hosts", "probe", "openai:toy", "--api-url", endpoint.url]
    for command in (words, [*words, "--api-level", "text"], probe):
        for right in (True, False):
            endpoint.key = CANARY if right else "another"
            options = [] if right else ["--no-api-cache", "--api-top-logprobs", "7"]
            with pytest.raises(SystemExit) as end:
                main([*command, *options])
            assert end.value.code == (0 if right else 2)
    with pytest.raises(SystemExit):
        main([*words[:4], f"http://user:{CANARY}@127.0.0.1/v1", "The"])
    out, err = capfd.readouterr()
    assert "incorrect key: Bearer [key]" in err
    files = [path.read_bytes() for path in home.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert not any(CANARY.encode() in data for data in files)
    assert all(CANARY not in text for text in (out, err, *said))
    assert any(CANARY in json.dumps(headers) for _, headers, _ in endpoint.seen)


def test_a_services_own_key_goes_to_that_service_alone(
    adapter: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    asked(endpoint, None)
    assert not any("authorization" in map(str.lower, headers) for _, headers, _ in endpoint.seen)


def test_hosts_probe(endpoint: Endpoint, host: HFModel, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint.chat, endpoint.top, endpoint.readable = True, 20, True
    with pytest.raises(SystemExit) as end:
        main(["hosts", "probe", endpoint.url, "--api-tokenizer", HOST])
    assert end.value.code == 0
    out = capsys.readouterr().out
    for line in (
        "openai:toy at",
        "top logprobs, plain text         20",
        "answer goes on from a beginning  yes",
        "logit_bias                       yes",
        "prompt as token ids              yes",
        "plain text: expert, blended token by token with the top 20 logprobs",
    ):
        assert line in out
    with pytest.raises(SystemExit) as end:
        main(["hosts", "probe", HOST])
    assert end.value.code == 0
    assert "head, memory and expert can steer it" in capsys.readouterr().out


@contextmanager
def sleeping(waits: list[float]) -> Iterator[None]:
    """Clients inside note how long they would wait, and do not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trimtab.hosted.client.SLEEP", waits.append)
        yield
