"""Traces over HTTP: they explain exactly the tokens that were written, and tell what they may."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from test_generate import adapter as adapter  # a fixture
from test_generate import host as host  # a fixture
from test_serve_engine import served

from trimtab.backends.hf import HFModel
from trimtab.serving.keys import add_key
from trimtab.serving.run import Running, running
from trimtab.serving.trace import Speller, Tracer

PROMPT = "The rudder turns the hull.\nThe keel turns the"


@pytest.fixture(scope="module")
def server(host: HFModel, adapter: Path) -> Iterator[Running]:
    carriers = ("head", "memory", "expert")
    config = served(f"sea={adapter}", f"ship={adapter}", carriers=carriers)
    with running(config, host=host) as found:
        yield found


def ask(server: Running, *, chat: bool = False, key: str = "", **options: Any) -> dict[str, Any]:
    body = {"model": "host+sea", "temperature": 0, "max_tokens": 8} | options
    body |= {"trimtab": {"trace": True, **options.get("trimtab", {})}}
    if chat:
        body |= {"messages": [{"role": "user", "content": PROMPT}]}
    else:
        body |= {"prompt": options.get("prompt", PROMPT)}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    headers = {"authorization": f"Bearer {key}"} if key else {}
    found = httpx2.post(f"{server.base_url}{path}", json=body, headers=headers, timeout=120)
    assert found.status_code == 200, found.text
    return found.json()


@pytest.mark.parametrize("carriers", [["head"], ["memory"], ["head", "memory", "expert"]])
def test_a_trace_explains_each_token_by_the_distributions_that_chose_it(
    server: Running, host: HFModel, carriers: list[str]
) -> None:
    (choice,) = ask(server, trimtab={"carriers": carriers}, logprobs=5)["choices"]
    trace, told = choice["trimtab"]["trace"], choice["logprobs"]
    assert choice["text"].startswith("".join(token["text"] for token in trace))
    written = [id_of(host, name) for name in told["tokens"]]
    assert len(trace) == len(written)
    prompt = [*host.context_ids(), *host.encode(PROMPT)]
    with torch.inference_mode():
        alone = host.logits(torch.tensor([[*prompt, *written]]))[0].float().softmax(-1)
    for token, top, before in zip(
        trace, told["top_logprobs"], alone[len(prompt) - 1 :], strict=False
    ):
        # After: what the request's own log-probabilities say. Before: what the host alone says.
        after = sorted(map(math.exp, top.values()), reverse=True)
        assert shares(token["after"]) == pytest.approx(after[:5], rel=1e-3)
        assert shares(token["before"]) == pytest.approx(before.topk(5).values.tolist(), rel=1e-3)
        assert token["moved_nats"] >= 0
        assert token["by"] in ("host", *carriers)
        assert bool(token["neighbours"]) == ("memory" in carriers)


def shares(pairs: list[list[Any]]) -> list[float]:
    return [prob for _, prob in pairs]


def id_of(host: HFModel, name: str) -> int:
    """The token that a log-probability names."""
    raw = bytes.fromhex(name[6:].replace("\\x", "")) if name.startswith("bytes:") else name.encode()
    return host.vocabulary.ids_by_bytes[raw]


def test_the_host_alone_decides_its_own_tokens(server: Running) -> None:
    for options in ({"model": "host"}, {"trimtab": {"strength": 0}}):
        (choice,) = ask(server, **options)["choices"]
        for token in choice["trimtab"]["trace"]:
            assert (token["by"], token["moved_nats"], token["neighbours"]) == ("host", 0, [])
            assert token["before"] == token["after"]


def test_without_the_word_there_is_no_trace(server: Running) -> None:
    (choice,) = ask(server, trimtab={"trace": False})["choices"]
    assert "trimtab" not in choice


def test_every_answer_is_traced_in_chats_with_stops_and_of_several_adapters(
    server: Running,
) -> None:
    several = ask(server, model="host+sea+ship:0.5", n=2, temperature=1.0, seed=4)["choices"]
    assert len(several) == 2
    for choice in several:
        trace = choice["trimtab"]["trace"]
        # A token that completes no character has no text; one that the end cuts is not told.
        assert choice["text"].startswith("".join(token["text"] for token in trace))
        weights = [one["weight"] for one in trace[0]["neighbours"]]
        assert weights == sorted(weights, reverse=True) and sum(weights) <= 1 + 1e-6
    chat = ask(server, chat=True)["choices"][0]
    said = "".join(token["text"] for token in chat["trimtab"]["trace"])
    assert chat["message"]["content"].startswith(said) and said
    text = ask(server)["choices"][0]["text"]
    stopped = ask(server, stop=[text[3:5]])["choices"][0]
    told = "".join(token["text"] for token in stopped.get("trimtab", {"trace": []})["trace"])
    assert stopped["text"] == text[: text.index(text[3:5])]
    assert told.startswith(stopped["text"])


@pytest.mark.parametrize(("option", "tells"), [(None, False), (True, True)])
def test_a_server_with_keys_keeps_its_text_unless_it_is_told_not_to(
    host: HFModel, adapter: Path, tmp_path: Path, option: bool | None, tells: bool
) -> None:
    key = add_key(tmp_path / "keys.json", "ann")
    config = served(
        f"sea={adapter}", keys=tmp_path / "keys.json", trace_text=option, carriers=("memory",)
    )
    with running(config, host=host) as locked:
        (choice,) = ask(locked, key=key)["choices"]
        for token in choice["trimtab"]["trace"]:
            assert bool(token["neighbours"]) == tells and token["before"]


def test_models_say_which_carriers_are_served(server: Running) -> None:
    first, *others = httpx2.get(f"{server.base_url}/v1/models").json()["data"]
    assert first["id"] == "host" and "trimtab" not in first
    for entry, name in zip(others, ("sea", "ship"), strict=True):
        assert entry["trimtab"] == {"adapter": name, "carriers": ["head", "memory", "expert"]}


def test_characters_count_for_the_token_that_completes_them(host: HFModel) -> None:
    speller = Speller(host)
    tracer = Tracer(speller, tells_text=False)
    logprobs = torch.zeros(len(host.vocabulary)).log_softmax(-1)
    texts = []
    for piece in ("ä".encode()[:1], "ä".encode()[1:], b"x", b"\xff"):
        tracer.hear(logprobs)
        texts.append(tracer.explained(0, piece, logprobs).text)
    assert texts == ["", "ä", "x", "�"]
    assert {speller(i) for i in host.end_ids} == {"<eos>"}
