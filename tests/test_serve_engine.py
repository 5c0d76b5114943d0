"""Continuous batching: every answer equals the same request alone, whatever the company."""

import gc
import math
import queue
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generate import HOST, PROMPTS, domain_text, run, tokens_read
from test_generate import adapter as adapter  # a fixture
from test_generate import host as host  # a fixture
from torch import Tensor
from transformers import DynamicCache, TopKLogitsWarper, TopPLogitsWarper

from trimtab.backends import cache_layers
from trimtab.backends.chat import prompt_ids
from trimtab.backends.hf import HFModel
from trimtab.backends.live import Live
from trimtab.backends.open import open_model
from trimtab.backends.reading import LiveReading
from trimtab.config import CarrierName, ServeConfig
from trimtab.errors import AdapterError, InputError, ModelError
from trimtab.serving import rows
from trimtab.serving.adapters import Adapters
from trimtab.serving.batch import Batch, check_host
from trimtab.serving.choose import Choosing, choose, keep_likely
from trimtab.serving.engine import Engine
from trimtab.serving.prepare import Preparer
from trimtab.serving.protocol import ChatRequest, CompletionRequest
from trimtab.serving.reading import PREFILL_TOKENS
from trimtab.serving.rows import Row, next_number
from trimtab.serving.turns import Turns
from trimtab.serving.work import (
    Busy,
    Closing,
    Done,
    Event,
    Failed,
    Job,
    Options,
    Piece,
    Prompt,
    TimeUp,
    UnknownModel,
)
from trimtab.steering.evidence import ReadPrompt
from trimtab.steering.scoring import score_document
from trimtab.steering.several import Several

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "gpt2")
GREEDY = Choosing(temperature=0.0)
WAIT_SEC = 300.0
"""Longer than anything takes: a test that waits for what does not come must end."""


def served(*adapters: str, **options: object) -> ServeConfig:
    given = {"host": HOST, "name": "host", "adapter": adapters, "dtype": "float32", "port": 0}
    return ServeConfig.model_validate(given | {"shutdown_sec": 5.0, **options})


@pytest.fixture(scope="module")
def adapters(host: HFModel, adapter: Path) -> Adapters:
    found = Adapters(served(carriers=("head", "memory", "expert")), host)
    for name in ("sea", "ship"):
        found.load(name, adapter)
    return found


@pytest.fixture
def engine(host: HFModel) -> Iterator[Engine]:
    engine = Engine(host, slots=4, queue=16)
    engine.start()
    yield engine
    engine.stop()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_sec = time.monotonic() + WAIT_SEC
    while not condition():
        assert time.monotonic() < deadline_sec
        time.sleep(0.005)


class Asked:
    """A request and the events that came."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        options: Options,
        limit_sec: float = WAIT_SEC,
        owner: str = "",
    ) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.job = Job(
            prompts,
            options,
            steered=None,
            tell=self.events.put,
            time_limit_sec=limit_sec,
            owner=owner,
        )


def asking(host: HFModel, text: str, **options: object) -> Asked:
    options = {"max_tokens": 8, "choosing": GREEDY, **options}
    return Asked([Prompt(tuple(prompt_ids(host, text)))], Options(**options))  # pyright: ignore


def collected(events: "queue.Queue[Event]", answers: int = 1) -> list[str]:
    texts = ["" for _ in range(answers)]
    while not isinstance(event := events.get(timeout=WAIT_SEC), Done):
        assert isinstance(event, Piece), event
        texts[event.choice] += event.text
    return texts


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_any_length_and_age_read_as_if_alone(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Used up between two turns in which rows join or leave.
    monkeypatch.setattr(cache_layers, "SPARE_TOKENS", 2)
    host = open_model(f"tiny:{family}?hidden=32", dtype="float32")
    if family in ("gemma2", "gemma3"):
        ids = torch.arange(200)[None]
        wide = host.hidden(ids)
        host.model.config.sliding_window = 40  # pyright: ignore[reportAttributeAccessIssue]
        assert (host.hidden(ids) - wide).abs().max() > 1e-3
    chosen = random.Random(1)
    texts: list[list[int]] = []
    batch = Batch(host)
    # By turns rows join, grow and leave; some are longer than the window.
    for turn in range(40):
        with torch.inference_mode():
            if turn % 5 == 0:
                ids = [chosen.randrange(256) for _ in range(chosen.choice((1, 7, 90, 300)))]
                cache = DynamicCache()
                for begin in range(0, len(ids), 128):
                    hidden = batch.read(cache, ids[begin : begin + 128])
                alone = host.hidden(torch.tensor([ids]))[0, -1]
                torch.testing.assert_close(hidden[-1], alone, atol=2e-5, rtol=1e-4)
                batch.join(cache, 2)
                texts += [list(ids), list(ids)]
            if turn % 7 == 6 and len(texts) > 2:
                kept = sorted(chosen.sample(range(len(texts)), len(texts) // 2))
                batch.keep(kept)
                texts = [texts[place] for place in kept]
            new = [chosen.randrange(256) for _ in texts]
            texts = [[*ids, token] for ids, token in zip(texts, new, strict=True)]
            for ids, state in zip(texts, batch.step(new), strict=True):
                alone = host.hidden(torch.tensor([ids]))[0, -1]
                torch.testing.assert_close(state, alone, atol=2e-5, rtol=1e-4)
    assert batch.lengths == [len(ids) for ids in texts]


def test_an_encoder_decoder_cannot_be_batched() -> None:
    with pytest.raises(ModelError, match="is an encoder-decoder"):
        check_host(open_model("tiny:t5", dtype="float32"))


def jobs(adapters: Adapters, bodies: Sequence[dict[str, object]]) -> list[tuple[Job, queue.Queue]]:
    preparer, found = Preparer(served(), adapters), []
    for body in bodies:
        kind = ChatRequest if "messages" in body else CompletionRequest
        events: queue.Queue[Event] = queue.Queue()
        given = {"temperature": 0, "max_tokens": 12, **body}
        found.append((preparer.job(kind.model_validate(given), events.put), events))
    return found


def live_of(job: Job) -> Live:
    """The small models that steer a job of one adapter."""
    assert job.steered is not None
    [live] = [mixture.steering.live for mixture in job.steered.several.mixtures]
    assert live is not None
    return live


def cut_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let answers in the making have a step after every piece of a prompt, and have many pieces."""
    for name, value in {
        "engine.TURN_SEC": 0.0,
        "engine.TURN_STEPS": 0,
        "reading.PIECE_TOKENS": 100,
        "reading.PIECE_PLACES": 4,
    }.items():
        monkeypatch.setattr(f"trimtab.serving.{name}", value)


@pytest.mark.parametrize("in_pieces", [False, True])
def test_answers_of_all_adapters_together_equal_generate_alone(
    host: HFModel,
    adapters: Adapters,
    adapter: Path,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    in_pieces: bool,
) -> None:
    if in_pieces:
        cut_small(monkeypatch)
    asked = []
    for number, prompt in enumerate((*PROMPTS, domain_text(9), "T", "The keel turns the mast")):
        for model, carriers in (("host", None), ("host+sea:0.8", ["head", "memory"])):
            asked.append({"model": model, "prompt": prompt, "trimtab": {"carriers": carriers}})
            asked[-1]["max_tokens"] = 6 + number
        if number < 3:
            expert = {"carriers": ["expert"]}
            asked.append({"model": "host+sea", "prompt": prompt, "trimtab": expert})
    random.Random(3).shuffle(asked)
    running = jobs(adapters, asked)
    for job, _ in running:
        engine.submit(job)
    for body, (_, events) in zip(asked, running, strict=True):
        wanted = {"max_new_tokens": body.get("max_tokens", 12), "carriers": None}
        if "+" in str(body["model"]):
            wanted["carriers"] = body["trimtab"]["carriers"]  # pyright: ignore
            wanted["strength"] = 0.8 if "0.8" in str(body["model"]) else 1.0
        steering = adapter if wanted["carriers"] else None
        alone = run(steering, str(body["prompt"]), **wanted).texts
        assert tuple(collected(events)) == alone, body
    assert engine.counts.stepped_rows > 2 * engine.counts.steps


def test_a_chat_equals_generate(adapters: Adapters, adapter: Path, engine: Engine) -> None:
    message = "The rudder turns the hull and the"
    for carriers in (["head", "memory"], ["expert"]):
        chat = [{"role": "user", "content": message}]
        body = {"model": "host+sea", "messages": chat, "trimtab": {"carriers": carriers}}
        ((job, events),) = jobs(adapters, [body])
        engine.submit(job)
        alone = run(adapter, message, carriers=carriers, chat=True, max_new_tokens=12)
        assert tuple(collected(events)) == alone.texts


def test_the_small_models_read_a_prompt_in_step_with_the_host(
    adapters: Adapters, adapter: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.serving.reading.PREFILL_TOKENS", 24)
    # Characters of several bytes, which chunks cut.
    text = domain_text(5)[:200] + "äöü€" * 12 + domain_text(6)[:200]
    chat = [{"role": "user", "content": text}]
    for body, options in (({"prompt": text}, {}), ({"messages": chat}, {"chat": True})):
        [(job, events)] = jobs(adapters, [{"model": "host+sea", "max_tokens": 6, **body}])
        live = live_of(job)
        with tokens_read(live.pair) as read:
            engine.submit(job)
            found = collected(events)
        size = len(text.encode())
        assert max(read) < size / 2 and size <= sum(read) < 1.6 * size
        carriers = ("head", "memory", "expert")
        alone = run(adapter, text, max_new_tokens=6, carriers=carriers, **options)
        assert found == list(alone.texts)
        wait_until(lambda: not engine.running)
        assert not live._rows  # pyright: ignore[reportPrivateUsage]


def test_other_answers_grow_while_a_steered_prompt_is_read_and_weighed(
    adapters: Adapters, adapter: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch)
    text = domain_text(5)[:420]
    biased = {str(i): -100 for i in adapters.host.end_ids}
    plain = {"model": "host", "prompt": "The m", "max_tokens": 200, "logit_bias": biased}
    asked = [plain, {"model": "host+sea", "prompt": text, "max_tokens": 6}, plain]
    [(bare, grown), (steered, events), (again, grown_alone)] = jobs(adapters, asked)
    engine.submit(bare)
    first = grown.get(timeout=WAIT_SEC)
    assert isinstance(first, Piece)
    before = engine.counts.steps
    engine.submit(steered)
    begun = events.get(timeout=WAIT_SEC)
    # Two passes for each hundred tokens, and sixteen of four places each.
    tokens = len(steered.prompts[0].token_ids)
    assert engine.counts.steps - before >= 2 * math.ceil(tokens / 100) + 64 // 4
    assert isinstance(begun, Piece)
    told = begun.text + "".join(collected(events))
    carriers = ("head", "memory", "expert")
    assert (told,) == run(adapter, text, max_new_tokens=6, carriers=carriers).texts
    engine.submit(again)
    assert [first.text + "".join(collected(grown))] == collected(grown_alone)


def test_other_answers_grow_while_a_prompt_is_scored(
    adapters: Adapters, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = {"model": "host+sea", "prompt": domain_text(5)[:420], "max_tokens": 0, "echo": True}
    scored |= {"logprobs": 1}
    [(alone, events)] = jobs(adapters, [scored])
    live = live_of(alone)
    with tokens_read(live.pair) as read:
        engine.submit(alone)
        expected = events.get(timeout=WAIT_SEC)
    tokens = len(alone.prompts[0].token_ids)
    # Once: no answer follows for which it would have to be read ahead.
    assert isinstance(expected, Piece) and len(expected.tokens) == tokens
    assert sum(read) < 2.5 * tokens
    cut_small(monkeypatch)
    biased = {str(i): -100 for i in adapters.host.end_ids}
    plain = {"model": "host", "prompt": "The m", "max_tokens": 1000, "logit_bias": biased}
    [(bare, grown), (job, told), (given_up, nothing)] = jobs(adapters, [plain, scored, scored])
    engine.submit(bare)
    assert isinstance(grown.get(timeout=WAIT_SEC), Piece)
    before = engine.counts.steps
    engine.submit(job)
    found = told.get(timeout=WAIT_SEC)
    # Asked at four places at a time.
    assert engine.counts.steps - before >= tokens // 4
    assert isinstance(found, Piece) and found.text == expected.text
    for one, other in zip(found.tokens[1:], expected.tokens[1:], strict=True):
        assert one.token_id == other.token_id
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    engine.submit(given_up)
    wait_until(lambda: bool(live._rows))  # pyright: ignore[reportPrivateUsage]
    given_up.cancel()
    wait_until(lambda: not live._rows)  # pyright: ignore[reportPrivateUsage]
    assert nothing.empty() and engine.running == 1
    bare.cancel()


def test_nothing_is_kept_of_a_prompt_that_is_given_up(
    host: HFModel, adapters: Adapters, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.serving.reading.PREFILL_TOKENS", 8)
    [(job, events)] = jobs(adapters, [{"model": "host+sea", "prompt": domain_text(5)}])
    live = live_of(job)
    engine.submit(job)
    wait_until(lambda: bool(live._rows))  # pyright: ignore[reportPrivateUsage]
    job.cancel()
    wait_until(lambda: not live._rows)  # pyright: ignore[reportPrivateUsage]
    assert events.empty() and not engine.running


def test_a_long_prompt_is_read_in_chunks(host: HFModel, engine: Engine) -> None:
    text = domain_text(4)[:900]
    long, short = asking(host, text), asking(host, "The m", max_tokens=30)
    assert len(long.job.prompts[0].token_ids) > PREFILL_TOKENS
    for one in (long, short):
        engine.submit(one.job)
    assert collected(long.events) == list(run(None, text).texts)
    assert collected(short.events) == list(run(None, "The m", max_new_tokens=30).texts)


def test_stop_strings_seeds_and_several_answers(host: HFModel, engine: Engine) -> None:
    (plain,) = run(None, "The rudder", max_new_tokens=12).texts
    stopped = asking(host, "The rudder", max_tokens=12, stop=(plain[3:5],))
    engine.submit(stopped.job)
    assert collected(stopped.events) == [plain[: plain.index(plain[3:5])]]
    texts = []
    for seed in (5, 5, 6):
        options = {"choosing": Choosing(1.5), "seed": seed, "answers": 3}
        one = asking(host, "The rudder", **options)
        engine.submit(one.job)
        texts.append(collected(one.events, 3))
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) == 3


def test_answers_to_one_prompt_are_read_once_and_grow_apart(
    adapters: Adapters, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = domain_text(9)[:300]
    body = {"model": "host+sea", "prompt": text, "n": 3, "seed": 4, "temperature": 1.2}
    found, counts = [], []
    for _ in range(2):
        [(job, events)] = jobs(adapters, [body])
        live = live_of(job)
        with tokens_read(live.pair) as read:
            engine.submit(job)
            found.append(collected(events, 3))
        counts.append(sum(read))
        monkeypatch.setattr(Live, "branch", lambda *_: None)
    assert found[0] == found[1] and len(set(found[0])) == 3
    assert counts[0] + len(text) < counts[1]


def test_many_prompts_do_not_hold_up_those_behind(host: HFModel, engine: Engine) -> None:
    many = Asked([Prompt(tuple(prompt_ids(host, "The m")))] * 12, Options(20, choosing=GREEDY))
    one = asking(host, "The m", max_tokens=20)
    ended: list[str] = []
    for name, asked in (("many", many), ("one", one)):
        asked.job._tell = lambda event, name=name, plain=asked.job._tell: (
            ended.append(name) if isinstance(event, Done) else None,
            plain(event),
        )
        engine.submit(asked.job)
    assert len(set(collected(many.events, 12))) == 1
    collected(one.events)
    assert ended == ["one", "many"]


@pytest.mark.parametrize("answers", [1, 4])
def test_one_owner_of_many_requests_does_not_hold_up_another(
    host: HFModel, engine: Engine, answers: int
) -> None:
    prompt = Prompt(tuple(prompt_ids(host, "The m")))
    options, ended = Options(20, answers, choosing=GREEDY), list[str]()
    owners = ["many"] * 12 + ["late"]
    asked = [Asked([prompt], options, owner=owner) for owner in owners]
    for one in asked:
        one.job._tell = lambda event, job=one.job, plain=one.job._tell: (
            ended.append(job.owner) if isinstance(event, Done) else None,
            plain(event),
        )
        engine.submit(one.job)
    for one in asked:
        collected(one.events, answers)
    # It waited for those that had a slot when it came, and for one more at most.
    assert ended.index("late") <= 4 // answers + 1


def test_owners_take_turns_by_what_they_were_given() -> None:
    turns, order = Turns(), list[str]()
    waiting = ["a"] * 5 + ["b"] * 3 + ["c"]
    while waiting:
        place = turns.place(waiting)
        owner = waiting.pop(place)
        assert owner not in waiting[:place]
        # Those of b are twice as large.
        turns.give(owner, 2 if owner == "b" else 1)
        order.append(owner)
        if len(order) == 4:
            # Who comes late has saved nothing up, and neither has who comes back.
            waiting += ["d", "d", "c"]
    assert "".join(order) == "abcadcabdaab"


def test_those_who_come_and_go_do_not_hold_up_who_waits() -> None:
    turns = Turns()
    for owner in ("away", *["steady"] * 5):
        turns.give([owner][turns.place([owner])], 1)
    served = list[str]()
    for number in range(12):
        # Two owners, each with one request at a time, and never both at once.
        waiting = ["steady", f"visitor {number % 2}"]
        served.append(waiting[turns.place(waiting)])
        turns.give(served[-1], 1)
    assert served.count("steady") >= 3
    # Who had an answer in the making all the while has no turns saved up either.
    waiting, order = ["steady"] * 3 + ["away"] * 3, list[str]()
    while waiting:
        order.append(waiting.pop(turns.place(waiting)))
        turns.give(order[-1], 1)
    assert order[:4].count("away") == 2


def test_who_does_not_wait_makes_room(host: HFModel, engine: Engine) -> None:
    long = [asking(host, "The m", max_tokens=1500) for _ in range(4)]
    for one in long:
        engine.submit(one.job)
    wait_until(lambda: engine.running == 4)
    behind = asking(host, "The rudder")
    engine.submit(behind.job)
    long[0].job.cancel()
    assert collected(behind.events) == list(run(None, "The rudder").texts)
    for one in long[1:]:
        assert not one.job.has_ended
        one.job.cancel()
    wait_until(lambda: not engine.running)


def test_a_full_queue_a_deadline_and_an_end(host: HFModel) -> None:
    engine = Engine(host, slots=1, queue=2)
    engine.start()
    late = Asked([Prompt((5, 6))], Options(1500, choosing=GREEDY), limit_sec=0.2)
    engine.submit(late.job)
    wait_until(lambda: bool(engine.running))
    waiting = [asking(host, "The m", max_tokens=1500) for _ in range(2)]
    for one in waiting:
        engine.submit(one.job)
    with pytest.raises(Busy) as busy:
        engine.submit(asking(host, "The m").job)
    assert 1 <= busy.value.retry_after_sec <= 60
    while isinstance(event := late.events.get(timeout=WAIT_SEC), Piece):
        pass
    assert isinstance(event, Failed) and isinstance(event.error, TimeUp)
    wait_until(lambda: engine.waiting < 2)
    engine.stop()
    for one in waiting:
        while isinstance(event := one.events.get(timeout=WAIT_SEC), Piece):
            pass
        assert isinstance(event, Failed) and isinstance(event.error, Closing)
    with pytest.raises(Closing):
        engine.submit(asking(host, "The m").job)


def test_an_answer_whose_token_cannot_be_chosen_ends_alone(
    host: HFModel, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [asking(host, "The rudder", max_tokens=20, seed=seed) for seed in range(3)]
    choose_as_before = rows.choose

    def choose_or_fail(logprobs: Tensor, by: Choosing, counts: Any, generator: Any) -> int:
        if by.top_k == 7 and sum(counts.values()) == 4:
            raise RuntimeError("no distribution")
        return choose_as_before(logprobs, by, counts, generator)

    monkeypatch.setattr(rows, "choose", choose_or_fail)
    wrong = asking(host, "The rudder", max_tokens=20, choosing=Choosing(0.0, top_k=7))
    for one in (asked[0], wrong, *asked[1:]):
        engine.submit(one.job)
    expected = list(run(None, "The rudder", max_new_tokens=20).texts)
    for one in asked:
        assert collected(one.events) == expected
    while isinstance(event := wrong.events.get(timeout=WAIT_SEC), Piece):
        pass
    assert isinstance(event, Failed) and "no distribution" in str(event.error)


def test_nobody_waits_for_an_engine_that_has_ended(
    host: HFModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(host, slots=2, queue=8)
    engine.start()
    asked = [asking(host, "The rudder", max_tokens=1500) for _ in range(4)]
    for one in asked:
        engine.submit(one.job)
    wait_until(lambda: engine.running == 2)

    keep = Batch.keep

    def no_memory(batch: Batch, kept: Sequence[int]) -> None:
        if kept or is_ill:
            raise MemoryError("no memory for a copy")
        keep(batch, kept)

    def error_of(one: Asked) -> Exception:
        while isinstance(event := one.events.get(timeout=WAIT_SEC), Piece):
            pass
        assert isinstance(event, Failed)
        return event.error

    # One of two ends, and what is kept of the other cannot be copied: both end, and others begin.
    is_ill = False
    monkeypatch.setattr(Batch, "keep", no_memory)
    asked[0].job.cancel()
    assert isinstance(error_of(asked[1]), MemoryError)
    assert isinstance(asked[2].events.get(timeout=WAIT_SEC), Piece) and engine.is_alive
    # Now nothing can be let go of any more.
    is_ill = True
    asked[2].job.cancel()
    assert isinstance(error_of(asked[3]), MemoryError)
    wait_until(lambda: not engine.is_alive)
    with pytest.raises(RuntimeError, match="ended after an error"):
        engine.submit(asking(host, "The m").job)


def test_when_to_come_back_follows_from_what_answers_take(host: HFModel) -> None:
    engine = Engine(host, slots=2, queue=40)
    engine.start()
    long = [asking(host, "The m", max_tokens=1500) for _ in range(42)]
    for one in long[:2]:
        one.job.began_sec -= 5
        engine.submit(one.job)
    wait_until(lambda: engine.running == 2)
    for one in long[2:]:
        engine.submit(one.job)
    # Two at a time, forty wait, and none has been answered in five seconds.
    assert engine.busy().retry_after_sec == 60
    engine.counts.mean_job_sec = 0.5
    assert engine.busy().retry_after_sec == 10
    engine.stop()


def test_no_owner_fills_the_queue_for_all(host: HFModel) -> None:
    engine = Engine(host, slots=1, queue=8)
    engine.start()
    long = [Prompt((5, 6))], Options(1500, choosing=GREEDY)
    engine.submit(Asked(*long).job)
    wait_until(lambda: bool(engine.running))

    def taken(owner: str) -> int:
        """How many requests of an owner the queue takes before it refuses one."""
        for count in range(9):
            try:
                engine.submit(Asked(*long, owner=owner).job)
            except Busy:
                return count
        raise AssertionError("more than the queue holds")

    assert [taken("many"), taken("many"), taken("late"), taken("last")] == [6, 0, 2, 0]
    engine.stop()
    engine = Engine(host, slots=1, queue=8)
    engine.start()
    engine.submit(Asked(*long).job)
    wait_until(lambda: bool(engine.running))
    assert taken("") == 8
    engine.stop()


def test_nothing_is_kept_of_answers_that_do_not_go_on(
    host: HFModel, adapters: Adapters, engine: Engine
) -> None:
    bodies = [
        {"model": "host+sea", "prompt": "The rudder turns", "max_tokens": tokens, "echo": True}
        | {"logprobs": told}
        for tokens in (0, 1, 3)
        for told in (None, 2)
    ]
    asked = jobs(adapters, bodies)
    for job, events in asked:
        engine.submit(job)
        assert collected(events)[0].startswith("The rudder turns")
    wait_until(lambda: not engine.running)
    assert asked[0][0].steered is not None
    for mixture in asked[0][0].steered.several.mixtures:
        assert mixture.steering.live is not None
        assert not mixture.steering.live._rows  # pyright: ignore[reportPrivateUsage]


def test_one_request_that_fails_leaves_the_others_alone(host: HFModel, engine: Engine) -> None:
    good = asking(host, "The rudder", max_tokens=30)
    engine.submit(good.job)
    bad = Asked([Prompt((10**6,))], Options(5, choosing=GREEDY))
    engine.submit(bad.job)
    event = bad.events.get(timeout=WAIT_SEC)
    assert isinstance(event, Failed) and isinstance(event.error, IndexError)
    assert collected(good.events) == list(run(None, "The rudder", max_new_tokens=30).texts)


@pytest.mark.parametrize("model", ["host", "host+sea"])
def test_an_answer_that_fails_before_its_first_token_is_told_so(
    adapters: Adapters, engine: Engine, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Row, *given: Any) -> Piece:
        if self.job is bad:
            raise ValueError("a broken rudder")
        return plain(self, *given)

    asked = [{"model": "host+sea", "prompt": "The rudder", "max_tokens": 30}] * 2
    asked.append({"model": model, "prompt": domain_text(5)[:300]})
    [(good, events), (again, alone), (bad, failed)] = jobs(adapters, asked)
    plain = Row.write
    monkeypatch.setattr(Row, "write", broken)
    engine.submit(good)
    first = events.get(timeout=WAIT_SEC)
    engine.submit(bad)
    event = failed.get(timeout=WAIT_SEC)
    assert isinstance(event, Failed) and isinstance(event.error, ValueError)
    assert isinstance(first, Piece)
    texts = [first.text + "".join(collected(events))]
    engine.submit(again)
    assert texts == collected(alone)
    wait_until(lambda: not engine.running)
    live = live_of(good)
    assert not live._rows  # pyright: ignore[reportPrivateUsage]


def test_a_prompt_that_is_given_up_while_it_is_weighed_leaves_the_memory_at_once(
    adapters: Adapters, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch)
    asked = [{"model": "host", "prompt": "The m", "max_tokens": 400}]
    asked.append({"model": "host+sea", "prompt": domain_text(5)[:300]})
    [(beside, grown), (job, events)] = jobs(adapters, asked)
    weighing, goes_on = threading.Event(), threading.Event()
    read: list[weakref.ref[LiveReading]] = []
    score_all = Live.score_all

    def held(self: Live, questions: Any, *given: Any) -> Any:
        if not read:
            read.append(weakref.ref(questions[0][0]))
            weighing.set()
            goes_on.wait(WAIT_SEC)
        return score_all(self, questions, *given)

    monkeypatch.setattr(Live, "score_all", held)
    engine.submit(beside)
    grown.get(timeout=WAIT_SEC)
    gc.disable()
    try:
        engine.submit(job)
        assert weighing.wait(WAIT_SEC)
        job.cancel()
        goes_on.set()
        wait_until(lambda: read[0]() is None)
    finally:
        gc.enable()
        beside.cancel()
    assert events.empty()


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.7), (5, 1.0), (9, 0.35), (1, 0.2), (0, 1e-9)])
def test_the_likely_tokens_are_those_of_transformers(top_k: int, top_p: float) -> None:
    scores = 2 * torch.randn(50, generator=torch.Generator().manual_seed(2))
    expected = scores[None]
    ids = torch.zeros(1, 1, dtype=torch.long)
    if top_k:
        expected = TopKLogitsWarper(top_k)(ids, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(ids, expected)
    torch.testing.assert_close(keep_likely(scores, top_k, top_p), expected[0])


def test_draws_follow_the_distribution_and_the_biases() -> None:
    logprobs = torch.tensor([0.5, 0.3, 0.2]).log()
    generator = torch.Generator().manual_seed(0)

    def shares(by: Choosing, counts: dict[int, int]) -> torch.Tensor:
        drawn = [choose(logprobs, by, counts, generator) for _ in range(1200)]
        return torch.bincount(torch.tensor(drawn), minlength=3) / 1200

    for by, counts, expected in (
        (Choosing(), {}, logprobs),
        (Choosing(temperature=0.5), {}, 2 * logprobs),
        (Choosing(logit_bias={1: -100.0, 2: 1.0}), {}, logprobs + torch.tensor([0, -100, 1.0])),
        (Choosing(presence_penalty=1.0), {0: 3}, logprobs - torch.tensor([1.0, 0, 0])),
        (Choosing(frequency_penalty=0.5), {0: 3, 2: 1}, logprobs - torch.tensor([1.5, 0, 0.5])),
    ):
        assert (shares(by, counts) - expected.softmax(-1)).abs().max() < 0.05
    assert choose(logprobs, Choosing(0.0, logit_bias={2: 5.0}), {}, generator) == 2


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e-38, 1e-6])
def test_the_coldest_draws_take_the_likeliest_token(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.tensor([-9.0, -4.0, -torch.inf, -4.0 - 1e-4])
    for by in (Choosing(temperature), Choosing(temperature, 0.9, 3), Choosing(temperature, 1e-9)):
        assert choose(logprobs, by, {}, generator) == 1


def read_prompt(host: HFModel, text: str) -> ReadPrompt:
    ids = torch.tensor(host.context_ids() + host.encode(text))
    pieces = tuple(host.vocabulary.token_bytes[i] for i in ids.tolist())
    return ReadPrompt(ids, pieces, host.hidden(ids[None])[0])


def prequential(
    host: HFModel, several: Several, read: ReadPrompt, few: int | None = None
) -> tuple[Tensor, int]:
    """The distributions after all tokens but the last, and in how many pieces they were found."""
    told: list[Tensor] = []
    pieces = several.prequential(
        host.unembedding, read, lambda _, logprobs: told.append(logprobs), lambda: few
    )
    count = sum(1 for _ in pieces)
    return torch.cat(told), count


@pytest.mark.parametrize("carriers", [["head", "memory"], ["expert"], ["head", "memory", "expert"]])
def test_a_prompt_is_scored_as_evaluate_scores_it(
    host: HFModel, adapters: Adapters, carriers: list[CarrierName]
) -> None:
    text = domain_text(7)[:400]
    several = adapters.mixture(adapters.chosen("host+sea", carriers, None))
    read = replace(read_prompt(host, text), row=next_number())
    told, pieces = prequential(host, several, read)
    ours = told.gather(1, read.token_ids[1:, None])[:, 0]
    steering = several.mixtures[0].steering
    scored = score_document(host, text, steering, window_tokens=512, stride_tokens=512)
    expected = scored.rows[steering.rows[0]].logprobs.float()
    torch.testing.assert_close(ours[-len(expected) :], expected, atol=1e-4, rtol=1e-4)
    again, smaller = prequential(host, several, replace(read, row=next_number()), 5)
    torch.testing.assert_close(again, told, atol=1e-5, rtol=1e-5)
    assert pieces == smaller if "expert" not in carriers else smaller > 4 * pieces


def test_several_adapters_are_one_mixture(host: HFModel, adapters: Adapters) -> None:
    read = read_prompt(host, PROMPTS[0])
    asked = adapters.chosen("host+sea:0.7+ship:1.6", ["head", "memory"], None)
    several = adapters.mixture(asked)
    dense, last = prequential(host, several, read)[0], len(read.token_ids) - 1
    # The reference: every predictor over the whole vocabulary, in two tables side by side.
    said = [
        next(iter(mixture.read(host.unembedding, read, list(range(last)))))[1]
        for mixture in several.mixtures
    ]
    tables = [
        torch.stack([one.found.field.everywhere(member) for member in one.stacked]).double().exp()
        for one in said
    ]
    torch.testing.assert_close(tables[0][0], tables[1][0], atol=1e-6, rtol=1e-4)
    table = torch.cat([tables[0], tables[1][1:]])
    prior = several.prior.double()
    assert prior.sum() == pytest.approx(1.0) and prior[0] == said_prior(several)
    weights = prior
    for place in range(last):
        expected = (weights[:, None] * table[:, place]).sum(0)
        torch.testing.assert_close(dense[place].double().exp(), expected, atol=1e-6, rtol=1e-3)
        weights = weights * table[:, place, read.token_ids[place + 1]]
        weights = (1 - several.share) * weights / weights.sum() + several.share * prior
    weighed = several.weigh(host.unembedding, read, (None, None))
    torch.testing.assert_close(weighed.double(), weights, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("model", ["host+sea", "host+sea:0.7+ship:1.6"])
def test_a_prompt_weighed_in_pieces_is_weighed_the_same(
    host: HFModel, adapters: Adapters, model: str
) -> None:
    several = adapters.mixture(adapters.chosen(model, ["head", "memory", "expert"], None))
    read, chats = read_prompt(host, domain_text(3)[:300]), (None, None)
    weighing, pieces = several.weighing(host.unembedding, read, chats, few=5), 0
    while True:
        try:
            next(weighing)
        except StopIteration as end:
            weights = end.value
            break
        pieces += 1
    # One before each adapter's rows, and one before each piece of them.
    assert pieces == len(several.mixtures) * (1 + 13)
    whole = several.weigh(host.unembedding, read, chats)
    torch.testing.assert_close(weights, whole, atol=1e-6, rtol=1e-4)
    assert (whole - several.prior).abs().max() > 0.05


def said_prior(several: Several) -> float:
    return max(mixture.steering.blend.host_prior for mixture in several.mixtures)


def test_what_the_name_of_a_model_means(adapters: Adapters) -> None:
    def strengths(model: str, strength: float | None = None) -> dict[str, float]:
        return {one.adapter.name: one.strength for one in adapters.chosen(model, None, strength)}

    assert strengths("host") == {} == strengths("host+sea:0")
    assert strengths("host+sea") == {"sea": 1.0}
    assert strengths("host+ship:0.3+sea", 0.5) == {"ship": 0.3, "sea": 0.5}
    for wrong in ("", "hos", "hosts", "host+", "host+no", "host+sea+", "+sea", "host:1", "sea"):
        with pytest.raises(UnknownModel):
            strengths(wrong)
    for wrong in ("host+sea:", "host+sea:x", "host+sea:nan", "host+sea:-1", "host+sea:3"):
        with pytest.raises(InputError, match="strength"):
            strengths(wrong)
    with pytest.raises(InputError, match="twice"):
        strengths("host+sea+sea:0.5")
    with pytest.raises(InputError, match="nothing was asked for"):
        adapters.chosen("host+sea", [], None)
    one, same = (adapters.mixture(adapters.chosen("host+sea:0.5", None, None)) for _ in range(2))
    assert one is same


def test_an_adapter_needs_a_name_and_a_carrier_that_steers(
    host: HFModel, adapter: Path, tmp_path: Path
) -> None:
    adapters = Adapters(served(), host)
    with pytest.raises(InputError, match="cannot be the name"):
        adapters.load("a+b", adapter)
    with pytest.raises(AdapterError):
        adapters.load("a", tmp_path)
    assert adapters.load("a", adapter).carriers == ("head", "memory")
    adapters.unload("a")
    with pytest.raises(UnknownModel):
        adapters.unload("a")


def test_threads_do_not_change_each_others_tokens(host: HFModel) -> None:
    text = "a<eos>b" * 40
    plain, marked = host.encode(text), host.encode(text, markup=True)
    assert plain != marked
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: host.encode(text, markup=bool(n % 2)), range(400)))
    assert found == [plain, marked] * 200
