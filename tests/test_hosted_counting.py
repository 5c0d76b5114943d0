"""What a run is said to take, its budget, and tokenizers of other models, against a real server."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import Endpoint, serving
from endpoint_server import home as home  # a fixture
from test_generate import PROMPTS
from test_generate import adapter as adapter  # a fixture

from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.config import GenerateConfig
from trimtab.errors import ModelError
from trimtab.generate import GenerateResult, generate
from trimtab.hosted.answers import Answer, Answers, Place, Token
from trimtab.hosted.counting import TEMPLATE_TOKENS, Counts, misfit
from trimtab.hosted.ledger import Usage
from trimtab.hosted.tokens import open_known

BYTES, BPE = "tiny:llama?hidden=32", "tiny:llama?vocab=bpe&hidden=32"
WARNED = "the tokenizer that --api-tokenizer names seems not to be this host's"


@pytest.fixture(scope="module")
def model() -> HFModel:
    """Each byte is a token."""
    return open_model(BYTES, dtype="float32")


@pytest.fixture
def endpoint(model: HFModel) -> Iterator[Endpoint]:
    with serving(Endpoint(model, top=20, readable=True, sharpness=40.0)) as found:
        yield found


def asked(endpoint: Endpoint, adapter: Path | None, **values: Any) -> tuple[GenerateResult, str]:
    """A run, and all that is said beside its text."""
    config = {
        "host": "openai:toy", "api_url": endpoint.url, "adapter": adapter, "prompt": PROMPTS[:1],
        "max_new_tokens": 6, "dtype": "float32", **values,
    }  # fmt: skip
    notes: list[str] = []
    return generate(GenerateConfig.model_validate(config), on_note=notes.append), "\n".join(notes)


def foretold(said: str) -> Usage:
    """What a run was said to take."""
    found = re.search(r"^at most .*$", said, re.MULTILINE)
    assert found
    counts = [
        re.search(rf"([\d,]+) {what}", found[0])
        for what in ("prompt (?:and|tokens)", "completion tokens")
    ]
    return Usage(*(int(count[1].replace(",", "")) for count in counts if count))


@pytest.mark.parametrize("level", ["top-k", "text"])
@pytest.mark.parametrize("tokenizer", [None, BYTES])
def test_a_run_takes_no_more_than_was_said(
    adapter: Path, endpoint: Endpoint, home: Path, level: str, tokenizer: str | None
) -> None:
    options: dict[str, Any] = {"api_level": level, "api_tokenizer": tokenizer}
    prices = {"api_price_in": 1.0, "api_price_out": 1.0}
    asked(endpoint, adapter, **options)
    endpoint.served.clear()
    shutil.rmtree(home / "hosted" / "answers")
    _, said = asked(endpoint, adapter, **options, **prices)
    # The first one tells who answers.
    used = sum(endpoint.served[1:], Usage())
    most = foretold(said)
    assert used.tokens and used.completion_tokens <= most.completion_tokens
    assert used.prompt_tokens <= most.prompt_tokens <= 2 * used.prompt_tokens + 100
    is_exact = " prompt and " in said.split("at most")[1].splitlines()[0]
    assert is_exact == (tokenizer is not None)
    if not is_exact:
        assert "(a token taken for 1.0 bytes, as the API counts)" in said
    assert WARNED not in said


@pytest.mark.parametrize("budget", [5, 20, 22, 100, 200, 300])
def test_no_budget_is_exceeded_whatever_the_tokens_are(
    adapter: Path, endpoint: Endpoint, budget: int
) -> None:
    asked(endpoint, adapter)
    endpoint.served.clear()
    cut, _ = asked(endpoint, adapter, prompt=PROMPTS[2:], api_budget_tokens=budget)
    assert endpoint.usage.tokens <= budget
    assert cut.is_cut_short == (budget < 300)
    assert endpoint.served or budget < 30


@pytest.mark.parametrize("tokenizer", [BYTES, BPE])
def test_another_models_tokenizer_is_told_once(
    adapter: Path, endpoint: Endpoint, tokenizer: str
) -> None:
    # As a server does that is sent numbers it has no tokens for.
    endpoint.token_prompts = tokenizer == BYTES
    _, said = asked(endpoint, adapter, api_tokenizer=tokenizer, max_new_tokens=3)
    assert said.count(WARNED) == (tokenizer == BPE)
    if tokenizer == BPE:
        assert re.search(r"it has \d+ tokens for 'The rudder turns', and the API counts 1\d", said)
        assert "prompt tokens (a token taken for" in said


def test_shown_tokens_speak_for_a_tokenizer_where_counts_do_not() -> None:
    tokens = open_known(BYTES)

    def shown(*texts: str) -> Answers:
        top = tuple(Token(text.encode(), -1.0, text) for text in texts)
        return Answers((Answer("", (Place(top[0], top),), False),))

    assert not misfit(tokens, None, shown("a", "b", "c"), chat=True)
    # Servers spell a few tokens in their own way.
    assert not misfit(tokens, None, shown("a", "ship", " keel"), chat=True)
    why = misfit(tokens, None, shown("a", "ship", " keel", " the"), chat=True)
    assert why == "it lacks 3 of 4 tokens that the API shows, such as 'ship'"
    # Around a message stands what no count of ours holds.
    told = ("The keel", 30)
    assert not misfit(tokens, told, Answers(()), chat=True)
    assert misfit(tokens, told, Answers(()), chat=False) == (
        "it has 8 tokens for 'The keel', and the API counts 30"
    )
    assert not misfit(tokens, ("The keel", 9), Answers(()), chat=False)


def test_what_an_api_has_counted_bounds_what_it_reads_next() -> None:
    counts = Counts()
    assert counts.most("keel", chat=False) >= 4 + 1
    assert counts.most("keel", chat=True) == 4 + TEMPLATE_TOKENS
    # Prompts of which nothing is counted tell nothing.
    counts.learn({"prompt": [1, 2]}, Usage(2, 1))
    counts.learn({"prompt": "keel"}, None)
    assert counts.told(chat=False) is None and counts.bytes_a_token == 3.0
    counts.learn({"prompt": "The rudder turns"}, Usage(5, 1))
    assert counts.most("The rudder turns the ship", chat=False) == 5 + len(" the ship")
    assert counts.most("Another", chat=False) <= len("Another") + 2
    assert counts.bytes_a_token == 3.0
    counts.learn({"prompt": "the ship"}, Usage(8, 1))
    assert counts.likely("the keel", chat=False) >= 8
    counts.learn({"messages": [{"role": "user", "content": "ships"}]}, Usage(105, 1))
    assert counts.most("ships are", chat=True) == 105 + len(" are")
    assert counts.most("A keel", chat=True) == 105 + len("A keel")
    assert counts.likely("ships are", chat=True) >= 105 + len(" are")


def test_without_a_small_model_the_hint_is_of_what_can_steer_an_api(
    adapter: Path, endpoint: Endpoint, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.adapter"
    shutil.copytree(adapter, copy)
    with pytest.MonkeyPatch.context() as patch:
        manifest = copy / "manifest.json"
        patch.chdir(tmp_path)
        text = manifest.read_text()
        ref = re.search(r'"base_model": \{[^}]*?"ref": "([^"]+)"', text)
        assert ref
        manifest.write_text(text.replace(f'"ref": "{ref[1]}"', '"ref": "gone"', 1))
        with pytest.raises(ModelError, match="needs the small model gone") as error:
            asked(endpoint, copy)
    assert "--small" in error.value.hint and "memory" not in error.value.hint
