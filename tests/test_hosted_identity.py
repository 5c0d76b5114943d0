"""Another model behind the same address and name: its answers are never those of the former."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import Endpoint, serving
from endpoint_server import home as home  # a fixture
from test_generate import HOST, PROMPTS
from test_generate import adapter as adapter  # a fixture
from test_generate import host as host  # a fixture
from test_hosted import asked
from test_hosted_refusals import WHO, Answered, Body, looked_at, options, toy

from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.config import GenerateConfig
from trimtab.generate import GenerateResult, generate
from trimtab.hosted.identity import ATTEMPTS, SAME_NATS, Said, are_alike, identified
from trimtab.hosted.opening import opened

OPTIONS: dict[str, Any] = {"api_tokenizer": HOST, "max_new_tokens": 5, "api_candidates": 3}


@pytest.fixture(scope="module")
def other() -> HFModel:
    # Untied: tied toys repeat the last token, whatever their weights.
    return open_model("tiny:llama?vocab=bpe&hidden=32&tied=0&seed=9", dtype="float32")


@pytest.fixture(params=[20, 1, 0], ids=["top 20", "top 1", "text only"])
def endpoint(request: pytest.FixtureRequest, host: HFModel) -> Iterator[Endpoint]:
    # As sure of its tokens as trained models are.
    with serving(Endpoint(host, top=request.param, sharpness=40.0, readable=True)) as found:
        yield found


def noted(endpoint: Endpoint, adapter: Path, **options: Any) -> tuple[GenerateResult, str]:
    """A run, and all that is said beside its text."""
    config = {
        "host": "openai:toy", "api_url": endpoint.url, "adapter": adapter, "prompt": PROMPTS[:1],
        "dtype": "float32", **OPTIONS, **options,
    }  # fmt: skip
    notes: list[str] = []
    result = generate(GenerateConfig.model_validate(config), on_note=notes.append)
    return result, "\n".join(notes)


def test_another_model_at_the_same_address_is_told_from_the_former(
    adapter: Path, endpoint: Endpoint, host: HFModel, other: HFModel
) -> None:
    fresh = []
    for model in (host, other):
        endpoint.model = model
        fresh.append(asked(endpoint, adapter, api_cache=False, **OPTIONS).texts)
    assert fresh[0] != fresh[1]
    endpoint.model = host
    first, said = noted(endpoint, adapter)
    assert first.texts == fresh[0] and "another model" not in said
    for model, texts, is_known in ((other, fresh[1], False), (host, fresh[0], True)):
        endpoint.model = model
        found, said = noted(endpoint, adapter)
        assert found.texts == texts
        assert "is taken for another model under the name toy" in said
        # The former's own answers are used again where it comes back.
        assert ("from the cache" in found.notes[-1]) is is_known
        endpoint.served.clear()
        again, said = noted(endpoint, adapter)
        assert again.texts == texts and "another model" not in said
        assert len(endpoint.served) == 1 and endpoint.usage.tokens < 40


def test_a_model_that_answers_nearly_alike_is_the_same(adapter: Path, endpoint: Endpoint) -> None:
    first, _ = noted(endpoint, adapter)
    endpoint.sharpness *= 1.01
    found, said = noted(endpoint, adapter)
    assert found.texts == first.texts and "another model" not in said
    assert "used 1 call" in found.notes[-1] and "from the cache" in found.notes[-1]


def test_a_budget_without_room_for_the_question_uses_no_kept_answers(
    adapter: Path, endpoint: Endpoint
) -> None:
    noted(endpoint, adapter)
    found, said = noted(endpoint, adapter, api_budget_tokens=5)
    assert found.is_cut_short and "none are used, and none of this run are kept" in said
    assert "from the cache" not in found.notes[-1]


def test_a_model_whose_texts_are_draws_is_not_asked(adapter: Path, host: HFModel) -> None:
    with serving(Endpoint(host, top=0, temperature=False)) as endpoint:
        noted(endpoint, adapter)
        endpoint.served.clear()
        found, _ = noted(endpoint, adapter)
    assert not endpoint.served and "used 0 calls" in found.notes[-1]


def test_a_refusal_of_the_question_is_looked_into(adapter: Path, endpoint: Endpoint) -> None:
    endpoint.chat = True
    noted(endpoint, adapter, chat=True)
    endpoint.completions = False
    found, said = noted(endpoint, adapter, chat=True)
    assert "is taken for another model" in said
    assert "from the cache" not in found.notes[-1]


def test_models_that_are_found_at_once_are_both_remembered() -> None:
    nats, at_once = [-0.5], [-1.5]

    def who(_path: str, body: Body) -> Answered | None:
        if body.get("prompt") != WHO:
            return None
        told = nats[-1]
        if at_once:
            # While this run waits for its answer, another one is answered by another model.
            nats.append(at_once.pop())
            names.append(name_of_the_host())
            nats.pop()
        columns = {"tokens": [" a"], "token_logprobs": [told], "top_logprobs": [{" a": told}]}
        return 200, {"choices": [{"text": " a", "logprobs": columns}]}

    def name_of_the_host() -> str | None:
        config = options(found)
        with opened(config.host, config) as model:
            return identified(model).name

    names: list[str | None] = []
    with toy(refuses=who) as found:
        looked_at(found)
        names.append(name_of_the_host())
        assert len(set(names)) == 2
        # Each answers nearly as before, and is known by the name of then.
        for told, name in zip((-1.49, -0.51), names, strict=True):
            nats.append(told)
            assert name_of_the_host() == name


def test_answers_are_alike_up_to_a_services_arithmetic() -> None:
    shown = {" the": -0.5, " a": -1.5, " its": -3.0, " her": -4.0}
    said = Said(asked="q", text=" the", places=((" the", shown),))

    def changed(**nats: float) -> Said:
        places = ((" the", {**shown, **{f" {name}": value for name, value in nats.items()}}),)
        return said.model_copy(update={"places": places})

    assert are_alike(said, changed(the=-0.55, a=-1.45, her=-4.5))
    assert not are_alike(said, changed(the=-0.5 - 2 * SAME_NATS))
    assert not are_alike(said, said.model_copy(update={"asked": "other"}))
    fewer = said.model_copy(update={"places": ((" the", {" the": -0.5, " a": -1.5}),)})
    assert are_alike(said, fewer) and are_alike(fewer, said)
    elsewhere = {f"{name}!": logprob for name, logprob in shown.items()}
    assert not are_alike(said, said.model_copy(update={"places": ((" the", elsewhere),)}))
    # After another token nothing is the same question any more.
    one, two = ({" x": -0.1}, {" y": -0.1})
    longer = said.model_copy(update={"places": ((" the", shown), (" x", one))})
    turned = said.model_copy(update={"places": ((" a", shown), (" y", two))})
    assert are_alike(longer, turned)
    text = Said(asked="q", text=" the")
    assert are_alike(said, text) and not are_alike(text, text.model_copy(update={"text": " a"}))
    assert ATTEMPTS > 1
