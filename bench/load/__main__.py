"""Load and faults: `trimtab serve` under 200 clients, of which some mean no good.

    python -m bench.load --out RESULT.json

Starts a server with a toy host and two adapters, asks each request alone, and then in rounds of
equal load. In each, streaming clients come back when they are told to and some hang up; malformed
and oversized requests and wrong keys come in between, and an adapter is exchanged. Then
schemathesis reads the interface's document, the server is killed in the middle of its work and
started again, and at last asked to end. Ends with 1 if anything is not as it should be.
"""

import argparse
import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

import psutil
from rich.console import Console
from rich.table import Table

from bench.compatibility.adapter import small_adapter
from bench.cost.cpu_flops import processor
from bench.load.abuse import send_wrong, wrongs
from bench.load.asks import Ask, asks
from bench.load.clients import TIE_NATS, Clients, alone, client_of
from bench.load.figures import LEAK_SHARE, leaks, percentiles, table
from bench.load.fuzz import CHECKS, fuzz
from bench.load.process import Server
from bench.load.swaps import Swaps
from trimtab.serving.keys import add_key
from trimtab.serving.run import KEEP_ALIVE_SEC
from trimtab.store.files import package_versions, write_json

HOST = "tiny:qwen3?vocab=bpe&hidden=32"
SMALLS = {"one": "tiny:llama?vocab=bpe&hidden=32", "two": "tiny:llama?vocab=bpe&hidden=48&seed=1"}
BODY_BYTES = 100_000
REST_SEC = 60.0
ABUSE_PAUSE_SEC = 0.1
_SHOWN_FAULTS = 20
_LAST = 8
_KEPT = Path("build/load")


@final
class Run:
    """One run of everything."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        """Make keys and adapters.

        Args:
            given: The command line.
            folder: For all that is made.
        """
        self.given = given
        self.folder = folder
        self.faults: list[str] = []
        self.report: dict[str, Any] = {"rests": [], "memory": []}
        keys = folder / "keys.json"
        self.key, self.admin = add_key(keys, "user"), add_key(keys, "boss", admin=True)
        self.slow = add_key(keys, "slow", requests_per_minute=2)
        self.adapters: dict[str, Path] = {}
        for name, small in SMALLS.items():
            (folder / name).mkdir()
            self.adapters[name] = small_adapter(folder / name, small)
        words = [HOST, "--name", "host", "--keys", str(keys), "--dtype", "float32"]
        words += ["--carriers", "head,memory,expert", "--body-bytes", str(BODY_BYTES)]
        for name, adapter in (("sea", "one"), ("ship", "two"), ("swap", "one")):
            words += ["--adapter", f"{name}={self.adapters[adapter]}"]
        self.server = Server(words, folder / "server.log")
        self.malformed: Counter[str] = Counter()
        self.hurried: Counter[str] = Counter()

    async def all(self) -> None:
        """Everything, in turn."""
        began_sec, report, given = time.monotonic(), self.report, self.given
        report["start_sec"] = self.server.start()
        watching = asyncio.create_task(self._watch(began_sec))
        async with client_of(self.server.base_url, self.key) as client, self._boss() as boss:
            swaps = Swaps(boss, self.adapters, "one")
            clients = await self._prepared(client, swaps)
            for number in range(given.rounds):
                await self._round(clients, swaps, number)
                report["rests"].append(await self._rest(boss, began_sec))
            report["schemathesis"] = await fuzz(
                self.server.base_url, self.admin, self.folder, given.fuzz_sec
            )
            for failure in [*report["schemathesis"]["failures"], *report["schemathesis"]["errors"]]:
                self.faults.append(f"schemathesis: {failure}")
            # The fuzzing is no round: what it leaves behind is seen by itself.
            report["rest_after_schemathesis"] = await self._rest(boss, began_sec)
            await self._kill_and_restart(clients, swaps)
            await self._end(clients)
        watching.cancel()
        self._conclude(clients, swaps)
        report["sec"] = round(time.monotonic() - began_sec, 1)

    def _boss(self) -> Any:
        return client_of(self.server.base_url, self.admin)

    async def _prepared(self, client: Any, swaps: Swaps) -> Clients:
        """Ask everything alone, in both states of the adapter that is exchanged."""
        wanted, kept, expected = asks(self.given.asks), [], {}
        ties = 0
        for state in ("two", "one"):
            await swaps.to(state)
            for ask in wanted:
                if state == "one" or ask.is_swapped:
                    expected[id(ask), state] = await alone(client, ask)
        for ask in wanted:
            states = ("one", "two") if ask.is_swapped else ("one",)
            if min(expected[id(ask), state][1] for state in states) < TIE_NATS:
                ties += 1
            else:
                kept.append(ask)
        self.report["asks"] = {"kinds": len(kept), "left_out_for_a_tie": ties}
        both = {
            (number, state): expected[id(ask), state if ask.is_swapped else "one"][0]
            for number, ask in enumerate(kept)
            for state in ("one", "two")
        }
        return Clients(client, kept, both, swaps)

    async def _round(self, clients: Clients, swaps: Swaps, number: int) -> None:
        """Clients, malformed requests, and exchanges of an adapter, all at once."""
        others = [
            asyncio.create_task(swaps.keep_on(1.0)),
            asyncio.create_task(self._abuse(number)),
            asyncio.create_task(self._hurry()),
        ]
        try:
            await clients.run(self.given.clients, self.given.requests, number)
        finally:
            for task in others:
                task.cancel()
            for found in await asyncio.gather(*others, return_exceptions=True):
                if isinstance(found, Exception):
                    self.faults.append(f"{type(found).__name__}: {found}")
        await swaps.to("one")

    async def _abuse(self, number: int) -> None:
        every = wrongs(self.key, self.slow, BODY_BYTES)
        for wrong in (*every[number::2], *every[1 - number % 2 :: 2]):
            status, problem = await send_wrong(self.server.port, wrong)
            self.malformed[str(status)] += 1
            if problem:
                self.faults.append(problem)
            await asyncio.sleep(ABUSE_PAUSE_SEC)

    async def _hurry(self) -> None:
        """One who asks more often than the limit of their key allows."""
        body = {"model": "host", "prompt": "The", "max_tokens": 1}
        async with client_of(self.server.base_url, self.slow) as client:
            while True:
                found = await client.post("/v1/completions", json=body)
                code = "" if found.status_code == 200 else f" {found.json()['error']['code']}"
                self.hurried[f"{found.status_code}{code}"] += 1
                if (
                    found.status_code == 429
                    and not found.headers.get("retry-after", "").isdecimal()
                ):
                    self.faults.append("429 of a key's limit without Retry-After")
                await asyncio.sleep(0.5)

    async def _rest(self, boss: Any, began_sec: float) -> dict[str, float]:
        """What the server holds once it has nothing to do."""
        deadline_sec = time.monotonic() + REST_SEC
        while True:
            text = (await boss.get("/metrics")).text
            if "trimtab_running 0.0" in text and "trimtab_queue 0.0" in text:
                break
            if time.monotonic() > deadline_sec:
                self.faults.append("slots are held though nobody asks")
                break
            await asyncio.sleep(0.2)
        await asyncio.sleep(KEEP_ALIVE_SEC + 1.0)
        return {"sec": round(time.monotonic() - began_sec, 1), **asdict(self.server.held())}

    async def _watch(self, began_sec: float) -> None:
        while True:
            # It may be killed in between.
            with suppress(psutil.Error):
                rss = self.server.held().rss_bytes
                self.report["memory"].append([round(time.monotonic() - began_sec), rss])
            await asyncio.sleep(2.0)

    async def _kill_and_restart(self, clients: Clients, swaps: Swaps) -> None:
        if not self.server.is_running:
            self.faults.append(f"the server has ended with {self.server.wait()}")
            return
        asking = asyncio.create_task(
            clients.run(self.given.clients, self.given.requests // 2, self.given.rounds)
        )
        await asyncio.sleep(4.0)
        clients.may_be_cut = True
        self.server.kill()
        self.report["restart_sec"] = await asyncio.to_thread(self.server.start)
        swaps.restarted("one")
        await asking
        clients.may_be_cut = False

    async def _end(self, clients: Clients) -> None:
        """SIGTERM while answers are in the making: they come to their end, and so does it."""
        body = {"model": "host", "prompt": "The", "max_tokens": 400, "temperature": 0}
        long = Ask("completions", {**body, "logit_bias": {"257": -100}})
        begun = asyncio.Semaphore(0)
        streams = [asyncio.create_task(clients.to_the_end(long, begun)) for _ in range(_LAST)]
        for _ in streams:
            await begun.acquire()
        self.server.ask_to_end()
        tokens = await asyncio.gather(*streams)
        code = await asyncio.to_thread(self.server.wait)
        self.report["sigterm"] = {"exit_code": code, "streams": len(streams)}
        if code != 0 or set(tokens) != {400}:
            self.faults.append(f"SIGTERM: exit code {code}, tokens of open streams {tokens}")

    def _conclude(self, clients: Clients, swaps: Swaps) -> None:
        """Check what can be seen from the whole."""
        tally, report, given = clients.tally, self.report, self.given
        self.faults += [*tally.faults, *swaps.faults]
        self.faults += leaks(report["rests"], given.warm_up)
        if not self.hurried["429 rate_limit_exceeded"]:
            self.faults.append(f"a key's limit was not felt: {dict(self.hurried)}")
        events = Counter()
        for line in self.server.log_lines():
            events[line["event"]] += 1
            if line["event"] == "not JSON" or line.get("status", 0) >= 500:
                self.faults.append(f"the log has {str(line)[:500]}")
        report |= {
            "requests": sum(tally.outcomes.values()),
            "clients": given.clients,
            "outcomes": dict(tally.outcomes),
            "latency": {
                name: percentiles(getattr(tally, name))
                for name in ("first_sec", "whole_sec", "waited_sec")
            },
            "malformed": {"sent": sum(self.malformed.values()), "told": dict(self.malformed)},
            "beyond_the_limit_of_a_key": dict(self.hurried),
            "swaps": swaps.count,
            "log_lines": dict(events),
            "faults": self.faults[:200],
        }


def settings(given: argparse.Namespace) -> Mapping[str, Any]:
    """How it was asked."""
    return {
        "host": HOST,
        "adapters": list(SMALLS.values()),
        "rounds": given.rounds,
        "warm_up_rounds": given.warm_up,
        "requests_a_round": given.requests,
        "leak_share": LEAK_SHARE,
        "tie_nats": TIE_NATS,
        "schemathesis_checks": list(CHECKS),
        "cores": os.cpu_count(),
        "processor": processor(),
        "versions": package_versions(),
    }


def main() -> None:
    """Run everything and say what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/load/report.json"))
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--requests", type=int, default=200, help="in each round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=2, help="rounds that may raise the memory")
    parser.add_argument("--asks", type=int, default=48, help="different requests")
    parser.add_argument("--fuzz-sec", type=int, default=25)
    given = parser.parse_args()
    # Whoever ends this ends the server too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(given, Path(folder))
        try:
            asyncio.run(run.all())
        finally:
            if run.server.is_running:
                run.server.kill()
            _KEPT.mkdir(parents=True, exist_ok=True)
            for name in ("server.log", "schemathesis.txt"):
                with suppress(FileNotFoundError):
                    shutil.copy(Path(folder) / name, _KEPT / name)
    write_json(given.out, {**settings(given), **run.report})
    shown = Table(show_header=False, title="trimtab serve under load")
    for row in table(run.report):
        shown.add_row(*row)
    Console().print(shown)
    for fault in run.faults[:_SHOWN_FAULTS]:
        print(f"fault: {fault}", file=sys.stderr)
    sys.exit(1 if run.faults else 0)


if __name__ == "__main__":
    main()
