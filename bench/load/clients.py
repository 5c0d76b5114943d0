"""Clients that ask, wait their turn, hang up, and compare what they are told."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import httpx2

from bench.load.asks import (
    Answer,
    Ask,
    closest_nats,
    error_problem,
    streamed_answer,
    whole_answer,
)
from bench.load.swaps import Swaps

WAIT_SEC = 240.0
TIE_NATS = 1e-3
"""Requests whose answer hangs on less are not asked: another company may round them otherwise."""

_STATES = ("one", "two")


@dataclass
class Tally:
    """What the clients met with.

    Attributes:
        outcomes: How requests ended.
        faults: What must not be, each with its request.
        first_sec: To the first piece of each stream that came to its end, since it was sent.
        whole_sec: To its end.
        waited_sec: The same since it was first sent, before all that were told to come back.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    first_sec: list[float] = field(default_factory=list)
    whole_sec: list[float] = field(default_factory=list)
    waited_sec: list[float] = field(default_factory=list)


Expected = Mapping[tuple[int, str], Answer]
"""What each request is answered alone, by its number and the state of the swapped adapter."""


def client_of(base_url: str, key: str) -> httpx2.AsyncClient:
    """A client without limits of its own."""
    return httpx2.AsyncClient(
        base_url=base_url,
        headers={"authorization": f"Bearer {key}"},
        timeout=WAIT_SEC,
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=50),
    )


async def alone(client: httpx2.AsyncClient, ask: Ask) -> tuple[Answer, float]:
    """The answer to a request that is asked alone, and how near it came to another one."""
    found = await client.post(f"/v1/{ask.route}", json=ask.body)
    top = {"logprobs": True, "top_logprobs": 2} if ask.is_chat else {"logprobs": 2, "echo": False}
    told = await client.post(f"/v1/{ask.route}", json={**ask.body, **top})
    for response in (found, told):
        if response.status_code != 200:
            raise RuntimeError(f"{ask} alone was told {response.status_code}: {response.text}")
    gap_nats = closest_nats(told.json(), chat=ask.is_chat)
    return whole_answer(found.json(), chat=ask.is_chat), gap_nats


@final
class Clients:
    """Many clients at one server."""

    def __init__(
        self, client: httpx2.AsyncClient, asks: Sequence[Ask], expected: Expected, swaps: Swaps
    ) -> None:
        """Prepare them.

        Args:
            client: Asks with a key.
            asks: What is asked.
            expected: What each is answered alone.
            swaps: Knows which adapter a request may have met with.
        """
        self.tally = Tally()
        self.may_be_cut = False
        """The server is about to be killed: a request that is cut off is asked again."""
        self._client = client
        self._asks = asks
        self._expected = expected
        self._swaps = swaps

    async def run(self, clients: int, requests: int, seed: int) -> None:
        """Let so many clients ask so many requests together."""
        numbers = iter(range(requests))

        async def one(number: int) -> None:
            chosen = random.Random(f"{seed} {number}")
            # Not all in the same instant.
            await asyncio.sleep(chosen.random())
            for _ in numbers:
                await self.one(chosen)

        await asyncio.gather(*(one(number) for number in range(clients)))

    async def one(self, chosen: random.Random) -> None:
        """Ask one request until it is answered, or hang up on it."""
        number = chosen.randrange(len(self._asks))
        dice, began_sec = chosen.random(), time.monotonic()
        while True:
            if dice < 0.1:
                wait_sec = await self._hang_up(self._asks[number], chosen)
            else:
                wait_sec = await self._ask(number, began_sec, stream=dice < 0.85)
            if wait_sec is None:
                return
            await asyncio.sleep(wait_sec + chosen.random())

    async def _ask(self, number: int, began_sec: float, *, stream: bool) -> float | None:
        """Ask; seconds to wait where it is to be asked again."""
        ask, sent_sec = self._asks[number], time.monotonic()
        body = {**ask.body, "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        try:
            async with self._client.stream("POST", f"/v1/{ask.route}", json=body) as response:
                first_sec = time.monotonic()
                if response.status_code != 200:
                    return self._refused(ask, response, await response.aread(), sent_sec)
                lines = [line async for line in response.aiter_lines() if line]
        except httpx2.ConnectError:
            return self._cut(ask, "no connection", "found no server after the kill")
        except httpx2.TransportError as error:
            return self._cut(ask, type(error).__name__)
        if not stream:
            answer = whole_answer(json.loads("\n".join(lines)), chat=ask.is_chat)
        elif lines[-1] != "data: [DONE]":
            return self._cut(ask, f"a stream ends with {lines[-1:]}")
        else:
            chunks = (json.loads(line.removeprefix("data: ")) for line in lines[:-1])
            answer = streamed_answer(chunks, chat=ask.is_chat)
            now_sec, tally = time.monotonic(), self.tally
            tally.first_sec.append(first_sec - sent_sec)
            tally.whole_sec.append(now_sec - sent_sec)
            tally.waited_sec.append(now_sec - began_sec)
        self.tally.outcomes["answered, streamed" if stream else "answered, whole"] += 1
        self._compare(number, answer, sent_sec, first_sec)
        return None

    def _compare(self, number: int, answer: Answer, sent_sec: float, first_sec: float) -> None:
        ask, states = self._asks[number], _STATES
        if ask.is_swapped:
            states = [state for state in self._swaps.between(sent_sec, first_sec) if state]
        known = [self._expected[number, state] for state in states]
        if not any(answer.equals(one) for one in known):
            self.tally.outcomes["wrong answers"] += 1
            self.tally.faults.append(f"wrong answer to {ask}: {answer}, alone {known}")

    def _refused(
        self, ask: Ask, response: httpx2.Response, body: bytes, sent_sec: float
    ) -> float | None:
        """Note a refusal; seconds to wait before asking again."""
        status, problem = response.status_code, error_problem(response.status_code, body)
        code = None if problem else json.loads(body)["error"]["code"]
        self.tally.outcomes[f"{status} {code}"] += 1
        if problem:
            self.tally.faults.append(problem)
        if status == 429:
            wait = response.headers.get("retry-after", "")
            if wait.isdecimal() and int(wait) >= 1:
                return float(wait)
            self.tally.faults.append(f"429 with Retry-After {wait!r}")
        elif not (
            status == 404
            and ask.is_swapped
            and None in self._swaps.between(sent_sec, time.monotonic())
        ):
            self.tally.faults.append(f"{ask} was told {status}: {body[:300]!r}")
        return None

    def _cut(self, ask: Ask, what: str, expected: str = "cut off by the kill") -> float | None:
        if self.may_be_cut:
            self.tally.outcomes[expected] += 1
            return 0.5
        self.tally.outcomes["cut off"] += 1
        self.tally.faults.append(f"{ask} was cut off: {what}")
        return None

    async def _hang_up(self, ask: Ask, chosen: random.Random) -> float | None:
        """Ask, and go away: in the middle of the question, before the answer, or in it."""
        body: dict[str, Any] = {**ask.body, "stream": chosen.random() < 0.7}
        pieces, after_sec = chosen.randrange(4), chosen.random() * 2
        self.tally.outcomes["hung up"] += 1
        if pieces == 0:
            await self._break_off(ask, body)
            return None
        try:
            async with asyncio.timeout(after_sec if pieces == 1 else WAIT_SEC):
                async with self._client.stream("POST", f"/v1/{ask.route}", json=body) as response:
                    async for _ in response.aiter_raw():
                        pieces -= 1
                        if pieces == 0:
                            break
        except (TimeoutError, httpx2.TransportError):
            pass
        return None

    async def to_the_end(self, ask: Ask, begun: asyncio.Semaphore) -> int:
        """Read a stream; how many tokens it had, and 0 where it has not come to its end.

        Args:
            ask: The request.
            begun: Released once the answer has begun.
        """
        body = {**ask.body, "stream": True, "stream_options": {"include_usage": True}}
        lines: list[str] = []
        try:
            async with self._client.stream("POST", f"/v1/{ask.route}", json=body) as response:
                begun.release()
                lines = [line async for line in response.aiter_lines() if line]
        except httpx2.TransportError:
            return 0
        if lines[-1:] != ["data: [DONE]"]:
            return 0
        chunks = (json.loads(line.removeprefix("data: ")) for line in lines[:-1])
        return streamed_answer(chunks, chat=ask.is_chat).completion_tokens

    async def _break_off(self, ask: Ask, body: Mapping[str, Any]) -> None:
        url, text = self._client.base_url, json.dumps(body).encode()
        head = f"POST /v1/{ask.route} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(text)}"
        said = self._client.headers["authorization"]
        head += f"\r\nauthorization: {said}\r\ncontent-type: application/json\r\n\r\n"
        try:
            _, writer = await asyncio.open_connection(url.host, url.port)
            writer.write(head.encode() + text[: len(text) // 2])
            await writer.drain()
            writer.close()
        except OSError:
            pass
