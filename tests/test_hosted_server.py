"""Our own server as a host behind an API, with faults on the way to it: nothing is lost."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import LACKING, Endpoint, serving
from endpoint_server import home as home  # a fixture
from test_generate import HOST, PROMPTS, domain_text
from test_generate import adapter as adapter  # a fixture
from test_generate import host as host  # a fixture
from test_hosted import FAULTS, asked, sleeping
from test_serve_engine import served

from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.config import GenerateConfig
from trimtab.errors import ModelError
from trimtab.generate import GenerateResult
from trimtab.hosted.capabilities import Capabilities
from trimtab.hosted.ledger import Usage
from trimtab.hosted.opening import opened
from trimtab.serving.run import Running, running

JOB: dict[str, Any] = {
    "prompt": (*PROMPTS, *(domain_text(seed)[: 9 * seed] for seed in range(2, 9))),
    "max_new_tokens": 12,
    "api_tokenizer": HOST,
    "api_candidates": 4,
    "api_timeout_sec": 3,
}


@pytest.fixture(scope="module")
def server(host: HFModel) -> Iterator[Running]:
    with running(served(name="toy", slots=8), host=host) as found:
        yield found


def before(
    server: Running, host: HFModel, top: int, *, lenient: bool = False
) -> AbstractContextManager[Endpoint]:
    """The server, as it is seen through what shows so many log-probabilities of it."""
    return serving(Endpoint(host, top=top, lenient=lenient, behind=server.base_url))


@pytest.fixture(params=[20, 5, 0], ids=["top 20", "top 5", "text only"])
def endpoint(request: pytest.FixtureRequest, server: Running, host: HFModel) -> Iterator[Endpoint]:
    with before(server, host, request.param) as found:
        probed(found)
        found.served.clear()
        yield found


def probed(endpoint: Endpoint, tokenizer: str = HOST) -> tuple[Capabilities, Usage]:
    """What is found of an endpoint, and what the ledger says that this took."""
    options = {"host": "openai:toy", "api_url": endpoint.url, "api_tokenizer": tokenizer}
    config = GenerateConfig.model_validate({**options, "prompt": ("any",)})
    with opened(config.host, config) as model:
        return model.by, model.client.ledger.usage


def calls_of(result: GenerateResult) -> int:
    found = re.match(r"used (\d+) calls", result.notes[-1])
    assert found
    return int(found[1])


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("top", [20, 5, 0])
def test_what_our_server_shows_is_found_through_faults(
    server: Running, host: HFModel, top: int, lenient: bool
) -> None:
    with before(server, host, top, lenient=lenient) as endpoint, sleeping([]):
        endpoint.faults = [None, "429", "500", "cut", "truncated", *(None, "cut") * 4]
        by, usage = probed(endpoint)
        assert not endpoint.faults
    assert (by.top_completions, by.echo, by.token_prompts) == (top, bool(top), bool(top))
    assert by.completions and by.several and by.logit_bias == ("works" if top else "accepted")
    # Also counted is an answer that lacks what was asked for.
    assert usage == endpoint.usage


def test_our_server_says_what_its_host_says(adapter: Path, server: Running, host: HFModel) -> None:
    for top in (20, 5):
        texts = []
        for behind in (server.base_url, ""):
            with serving(Endpoint(host, top=top, behind=behind)) as endpoint:
                found = asked(endpoint, adapter, prompt=PROMPTS[:1], api_tokenizer=HOST)
            texts.append((found.level, found.texts))
        assert texts[0] == texts[1]


def test_a_long_job_survives_all_faults_and_counts_each_token_once(
    adapter: Path, endpoint: Endpoint
) -> None:
    smooth = asked(endpoint, adapter, api_cache=False, **JOB)
    alone, calls = endpoint.usage, len(endpoint.served)
    assert smooth.level.startswith(f"top {endpoint.top} " if endpoint.top else "text only")
    assert smooth.notes[-1] == f"used {alone.in_words(calls)}"
    endpoint.served.clear()
    faults = [fault for fault in FAULTS if endpoint.top or fault not in LACKING]
    in_turn = [f for fault in faults for f in (*[None] * (calls // len(faults) - 1), fault)]
    at_once = [fault for fault in faults if fault != "slow"]
    endpoint.faults = [None, *at_once, *in_turn]
    waits: list[float] = []
    with sleeping(waits):
        found = asked(endpoint, adapter, api_cache=False, **JOB)
    assert not endpoint.faults
    assert (found.texts, found.tokens) == (smooth.texts, smooth.tokens)
    failures = len(at_once) + len(faults)
    assert len(waits) == failures and waits.count(7.0) == 2
    lacking = len(endpoint.lacking)
    repeated = f"{failures - lacking} calls repeated, which the API may charge as well"
    paid = sum(endpoint.lacking, alone).in_words(calls + lacking)
    assert found.notes == (*smooth.notes[:-1], f"used {paid}; {repeated}")
    assert (endpoint.usage, len(endpoint.served)) == (alone, calls)


def test_a_wrong_name_ends_a_job_and_the_same_command_goes_on(
    adapter: Path, endpoint: Endpoint
) -> None:
    job = JOB | {"prompt": JOB["prompt"][:4], "max_new_tokens": 4}
    smooth = asked(endpoint, adapter, api_cache=False, **job)
    alone, calls = endpoint.usage, len(endpoint.served)
    endpoint.served.clear()
    half = calls // 2
    # Each run asks first who answers.
    endpoint.faults = [None, *[None] * half, "no-model"]
    with pytest.raises(ModelError, match="the model 'not-toy' does not exist") as error:
        asked(endpoint, adapter, **job)
    assert "serves a model toy" in error.value.hint
    who, begun = endpoint.served[0], len(endpoint.served)
    found = asked(endpoint, adapter, **job)
    assert (found.texts, found.tokens) == (smooth.texts, smooth.tokens)
    assert (endpoint.usage, len(endpoint.served)) == (alone + who + who, calls + 2)
    rest = sum(endpoint.served[begun:], Usage())
    words = f"used {rest.in_words(calls - half + 1)}; {half} answers from the cache"
    assert found.notes[-1] == words
    with pytest.raises(ModelError, match="the model 'other' does not exist"):
        asked(endpoint, adapter, host="openai:other")


def test_drafts_that_our_server_scores_save_calls(adapter: Path) -> None:
    # Its tokens are bytes, as the expert's are.
    ref = "tiny:qwen3?hidden=32"
    host = open_model(ref, dtype="float32")
    options = {"prompt": (domain_text(9)[:60],), "max_new_tokens": 16, "api_tokenizer": ref}
    options |= {"api_cache": False}
    with (
        running(served(host=ref, name="toy"), host=host) as server,
        before(server, host, 20) as endpoint,
        sleeping([]),
    ):
        assert probed(endpoint, ref)[0].echo
        alone = asked(endpoint, adapter, **options)
        drafted = asked(endpoint, adapter, draft_tokens=6, **options)
        endpoint.faults = [None, "429", None, "cut", None, "truncated", None, "no-logprobs"]
        faulty = asked(endpoint, adapter, draft_tokens=6, **options)
    assert drafted.texts == faulty.texts == alone.texts
    # One call more reads the prompt as evidence.
    assert calls_of(alone) == 16 + 1
    assert calls_of(drafted) < 16 == drafted.tokens[0]
    assert calls_of(faulty) == calls_of(drafted) + 1 and "; 3 calls repeated" in faulty.notes[-1]
