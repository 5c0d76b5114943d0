"""Clients of other projects at our server: litellm, and lm-evaluation-harness by HTTP.

OpenAI's own is asked in test_serve.py.
"""

import asyncio
import os
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generate import HOST, PROMPTS, domain_text, run
from test_generate import adapter as adapter  # a fixture
from test_generate import host as host  # a fixture
from test_generate import mounted as mounted  # a fixture
from test_serve_engine import served

from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.serving.run import Running, running
from trimtab.steering.answers import score_text
from trimtab.steering.evidence import Mixture
from trimtab.steering.mounted import Mounted
from trimtab.steering.processor import mixture_of

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs trimtab[lmeval]")
needs_litellm = pytest.mark.skipif(find_spec("litellm") is None, reason="needs trimtab[clients]")

PROMPT = PROMPTS[0]
CONTEXTS = (domain_text(8)[:50], "The m", "In the harbour")
ANSWERS = (" rudder.\nThe keel", " xyz", " äöü")


@pytest.fixture(scope="module")
def server(host: HFModel, adapter: Path) -> Iterator[Running]:
    with running(served(f"sea={adapter}", slots=8), host=host) as found:
        yield found


@pytest.fixture(scope="module")
def mixture(host: HFModel, mounted: Mounted) -> Mixture:
    return mixture_of(host, mounted, ("head", "memory"), 1.0, None)


@pytest.fixture(scope="module")
def tokenizer(host: HFModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where lm-eval reads the host's tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    host.tokenizer.save_pretrained(folder)
    host.model.config.save_pretrained(folder)
    return folder


def over_http(base_url: str, model: str, tokenizer: Path, **options: Any) -> Any:
    """lm-eval's own model of a server of OpenAI's protocol."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        model=model,
        base_url=f"{base_url}/v1/completions",
        tokenizer=str(tokenizer),
        tokenizer_backend="huggingface",
        max_length=2048,
        **options,
    )


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, n) for n, one in enumerate(arguments)]  # pyright: ignore


def questions() -> list[Any]:
    return asked("loglikelihood", *((c, a) for c in CONTEXTS for a in ANSWERS))


@needs_harness
@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"num_concurrent": 4}], ids=str)
def test_lm_eval_finds_a_bare_host_as_likely_as_its_own_model_does(
    server: Running, host: HFModel, tokenizer: Path, options: dict[str, Any]
) -> None:
    from trimtab.lmeval.model import SteeredLM
    from trimtab.lmeval.run import _quiet

    with _quiet():
        theirs = over_http(server.base_url, "host", tokenizer, **options)
        direct = SteeredLM(host)
        texts = asked("loglikelihood_rolling", *((domain_text(n)[:90],) for n in range(3)))
        found, expected = (one.loglikelihood(questions(), True) for one in (theirs, direct))
        rolling = [one.loglikelihood_rolling(texts, True) for one in (theirs, direct)]
    for (ours, greedy), (nats, is_greedy) in zip(found, expected, strict=True):
        assert ours == pytest.approx(nats, abs=1e-3) and greedy == is_greedy
    assert rolling[0] == pytest.approx(rolling[1], abs=1e-3)


@needs_harness
def test_lm_eval_finds_a_steered_text_as_likely_as_evaluate_does(
    server: Running, host: HFModel, tokenizer: Path, mixture: Mixture
) -> None:
    from trimtab.lmeval.model import SteeredLM
    from trimtab.lmeval.run import _quiet

    with _quiet():
        theirs = over_http(server.base_url, "host+sea", tokenizer)
        direct = SteeredLM(host, mixture)
        texts = asked("loglikelihood_rolling", *((domain_text(n)[:90],) for n in range(3)))
        rolling = [one.loglikelihood_rolling(texts, True) for one in (theirs, direct)]
        found = theirs.loglikelihood(questions(), True)
    assert rolling[0] == pytest.approx(rolling[1], abs=1e-3)
    # A server is not told where the question ends: all of the text before a token is evidence.
    pairs = [(c, a) for c in CONTEXTS for a in ANSWERS]
    for (context, answer), (nats, _) in zip(pairs, found, strict=True):
        before, ids = host.encode(context), host.encode(context + answer)
        logprobs, _ = score_text(host, mixture, ids, 1)
        assert nats == pytest.approx(float(logprobs[len(before) - 1 :].sum()), abs=1e-3)


@needs_harness
@pytest.mark.parametrize("model", ["host", "host+sea"])
def test_lm_eval_reads_the_texts_that_generate_writes(
    model: str, server: Running, tokenizer: Path, adapter: Path
) -> None:
    from trimtab.lmeval.run import _quiet

    options = {"until": ["zq"], "max_gen_toks": 8, "do_sample": False}
    with _quiet():
        theirs = over_http(server.base_url, model, tokenizer)
        requests = asked("generate_until", *((prompt, dict(options)) for prompt in PROMPTS))
        found = theirs.generate_until(requests, True)
    expected = run(adapter if "+" in model else None, *PROMPTS).texts
    assert found == [text.partition("zq")[0] for text in expected]


@needs_harness
def test_an_answer_that_ends_at_once_takes_nothing_from_what_lm_eval_sums(tokenizer: Path) -> None:
    from trimtab.lmeval.model import SteeredLM
    from trimtab.lmeval.run import _quiet

    host = open_model(HOST, dtype="float32")
    text = CONTEXTS[0] + ANSWERS[0]
    last = host.hidden(torch.tensor([host.encode(text)]))[:, -1]
    end = int(host.unembedding.logits(last).argmax())
    assert host.model.generation_config
    host.model.generation_config.eos_token_id = end
    with running(served(), host=host) as server, _quiet():
        theirs = over_http(server.base_url, "host", tokenizer)
        requests = asked("loglikelihood", (CONTEXTS[0], ANSWERS[0]))
        ((found, _),) = theirs.loglikelihood(requests, True)
        ((expected, _),) = SteeredLM(host).loglikelihood(requests, True)
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.fixture(scope="module")
def litellm() -> Any:
    # It would otherwise fetch a list of prices from elsewhere.
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import litellm  # pyright: ignore[reportMissingImports]
    litellm.telemetry = False
    return litellm


def of_litellm(server: Running, **options: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"api_base": f"{server.base_url}/v1", "api_key": "none"}
    return {**base, "max_tokens": 8, "temperature": 0, "max_retries": 0, **options}


@needs_litellm
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", ["host", "host+sea", "host+sea:0.5"])
def test_litellm_chats_whole_streamed_and_asynchronously(
    model: str, server: Running, adapter: Path, litellm: Any
) -> None:
    given: dict[str, Any] = {"strength": 0.5} if ":" in model else {}
    alone = run(adapter if "+" in model else None, PROMPT, chat=True, **given).texts[0]
    messages = [{"role": "user", "content": PROMPT}]
    options = of_litellm(server, model=f"openai/{model}", messages=messages)
    whole = litellm.completion(**options)
    assert whole.choices[0].message.content == alone
    assert whole.usage.completion_tokens <= 8

    async def both() -> list[str]:
        first = await litellm.acompletion(**options)
        stream = await litellm.acompletion(stream=True, **options)
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return [first.choices[0].message.content, "".join(parts)]

    parts = [
        one.choices[0].delta.content or "" for one in litellm.completion(stream=True, **options)
    ]
    assert ["".join(parts), *asyncio.run(both())] == [alone] * 3


@needs_litellm
@pytest.mark.filterwarnings("ignore")
def test_litellm_completes_texts_and_reads_our_errors(
    server: Running, adapter: Path, litellm: Any
) -> None:
    name = "text-completion-openai/host+sea"
    options = of_litellm(server, model=name, prompt=PROMPT)
    alone = run(adapter, PROMPT).texts[0]
    assert litellm.text_completion(**options).choices[0].text == alone
    parts = [
        chunk.choices[0].text or "" for chunk in litellm.text_completion(stream=True, **options)
    ]
    assert "".join(parts) == alone
    with pytest.raises(litellm.NotFoundError):
        litellm.text_completion(**(options | {"model": f"{name}+ghost"}))
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.text_completion(**(options | {"temperature": 9}))
