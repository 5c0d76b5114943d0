"""APIs that refuse, fail or leave out parts of what they are asked, each a real HTTP server."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import Quiet, listening
from endpoint_server import home as home  # a fixture

from trimtab.cli import main
from trimtab.config import GenerateConfig, ProbeConfig
from trimtab.errors import InputError, ModelError, TrimtabError
from trimtab.generate import GenerateResult, generate
from trimtab.hosted.address import SERVICES, Address, missing_key
from trimtab.hosted.answers import BrokenAnswer, read_answers, read_messages, usage_of
from trimtab.hosted.capabilities import Capabilities
from trimtab.hosted.failures import target_of
from trimtab.hosted.ledger import Usage
from trimtab.hosted.level import check_sampling, own_draws
from trimtab.hosted.opening import opened
from trimtab.hosted.requests import Prefix, Wanted, messages
from trimtab.probe import probe

Body = Mapping[str, Any]
Answered = tuple[int, Any]
WHO = "The rudder turns"
USAGE = {"prompt_tokens": 5, "completion_tokens": 1, "input_tokens": 5, "output_tokens": 1}


@dataclass
class Toy:
    """An API without a model.

    Attributes:
        refuses: What it says of a request instead of answering it; None answers it.
        logprobs: It shows these.
        usage: What it says that an answer took.
        seen: Every request's path and body.
        wait_sec: It asks to wait so long where it is busy.
    """

    refuses: Callable[[str, Body], Answered | None] = lambda _path, _body: None
    logprobs: bool = True
    usage: Mapping[str, int] | None = field(default_factory=lambda: dict(USAGE))
    seen: list[tuple[str, Body]] = field(default_factory=list)
    wait_sec: str = ""
    url: str = ""

    def answer(self, path: str, body: Body) -> Answered:
        if (refusal := self.refuses(path, body)) is not None:
            status, said = refusal
            return status, {"error": {"message": said}} if isinstance(said, str) else said
        # The same each time where it is asked who answers.
        number = "who" if body.get("prompt") == WHO else len(self.seen)
        texts = [f" {number}.{index}" for index in range(body.get("n", 1))]
        if path == "/v1/messages":
            parts = [{"type": "text", "text": texts[0]}]
            return 200, {"content": parts, "stop_reason": "max_tokens", "usage": self.usage}
        choices = [self.choice(path, body, text) for text in texts]
        return 200, {"choices": choices, "usage": self.usage}

    def choice(self, path: str, body: Body, text: str) -> dict[str, Any]:
        is_shown = self.logprobs and body.get("logprobs")
        if path == "/v1/completions":
            shown = {"tokens": [text], "token_logprobs": [-0.5], "top_logprobs": [{text: -0.5}]}
            return {"text": text, "logprobs": shown if is_shown else None}
        token = {"token": text, "logprob": -0.5}
        content = [{**token, "top_logprobs": [token]}]
        logprobs = {"content": content} if is_shown else None
        return {"message": {"content": text}, "logprobs": logprobs}


@contextmanager
def toy(kind: type[Toy] = Toy, **values: Any) -> Iterator[Toy]:
    found = kind(**values)

    class Handler(Quiet):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            found.seen.append((self.path, body))
            status, value = found.answer(self.path, body)
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            if found.wait_sec and status != 200:
                self.send_header("retry-after", found.wait_sec)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    with listening(Handler) as found.url:
        yield found


def options(found: Toy, **values: Any) -> GenerateConfig:
    config = {"host": "openai:toy", "api_url": found.url, "prompt": ("The keel",)}
    return GenerateConfig.model_validate(
        {**config, "api_attempts": 2, "api_cache": False, **values}
    )


def looked_at(found: Toy, **values: Any) -> Capabilities:
    config = options(found, **values)
    with opened(config.host, config) as model:
        return model.by


def asked(found: Toy, notes: list[str] | None = None, **values: Any) -> GenerateResult:
    on_note = None if notes is None else notes.append
    return generate(options(found, **values), on_note=on_note)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No client waits."""
    monkeypatch.setattr("trimtab.hosted.client.SLEEP", lambda _sec: None)


def no_completions(path: str, body: Body) -> Answered | None:
    return (404, "this is a chat model") if path == "/v1/completions" else None


def thinks(path: str, body: Body) -> Answered | None:
    """As services answer for models that think first."""
    if path == "/v1/completions":
        return 404, "this is a chat model"
    if "max_tokens" in body:
        return 400, "'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
    if {"temperature", "top_p"} & body.keys():
        return 400, "Unsupported value: 'temperature' does not support 0 with this model."
    if body["max_completion_tokens"] < 100:
        return 400, "max_tokens or model output limit was reached. Try again with higher max_tokens"
    if "logprobs" in body:
        return 403, "You are not allowed to request logprobs from this model"
    return (400, "n must be 1") if body.get("n", 1) > 1 else None


def test_a_model_that_thinks_first_is_opened_and_asked_as_it_wants() -> None:
    with toy(refuses=thinks) as found:
        by = looked_at(found)
        assert (by.chat, by.top_chat, by.several) == (True, 0, False)
        assert not by.takes_temperature and by.shortest_tokens == 128
        assert by.length_name == "max_completion_tokens"
        found.seen.clear()
        notes = asked(found, chat=True, max_new_tokens=200).notes
        [(_, body)] = found.seen
        assert body.keys() == {"model", "messages", "max_completion_tokens"}
        assert "its own apply, and the text is a draw" in notes[1]
        assert len(asked(found, chat=True, max_new_tokens=200, temperature=1.0).notes) == 4
        with pytest.raises(InputError, match="no bound below 128 tokens") as error:
            asked(found, chat=True, max_new_tokens=100)
        assert error.value.hint == "use --max-new-tokens 128 or more"


def test_a_longer_look_keeps_to_the_budget() -> None:
    with toy(refuses=thinks) as found:
        found.usage = {"prompt_tokens": 600, "completion_tokens": 0}
        with pytest.raises(InputError, match="with answers of 128 tokens"):
            looked_at(found, api_budget_tokens=700)
        answered = [body for path, body in found.seen if thinks(path, body) is None]
        assert len(answered) == 1


def test_an_api_may_refuse_a_temperature_in_any_dialect() -> None:
    def refuses(path: str, body: Body) -> Answered | None:
        return (
            (400, "`temperature` is deprecated for this model.") if "temperature" in body else None
        )

    with toy(refuses=refuses) as found:
        assert not looked_at(found, host="anthropic:toy").takes_temperature
        by = looked_at(found)
        assert by.completions and by.chat and by.echo is False
        assert by.top_completions == 1 and by.several and not by.takes_temperature
        for host in ("openai:toy", "anthropic:toy"):
            found.seen.clear()
            asked(found, host=host, chat=True, temperature=0.5, top_p=0.5)
            [(_, body)] = found.seen
            assert not {"temperature", "top_p"} & body.keys()


def test_a_prompt_is_not_read_where_longer_answers_come_with_it() -> None:
    class Echoing(Toy):
        def choice(self, path: str, body: Body, text: str) -> dict[str, Any]:
            if path != "/v1/completions" or not body.get("echo"):
                return super().choice(path, body, text)
            tokens = [body["prompt"][:3], body["prompt"][3:], text]
            tops = [None, *({token: -0.5} for token in tokens[1:])]
            shown = {"tokens": tokens, "token_logprobs": [None, -0.5, -0.5], "top_logprobs": tops}
            return {"text": "".join(tokens), "logprobs": shown}

    def refuses(path: str, body: Body) -> Answered | None:
        is_short = path == "/v1/chat/completions" and body["max_tokens"] < 16
        return (400, "max_tokens: must be greater than or equal to 16") if is_short else None

    with toy(Echoing) as found:
        assert looked_at(found).echo
    with toy(Echoing, refuses=refuses) as found:
        by = looked_at(found)
        assert by.completions and by.chat and by.shortest_tokens == 16 and not by.echo


def test_what_was_kept_without_a_temperature_is_still_read() -> None:
    by = Capabilities(dialect="openai", completions=True, several=True)
    kept = by.model_dump(exclude={"takes_temperature", "shortest_tokens"})
    assert Capabilities.model_validate(kept) == by
    assert by.takes_temperature and by.shortest_tokens == 1


def test_anthropics_messages_get_one_of_temperature_and_top_p() -> None:
    by = Capabilities(dialect="anthropic", chat=True)
    prefix = Prefix("", "Tell me.")
    for temperature, top_p, sent in (
        (0.0, 1.0, {"temperature": 0.0}),
        (0.7, 1.0, {"temperature": 0.7}),
        (0.0, 0.5, {"temperature": 0.0}),
        (1.0, 0.5, {"top_p": 0.5}),
    ):
        body = messages("toy", prefix, Wanted(3, temperature=temperature, top_p=top_p), by)
        common = {"model", "messages", "max_tokens"}
        assert {name: body[name] for name in body.keys() - common} == sent
        config = GenerateConfig.model_validate(
            {"host": "anthropic:toy", "prompt": ("a",), "temperature": temperature, "top_p": top_p}
        )
        check_sampling(config, by, "alone")
        assert own_draws(config, by, "alone") == []
    config = config.model_copy(update={"temperature": 0.7})
    with pytest.raises(InputError, match="either a temperature or --top-p"):
        check_sampling(config, by, "alone")


@pytest.mark.parametrize("wait_sec", ["", "86400"])
def test_what_passes_is_not_kept_as_a_lack(wait_sec: str, home: Path) -> None:
    def refuses(path: str, body: Body) -> Answered | None:
        if "logprobs" not in body:
            return None
        return 429, {"error": {"message": "pay", "code": "" if wait_sec else "insufficient_quota"}}

    with toy(refuses=refuses, wait_sec=wait_sec) as found:
        notes: list[str] = []
        with pytest.raises(ModelError, match="refuses with status 429"):
            asked(found, notes)
        assert not list(home.rglob("*.json"))
        assert notes == ["used 1 call, 5 prompt and 1 completion tokens"]
        found.refuses = lambda _path, _body: None
        assert looked_at(found).top_completions == 1


def test_what_breaks_at_one_question_is_a_lack() -> None:
    def refuses(path: str, body: Body) -> Answered | None:
        return (500, "oh") if path == "/v1/chat/completions" or "logit_bias" in body else None

    with toy(refuses=refuses) as found:
        by = looked_at(found)
        assert by.top_completions == 1 and by.logit_bias == "none" and not by.chat


@pytest.mark.parametrize(
    ("refused", "said"),
    [((404, "no such path"), "500: texts are down"), ((503, "so is it"), "503: so is it")],
)
def test_what_breaks_at_plain_texts_may_still_have_a_chat(refused: Answered, said: str) -> None:
    def breaks(path: str, body: Body) -> Answered | None:
        return (500, "texts are down") if path == "/v1/completions" else None

    with toy(refuses=breaks) as found:
        by = looked_at(found)
        assert by.chat and by.top_chat == 1 and not by.completions
    with toy(refuses=lambda path, body: breaks(path, body) or refused) as found:
        with pytest.raises(ModelError, match=f"has failed 2 times: status {said}"):
            looked_at(found)
        assert {path for path, _ in found.seen} == {"/v1/completions", "/v1/chat/completions"}


def test_what_cannot_be_reached_is_asked_one_question_alone() -> None:
    notes: list[str] = []
    with toy() as gone:
        pass
    with pytest.raises(ModelError, match="has failed 2 times: the connection failed"):
        asked(gone, notes)
    assert len(notes) == 1


def test_what_breaks_at_every_question_ends_the_look(home: Path) -> None:
    with toy() as found:
        # It answers once and then no more.
        found.refuses = lambda _path, _body: (503, "down") if len(found.seen) > 1 else None
        with pytest.raises(ModelError, match="has failed 2 times: status 503: down"):
            looked_at(found)
        assert not list(home.rglob("*.json"))


def test_a_budget_holds_where_nothing_is_counted() -> None:
    with toy(usage=None, logprobs=False) as found:
        looked_at(found)
        found.seen.clear()
        prompts = tuple(f"The keel {number}" for number in range(9))
        done = asked(found, prompt=prompts, max_new_tokens=20, api_budget_tokens=70)
        assert done.is_cut_short
        # A token is taken for one byte.
        assert len(found.seen) == 2
        assert "2 calls with estimated tokens, which the API did not count" in done.notes[-2]
        assert "used 2 calls, 24 prompt and 40 completion tokens" in done.notes[-2]


def test_a_bill_is_told_whatever_ends_a_run() -> None:
    with toy() as found:
        looked_at(found)
        begun = len(found.seen)
        for ends, kind in (((400, "no"), ModelError), (None, KeyboardInterrupt)):
            notes: list[str] = []

            def refuses(path: str, body: Body, ends: Answered | None = ends) -> Answered | None:
                return ends if body["prompt"].endswith("1") else None

            def advance(index: int, text: str) -> None:
                raise KeyboardInterrupt

            found.refuses = refuses
            config = options(found, prompt=("The keel 0", "The keel 1"), api_cache=False)
            with pytest.raises(kind):
                generate(config, on_text=advance if ends is None else None, on_note=notes.append)
            assert notes[-1] == "used 1 call, 5 prompt and 1 completion tokens"
        assert len(found.seen) == begun + 3


def test_other_seeds_and_equal_prompts_have_answers_of_their_own() -> None:
    with toy() as found:
        drawn: dict[str, Any] = {"temperature": 1.0, "api_cache": True}
        drawn["prompt"] = ("The keel",) * 3
        first = asked(found, **drawn).texts
        assert len(set(first)) == 3
        assert asked(found, **drawn).texts == first
        other = asked(found, **drawn, seed=1).texts
        assert not set(other) & set(first)
        # Without draws the same is asked once.
        assert len({*asked(found, prompt=("The keel",) * 3, api_cache=True).texts}) == 1


def test_an_answer_without_its_logprobs_is_booked_in_a_look() -> None:
    with toy(logprobs=False) as found:
        config = options(found)
        with opened(config.host, config) as model:
            ledger = model.client.ledger
            assert model.by.top_completions == 0
        assert (ledger.calls, ledger.failures) == (len(found.seen), 0)
        assert ledger.usage == Usage(5 * len(found.seen), len(found.seen))


def test_logprobs_that_are_gone_have_a_hint_of_their_own() -> None:
    with toy() as found:
        config = options(found)
        with opened(config.host, config) as model:
            found.logprobs = False
            with pytest.raises(ModelError, match="the answer lacks its logprobs") as error:
                model.go_on(Prefix("The keel"), Wanted(1, 1))
            assert "look again with `trimtab hosts probe`" in error.value.hint


def test_attempts_that_are_counted_keep_to_the_budget() -> None:
    with toy() as found:
        looked_at(found)
        found.logprobs = False
        found.seen.clear()
        config = options(found, api_budget_tokens=9, api_attempts=5)
        with opened(config.host, config) as model, pytest.raises(ModelError, match="the budget"):
            model.go_on(Prefix("The keel"), Wanted(1, 1))
        assert len(found.seen) == 1


@pytest.mark.parametrize("top", [None, {}])
@pytest.mark.parametrize("is_chat", [True, False])
def test_a_place_without_likeliest_tokens_is_broken(top: Any, is_chat: bool) -> None:
    if is_chat:
        token = {"token": "a", "logprob": -1.0}
        shown = {"content": [{**token, "top_logprobs": [token]}, {**token, "top_logprobs": top}]}
    else:
        columns = {"tokens": ["a", "b"], "token_logprobs": [None, -1.0]}
        shown = {**columns, "top_logprobs": [None, top]}
    choice = {"text": "ab", "logprobs": shown, "finish_reason": "length"}
    with pytest.raises(BrokenAnswer, match="lacks the logprobs of a token"):
        read_answers({"choices": [choice]}, logprobs=True, top=1, echo=not is_chat)
    assert read_answers({"choices": [choice]}, logprobs=True)


def test_of_a_prompt_nothing_need_be_shown() -> None:
    columns = {"tokens": ["a", "b"], "token_logprobs": [None, -1.0]}
    shown = {**columns, "top_logprobs": [None, {"b": -1.0}]}
    choice = {"text": "ab", "logprobs": shown, "finish_reason": "length"}
    assert read_answers({"choices": [choice]}, logprobs=True, top=1, echo=True)
    with pytest.raises(BrokenAnswer):
        read_answers({"choices": [choice]}, logprobs=True, top=1)


ODD = {
    "parts": '{"choices": [{"message": {"content": [{"text": "a"}]}}]}',
    "half a character": r'{"choices": [{"text": "\ud800"}]}',
    "nested": "[" * 200_000,
    "nested less": '{"choices": [{"text": "a"}], "x": ' + "[" * 2000 + "]" * 2000 + "}",
    "an error": '{"error": {"message": "the provider is full"}}',
}
UNUSUAL = {
    "half a character elsewhere": r'{"choices": [{"text": "a"}], "id": "\udc00"}',
    "an infinite count": '{"choices": [{"text": "a"}], "usage": {"prompt_tokens": 1e999}}',
    "less than nothing": '{"choices": [{"text": "a"}], "usage": {"prompt_tokens": -3}}',
    "an infinite number elsewhere": '{"choices": [{"text": "a"}], "created": 1e999}',
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_odd_answers_are_asked_for_again(odd: str) -> None:
    with toy() as found:
        looked_at(found, api_cache=True)
        notes: list[str] = []
        # After the question who answers.
        count = len(found.seen) + 1
        found.refuses = lambda _path, _body: (
            (200, odd.encode()) if len(found.seen) == count + 1 else None
        )
        text = asked(found, notes, api_cache=True).texts[0]
        assert text == f" {count + 2}.0"
        assert any("trying again" in note for note in notes)
        # A refusal is as odd, and its words are printed.
        found.refuses = lambda _path, _body: (400, odd.encode())
        with pytest.raises(ModelError, match="status 400") as error:
            asked(found, prompt=("Another",))
        assert error.value.message.encode()


@pytest.mark.parametrize("unusual", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_answers_are_taken_as_they_come(unusual: str) -> None:
    with toy() as found:
        looked_at(found, api_cache=True)
        found.refuses = lambda _path, body: (
            None if body["prompt"] == WHO else (200, unusual.encode())
        )
        notes: list[str] = []
        assert asked(found, notes, api_cache=True).texts == ("a",)
        assert not any("trying again" in note for note in notes)
        # As a refusal, its words are printed.
        found.refuses = lambda _path, _body: (400, unusual.encode())
        with pytest.raises(ModelError, match="status 400") as error:
            asked(found, prompt=("Another",))
        assert error.value.message.encode()


def test_odd_answers_are_broken() -> None:
    for text in (["a"], 3, "\ud800"):
        with pytest.raises(BrokenAnswer, match="the answer's text"):
            read_answers({"choices": [{"text": text}]}, logprobs=False)
        with pytest.raises(BrokenAnswer, match="the answer's text"):
            read_messages({"content": [{"type": "text", "text": text}]})
    usage = {"prompt_tokens": float("inf")}
    assert usage_of({"usage": usage}) is usage_of({"usage": 3}) is usage_of({}) is None
    assert usage_of({"usage": {"input_tokens": 3}}) == Usage(3, 0)


class _Listed(Quiet):
    """Names its models, and fails at the first request."""

    listed: Any = None
    failures: int = 1

    def do_GET(self) -> None:
        kind = type(self)
        status, kind.failures = (500, kind.failures - 1) if kind.failures else (200, 0)
        data = json.dumps({"data": kind.listed}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.mark.parametrize("listed", [3, {"id": "toy"}, None, []])
def test_what_lists_no_models_is_told_so(listed: Any) -> None:
    class Handler(_Listed):
        pass

    Handler.listed = listed
    with listening(Handler) as url, pytest.raises(TrimtabError) as error:
        probe(ProbeConfig(host=url))
    is_list = isinstance(listed, list)
    assert ("serves 0 models" if is_list else "without a list of models") in str(error.value)


class _Elsewhere(Quiet):
    """Answers what `status` and `location` say, to everything."""

    status: int = 404
    location: str = ""

    def do_GET(self) -> None:
        self.send_response(self.status)
        if self.location:
            self.send_header("location", self.location)
        self.send_header("content-length", "0")
        self.end_headers()


@pytest.mark.parametrize(
    ("ending", "model", "hint"),
    [
        ("", "", "end in their version (ROOT/v1), and that it lists its models under /models"),
        ("/v1/chat/completions", "", "leave /chat/completions off the address: ROOT/v1"),
        ("/v1/completions", "toy", "leave /completions off the address: ROOT/v1"),
        ("/v1", "toy", "check the address, and that it serves a model toy"),
    ],
)
def test_an_address_that_is_none_of_an_api_has_a_hint(ending: str, model: str, hint: str) -> None:
    with listening(_Elsewhere) as url:
        root = url.removesuffix("/v1")
        given = {"host": root + ending}
        if model:
            given = {"host": f"openai:{model}", "api_url": root + ending}
        with pytest.raises(ModelError) as error:
            probe(ProbeConfig.model_validate(given))
    assert hint.replace("ROOT", root) in error.value.hint and "?" not in error.value.hint


@pytest.mark.parametrize("given", ["http", "openai:toy"])
def test_a_redirect_says_where_it_points_without_secrets(given: str) -> None:
    class Handler(_Elsewhere):
        status, location = 302, "https://u:hunter2@127.0.0.1:9/login/v1?key=hunter2#hunter2"

    with listening(Handler) as url:
        config = {"host": url} if given == "http" else {"host": given, "api_url": url}
        with pytest.raises(ModelError) as error:
            probe(ProbeConfig.model_validate(config))
    said = str(error.value)
    assert "redirects to https://127.0.0.1:9/login/v1 (status 302), and redirects are not" in said
    assert "hunter2" not in said


def test_where_a_redirect_points() -> None:
    assert target_of("http://h:1/v1", "/login?next=a") == "http://h:1/login"
    assert target_of("http://h/v1", "there") == "http://h/v1/there"
    assert target_of("http://h/v1", "http://[") == "an address that cannot be read"


def test_a_services_own_address_is_not_asked_without_a_key_in_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = Address.of("openai:toy", None)
    assert "without a key" in missing_key(own) and "OPENAI_API_KEY" in missing_key(own)
    assert not missing_key(Address.of("openai:toy", "http://127.0.0.1:9/v1"))
    notes: list[str] = []
    with toy() as found, monkeypatch.context() as patch:
        # As if the service's own address were this server's.
        patch.setitem(SERVICES, "openai", (found.url, "OPENAI_API_KEY"))
        probe(ProbeConfig(host="openai:toy"), on_note=notes.append)
    assert len(notes) == 1 and f"{found.url} is asked without a key" in notes[0]
    monkeypatch.setenv("OPENAI_API_KEY", "sk-some")
    assert not missing_key(own)


@pytest.mark.parametrize("host", ["tiny:llama", "http://127.0.0.1:9/v1"])
def test_an_address_that_nothing_would_use_is_refused(
    host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["hosts", "probe", host, "--api-url", "http://127.0.0.1:9/v1"])
    assert end.value.code == 2
    assert "--api-url is for a host openai:MODEL or anthropic:MODEL" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["hosts", "probe", "openai:toy", "--api-price-in", "1"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "give both --api-price-in and --api-price-out, or neither" in said


def test_a_probe_tells_why_it_waits(capsys: pytest.CaptureFixture[str]) -> None:
    with toy() as found:
        found.refuses = lambda _path, _body: (500, "busy") if len(found.seen) == 1 else None
        with pytest.raises(SystemExit) as end:
            main(["hosts", "probe", "openai:toy", "--api-url", found.url])
    said = capsys.readouterr()
    assert not end.value.code and "status 500: busy; trying again in" in said.err
    assert "temperature                      yes" in said.out

    class Handler(_Listed):
        pass

    notes: list[str] = []
    with listening(Handler) as url, pytest.raises(TrimtabError):
        probe(ProbeConfig(host=url), on_note=notes.append)
    assert len(notes) == 1 and "status 500" in notes[0]
