"""Calls of an API against a real HTTP server that answers as it is told."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import Quiet, listening
from endpoint_server import home as home  # a fixture

from trimtab.config import GenerateConfig, ProbeConfig
from trimtab.errors import InputError, ModelError
from trimtab.hosted.address import Address
from trimtab.hosted.answers import (
    Answer,
    Answers,
    BrokenAnswer,
    bytes_of,
    is_end,
    read_answers,
    read_messages,
    usage_of,
)
from trimtab.hosted.client import PATIENCE_SEC, Client, Manners
from trimtab.hosted.failures import retry_after_sec
from trimtab.hosted.ledger import Ledger, Price, Usage

TEXT = {
    "choices": [{"text": " turns", "finish_reason": "length"}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 2},
}
Script = list[tuple[int, dict[str, str], bytes]]


@pytest.fixture
def served() -> Iterator[tuple[str, Script]]:
    """An address, and what it answers, one a request."""
    script: Script = []

    class Handler(Quiet):
        def do_GET(self) -> None:
            status, headers, content = script.pop(0)
            self.send_response(status)
            for name, value in ({"content-length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    with listening(Handler) as url:
        yield url, script


def good(value: Any = TEXT) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, json.dumps(value).encode()


def bad(status: int, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    return status, headers or {}, b'{"error": {"message": "not now"}}'


def read(raw: Any) -> Answers:
    return read_answers(raw, logprobs=False)


class Called:
    """A client with a clock of its own, which waiting moves on."""

    def __init__(self, url: str, budget: int | None = None, **manners: Any) -> None:
        self.now, self.waits = 0.0, []
        self.ledger = Ledger(budget)
        self.client = Client(
            Address("openai", url, "toy"),
            Manners(**manners),
            self.ledger,
            clock=lambda: self.now,
            sleep=self.sleep,
        )

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    def ask(self, prompt: str = "The keel", **options: Any) -> Answers:
        return self.client.ask("/completions", {"prompt": prompt}, read, **options)


@pytest.fixture
def called(served: tuple[str, Script]) -> Iterator[Called]:
    found = Called(served[0])
    yield found
    found.client.close()


def test_failures_that_pass_are_waited_for(called: Called, served: tuple[str, Script]) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    served[1].extend(
        [
            bad(429, {"retry-after": "12.5"}),
            bad(503, {"retry-after": later}),
            bad(500),
            (200, {}, json.dumps(TEXT).encode()[:-9]),
            (200, {"content-length": "500"}, b"{"),
            good({"choices": [], "usage": None}),
            good(),
        ]
    )
    assert called.ask().choices[0].text == " turns"
    assert called.waits[0] == 12.5
    assert 90 < called.waits[1] <= 100
    # Growing pauses, each of them cut by chance to no less than half.
    bounds = [(0.5 * 2**n / 2, 0.5 * 2**n) for n in (2, 3, 4, 5)]
    for wait, (low, high) in zip(called.waits[2:], bounds, strict=True):
        assert low <= wait <= high
    assert (called.ledger.calls, called.ledger.failures) == (1, 6)
    assert called.ledger.usage == Usage(7, 2)


def test_an_answer_that_makes_no_sense_is_asked_for_again(
    called: Called, served: tuple[str, Script]
) -> None:
    served[1].extend([good({"usage": 3}), good({"choices": 4}), good({"choices": [3]}), good()])
    assert called.ask().choices[0].text == " turns"
    assert (called.ledger.calls, called.ledger.failures) == (1, 3)
    assert called.ledger.usage == Usage(7, 2)


@pytest.mark.parametrize("prompt", [None, "many", -3, [7]])
def test_counts_that_make_no_sense_do_not_spoil_an_answer(
    prompt: Any, called: Called, served: tuple[str, Script]
) -> None:
    served[1].append(good({**TEXT, "usage": {"prompt_tokens": prompt, "completion_tokens": 2}}))
    assert called.ask(estimate=Usage(5, 1)).choices[0].text == " turns"
    assert (called.ledger.calls, called.ledger.uncounted_calls) == (1, 1)
    assert called.ledger.usage == Usage(5, 1)


def test_an_answer_that_cannot_be_kept_is_used_all_the_same(
    called: Called, served: tuple[str, Script], home: Path
) -> None:
    odd = json.dumps(TEXT)[:-1] + ', "x": 1e999}'
    served[1].append((200, {}, odd.encode()))
    assert called.ask().choices[0].text == " turns"
    assert (called.ledger.calls, called.ledger.failures, called.waits) == (1, 0, [])
    assert not list(home.rglob("*.json"))


@pytest.mark.parametrize("asked", ["0", "nan", "-1", "Mon, 01 Jan 2001 00:00:00 GMT"])
def test_no_wait_that_is_asked_for_is_shorter_than_ours(
    asked: str, called: Called, served: tuple[str, Script]
) -> None:
    served[1].extend([bad(429, {"retry-after": asked})] * 3 + [good()])
    called.ask()
    for number, wait in enumerate(called.waits):
        assert 0.5 * 2**number / 2 <= wait <= 0.5 * 2**number


@pytest.mark.parametrize(
    "asked", ["Mon, 01 Jan 99999999999 00:00:00 GMT", "Fri, 31 Dec 9999 23:59:59", "soon", ""]
)
def test_a_date_that_no_clock_shows_asks_for_nothing(asked: str) -> None:
    wait_sec = retry_after_sec(asked)
    assert wait_sec is None or wait_sec > PATIENCE_SEC


KEY = "sk-canary+6d1f/0b7e"


@pytest.mark.parametrize("is_escaped", [False, True])
def test_a_key_that_an_answer_repeats_is_taken_out(
    is_escaped: bool, served: tuple[str, Script], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_API_KEY", KEY)
    told = KEY
    if is_escaped:
        told = KEY.replace("-", r"\u002d").replace("+", r"\u002B").replace("/", r"\/")
    text = '{"choices": [{"text": " turns"}], "usage": {"prompt_tokens": "Bearer KEY"}, "KEY": 1}'
    broken = (
        '{"choices": [{"text": "a", "logprobs": {"content": [{"token": "a", "logprob": "KEY"}]}}]}'
    )
    called = Called(served[0], attempts=2)
    served[1].append((200, {}, text.replace("KEY", told).encode()))
    assert called.ask().choices[0].text == " turns"
    served[1].extend([(200, {}, broken.replace("KEY", told).encode())] * 2)
    with pytest.raises(ModelError) as error:
        called.client.ask("/completions", {}, lambda raw: read_answers(raw, logprobs=True))
    assert "[key]" in error.value.message and "canary" not in error.value.message
    [kept] = [path.read_text() for path in home.rglob("*.json")]
    assert "[key]" in kept and "canary" not in kept
    called.client.close()


def test_a_placeholder_of_a_key_changes_no_answer(
    served: tuple[str, Script], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_API_KEY", "text")
    called = Called(served[0])
    served[1].append(good())
    assert called.ask().choices[0].text == " turns"
    called.client.close()


@pytest.mark.parametrize("rest", [{}, {"choices": None}, {"choices": []}])
def test_an_error_in_an_answers_place_says_what_it_is(
    rest: dict[str, Any], served: tuple[str, Script]
) -> None:
    called = Called(served[0], attempts=2)
    served[1].extend([good({"error": {"message": "the provider is\nfull"}, **rest})] * 2)
    with pytest.raises(ModelError, match=r"has failed 2 times: .*the provider is full"):
        called.ask()
    served[1].extend([good({"type": "error", "error": {"message": "overloaded"}})] * 2)
    with pytest.raises(ModelError, match="overloaded"):
        called.client.ask("/messages", {}, read_messages)
    called.client.close()


def test_what_does_not_pass_is_an_error_at_once(called: Called, served: tuple[str, Script]) -> None:
    for status in (400, 401, 404, 422):
        served[1].append(bad(status))
        with pytest.raises(ModelError, match=f"refuses with status {status}: not now"):
            called.ask()
    served[1].append((429, {}, b'{"error": {"code": "insufficient_quota", "message": "pay"}}'))
    with pytest.raises(ModelError, match="pay"):
        called.ask()
    served[1].append(bad(429, {"retry-after": "86400"}))
    with pytest.raises(ModelError, match="wait 86400 s"):
        called.ask()
    served[1].append((302, {"location": "http://127.0.0.1:9/"}, b""))
    with pytest.raises(ModelError, match="status 302"):
        called.ask()
    assert called.waits == []
    assert called.ledger.calls == 0


def test_patience_ends(served: tuple[str, Script]) -> None:
    called = Called(served[0], attempts=3)
    served[1].extend([bad(500)] * 3)
    with pytest.raises(ModelError, match="has failed 3 times: status 500: not now"):
        called.ask()
    assert len(called.waits) == 2
    called.client.close()


def test_an_answer_is_paid_once(called: Called, served: tuple[str, Script], home: Path) -> None:
    served[1].extend([good(), good({**TEXT, "usage": None})])
    assert called.ask() == called.ask()
    called.ask(ordinal=1, estimate=Usage(5, 1))
    ledger = called.ledger
    assert (ledger.calls, ledger.kept_calls, ledger.uncounted_calls) == (2, 1, 1)
    # What was damaged is asked for again.
    for path in home.rglob("*.json"):
        path.write_text("{")
    served[1].append(good())
    called.ask()
    assert called.ledger.calls == 3
    assert called.ledger.summary(Price(1.0, 10.0)) == (
        "3 calls, 19 prompt and 5 completion tokens; $0.0001; 1 answer from the cache;"
        " 1 call with estimated tokens, which the API did not count"
    )


def test_requests_keep_their_pace(served: tuple[str, Script]) -> None:
    called = Called(served[0], requests_per_min=30, cache=False)
    served[1].extend([good()] * 3)
    for _ in range(3):
        called.ask()
    assert called.waits == [2.0, 2.0]
    called.client.close()


def test_a_budget_is_a_bound() -> None:
    ledger = Ledger(10)
    assert ledger.allows(Usage(8, 2)) and not ledger.allows(Usage(8, 3))
    ledger.book(Usage(4, 1))
    assert ledger.allows(Usage(4, 1)) and not ledger.allows(Usage(5, 1))


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel"])
def test_a_broken_key_is_refused_without_being_shown(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_API_KEY", key)
    with pytest.raises(InputError) as error:
        Called("http://127.0.0.1:9/v1")
    assert key not in str(error.value)


@pytest.mark.parametrize("url", ["http://u:hunter2@h/v1", "https://h/v1?key=hunter2", "hunter2"])
def test_an_address_with_a_secret_is_refused_without_being_shown(url: str) -> None:
    refused = [(GenerateConfig, {"host": "openai:m", "prompt": ("a",), "api_url": url})]
    refused += [(ProbeConfig, {"host": url})] if url.startswith("http") else []
    for kind, values in refused:
        with pytest.raises(ValueError, match="address") as error:
            kind.model_validate(values)
        assert "hunter2" not in str(error.value)


def test_tokens_by_their_names() -> None:
    assert bytes_of(" keel") == b" keel"
    assert bytes_of("bytes:\\xe2\\x82") == b"\xe2\x82"
    assert bytes_of("bytes:a\\xc3") == b"a\xc3"
    assert bytes_of("<|im_end|>") is bytes_of("</s>") is bytes_of("\ufffd") is None
    # A text that begins like that spelling, and is none.
    assert bytes_of("bytes:") == b"bytes:" and bytes_of("bytes: x") == b"bytes: x"


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("<｜end▁of▁sentence｜>", True),
        ("<｜User｜>", False),
        ("[EOS]", True),
        ("<seed:eos>", True),
        ("<turn|>", True),
        ("<|turn>", False),
        ("<|im_end|>", True),
    ],
)
def test_names_of_tokens_without_text(name: str, ends: bool) -> None:
    assert bytes_of(name) is None and is_end(name) is ends


@pytest.mark.parametrize("name", ["<|>", "|>", "<|", "[x]", "<a|b>", "seed:eos"])
def test_names_that_are_text(name: str) -> None:
    assert bytes_of(name) == name.encode()


def ended(text: str, names: list[str], reason: str = "stop") -> Answer:
    top = {names[-1]: -0.1, "other": -3.0}
    logprobs = {
        "tokens": names,
        "token_logprobs": [-0.1] * len(names),
        "top_logprobs": [top] * len(names),
    }
    raw = {"choices": [{"text": text, "finish_reason": reason, "logprobs": logprobs}]}
    return read_answers(raw, logprobs=True).choices[0]


def test_an_unknown_token_that_has_ended_a_text_is_the_end() -> None:
    for text in (" turns", ""):
        *_, last = ended(text, [*([text] if text else []), "<done>"]).places
        assert last.chosen.text is None and last.chosen.is_readable
        assert [token.text for token in last.top] == [None, b"other"]
    # Its text is there, up to the white space around it, or it is none that could be told.
    for text, names, reason in (
        ("it turns", [" it", " turns"], "stop"),
        ("it", [" it"], "stop"),
        ("it", ["it", "\n"], "stop"),
        ("it \ufffd", ["it", " ", "bytes:\\xe2"], "stop"),
        ("it", ["it", "<done>"], "length"),
    ):
        assert ended(text, names, reason).places[-1].chosen.text is not None


def test_both_forms_of_logprobs_are_one() -> None:
    legacy = {
        "tokens": ["a", " €", "<eos>"],
        "token_logprobs": [None, -0.5, -1.0],
        "top_logprobs": [None, {" €": -0.5, "bytes:\\xe2": -2.0}, {"<eos>": -1.0, "\ufffd": -3.0}],
    }
    told = [
        {"token": "a", "logprob": 0.0, "bytes": [97], "top_logprobs": []},
        {
            "token": " €",
            "logprob": -0.5,
            "bytes": list(" €".encode()),
            "top_logprobs": [
                {"token": " €", "logprob": -0.5, "bytes": list(" €".encode())},
                {"token": "\ufffd", "logprob": -2.0, "bytes": [226]},
            ],
        },
        {
            "token": "<eos>",
            "logprob": -1.0,
            "bytes": [60, 101, 111, 115, 62],
            "top_logprobs": [{"token": "<eos>", "logprob": -1.0, "bytes": None}],
        },
    ]
    answers = []
    for logprobs in (legacy, {"content": told}):
        raw = {"choices": [{"text": "a €", "finish_reason": "stop", "logprobs": logprobs}]}
        answers.append(read_answers(raw, logprobs=True).choices[0])
    shown = [[], [" €".encode(), b"\xe2"], [None]]
    for one in answers:
        assert [place.chosen.text for place in one.places] == [b"a", " €".encode(), None]
        assert [[token.text for token in place.top] for place in one.places] == shown
        assert one.ended


@pytest.mark.parametrize(("chosen", "shown"), [("c", ["a", "b"]), ("a", ["a", "b", "c"])])
def test_a_chosen_token_beside_the_top_is_no_part_of_it(chosen: str, shown: list[str]) -> None:
    top = {"a": -0.5, "b": -1.0, "c": -3.0}
    logprobs = {"tokens": [chosen], "token_logprobs": [top[chosen]], "top_logprobs": [top]}
    raw = {"choices": [{"text": chosen, "logprobs": logprobs}]}
    for asked, names in ((2, shown), (3, [*top]), (None, [*top])):
        (place,) = read_answers(raw, logprobs=True, top=asked).choices[0].places
        assert (place.chosen.name, [token.name for token in place.top]) == (chosen, names)


@pytest.mark.parametrize(
    "choice", [{}, {"text": "a"}, {"text": "a", "logprobs": {"tokens": ["a"]}}]
)
def test_missing_parts_are_a_broken_answer(choice: dict[str, Any]) -> None:
    with pytest.raises(BrokenAnswer):
        read_answers({"choices": [choice]}, logprobs=True)


def test_a_chat_may_show_nothing_of_an_answer_without_text() -> None:
    choice = {"message": {"content": None}, "logprobs": {"content": None}, "finish_reason": "stop"}
    (found,) = read_answers({"choices": [choice]}, logprobs=True, top=5).choices
    assert (found.text, found.places, found.ended) == ("", (), True)
    with pytest.raises(BrokenAnswer, match="the answer lacks its logprobs"):
        read_answers({"choices": [{**choice, "message": {"content": "a"}}]}, logprobs=True)


@pytest.mark.parametrize(
    "raw", [{"choices": None}, {"choices": [{"message": None}]}, {"choices": 4}]
)
def test_what_is_of_another_kind_is_not_said_to_be_lacking(raw: dict[str, Any]) -> None:
    with pytest.raises(BrokenAnswer) as error:
        read_answers(raw, logprobs=False)
    assert "lacks" not in str(error.value)


def test_messages_are_read() -> None:
    raw = {
        "content": [
            {"type": "text", "text": "a"},
            {"type": "other"},
            {"type": "text", "text": "b"},
        ],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 3, "output_tokens": 2},
    }
    found = read_messages(raw)
    assert found.choices[0].text == "ab" and found.choices[0].ended
    assert usage_of(raw) == Usage(3, 2)
    with pytest.raises(BrokenAnswer):
        read_messages({"content": None})
