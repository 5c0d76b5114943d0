r"""How long an answer in the making waits for its next token while a steered prompt is read.

    python -m bench.serve_waiting --adapter FOLDER --host MODEL --zig FOLDER \\
        --leave-out FOLDER ... --out RESULT.json [--echo]

An answer of the bare host streams from a server of this process. Meanwhile a long prompt comes
that the adapter steers with all its carriers. What is measured: the longest pause between two
pieces of the stream while that is so, and when the prompt's first token comes. With `--echo` the
prompt is said again instead, with the log-probabilities of its tokens, as who scores a text asks.
"""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import torch

from bench import held_out
from bench.timed_rows import write_rows
from trimtab.backends.open import open_model
from trimtab.config import ServeConfig
from trimtab.serving.run import running

PROMPT_TOKENS = (256, 512, 1024)
REPETITIONS = 5
CARRIERS = ["head", "memory", "expert"]
STREAMED_TOKENS = 400
"""More than are written while a prompt is read."""


def main() -> None:
    """Measure and write."""
    parser = held_out.arguments(__doc__)
    parser.add_argument("--echo", action="store_true", help="score the prompt; write nothing")
    given = parser.parse_args()
    asks = {"max_tokens": 0, "echo": True, "logprobs": 1} if given.echo else {"max_tokens": 1}
    host = open_model(given.host)
    config = ServeConfig(
        host=given.host,
        name="host",
        port=0,
        adapter=(f"zig={given.adapter}",),
        carriers=("head", "memory", "expert"),
        small=given.small,
    )
    texts = [host.encode(d.text) for d in held_out.free_zig(given.zig, given.leave_out)]
    banned = {str(i): -100 for i in host.end_ids}
    rows: list[dict[str, object]] = []
    with (
        running(config, host=host) as server,
        httpx2.Client(base_url=server.base_url, timeout=600) as client,
    ):
        for tokens in PROMPT_TOKENS:
            # Another prompt each time, as nothing is kept of those before.
            prompts = [ids[:tokens] for ids in texts if len(ids) >= tokens][: REPETITIONS + 1]
            found = [_measured(client, {"prompt": ids, **asks}, banned) for ids in prompts][1:]
            pauses_sec, firsts_sec = zip(*found, strict=True)
            rows.append(
                {
                    "tokens": tokens,
                    "longest_pause_sec": round(statistics.median(pauses_sec), 2),
                    "answer_sec" if given.echo else "first_token_sec": round(
                        statistics.median(firsts_sec), 2
                    ),
                    "pauses_sec": [round(sec, 2) for sec in pauses_sec],
                    "answers_sec" if given.echo else "firsts_sec": [
                        round(sec, 2) for sec in firsts_sec
                    ],
                }
            )
            print(rows[-1], flush=True)
    what = f"medians in seconds, {host.model.dtype}; see bench/serve_waiting.py"
    write_rows(given.out, what, rows)


def _measured(
    client: httpx2.Client, asks: dict[str, Any], banned: dict[str, int]
) -> tuple[float, float]:
    """The longest pause of a stream while a prompt is read, and how long that takes."""
    streamed = {"model": "host", "prompt": "The ship", "max_tokens": STREAMED_TOKENS}
    asked = {"model": "host+zig", "trimtab": {"carriers": CARRIERS}, "temperature": 0, **asks}
    pauses_sec, before_sec = [0.0], 0.0
    with ThreadPoolExecutor(1) as pool:
        body = streamed | {"stream": True, "temperature": 0, "logit_bias": banned}
        with client.stream("POST", "/v1/completions", json=body) as pieces:
            answer = None
            for number, _ in enumerate(pieces.iter_lines()):
                now_sec = time.perf_counter()
                if answer is None and number == 16:
                    answer = pool.submit(_asked, client, asked)
                elif answer is not None:
                    pauses_sec.append(now_sec - before_sec)
                before_sec = now_sec
                if answer is not None and answer.done():
                    break
            assert answer is not None and answer.done()
        return max(pauses_sec), answer.result()


def _asked(client: httpx2.Client, body: dict[str, Any]) -> float:
    start_sec = time.perf_counter()
    client.post("/v1/completions", json=body).raise_for_status()
    return time.perf_counter() - start_sec


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
