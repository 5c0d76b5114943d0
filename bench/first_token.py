r"""How long a steered prompt takes to its first token, read once by the small models and twice.

    python -m bench.first_token --adapter FOLDER --host MODEL --small MODEL --zig FOLDER \\
        --leave-out FOLDER ... --out RESULT.json

A prompt's last tokens are asked about as evidence, for which expert and reference read it; the
answer goes on from there. Ways take turns: the host alone; with all carriers, the small models
going on from what they have read; and with their reading forgotten between the two. Prompts: the
beginnings of Zig files that lie in none of the folders to leave out.
"""

from functools import partial

import torch
from torch import Tensor

from bench import held_out
from bench.timed_rows import medians_sec, write_rows
from trimtab import MountConfig
from trimtab.backends.hf import HFModel
from trimtab.backends.live import Live
from trimtab.backends.open import open_model
from trimtab.backends.reading import RowText
from trimtab.mount import mount
from trimtab.progress import Display
from trimtab.steering.evidence import Mixture, ReadPrompt, readable, text_before, text_ids
from trimtab.steering.predictors import Rows
from trimtab.steering.processor import mixture_of, open_live

PROMPT_TOKENS = (128, 256, 512, 1024)
REPETITIONS = 7
ROW = 0


def main() -> None:
    """Measure and write."""
    given = held_out.arguments(__doc__).parse_args()
    display = Display()
    host = open_model(given.host, progress=display.progress)
    config = MountConfig(adapter=given.adapter, host=given.host)
    mounted = mount(config, host=host, progress=display.progress)
    live = open_live(mounted, host, small=given.small, progress=display.progress)
    mixture = mixture_of(host, mounted, ("head", "memory", "expert"), 1.0, live)
    texts = [d.text for d in held_out.free_zig(given.zig, given.leave_out)]
    rows: list[dict[str, object]] = []
    for tokens in PROMPT_TOKENS:
        ids = next(found for text in texts if len(found := host.encode(text)) >= tokens)
        prompt = torch.tensor([*host.context_ids(), *ids[:tokens]])
        ways = {
            "host": partial(_bare, host, prompt),
            "read_once": partial(_steered, host, mixture, live, prompt, twice=False),
            "read_twice": partial(_steered, host, mixture, live, prompt, twice=True),
        }
        found_sec = medians_sec(ways, REPETITIONS)
        rows.append({"tokens": tokens, **{way: round(sec, 3) for way, sec in found_sec.items()}})
        print(rows[-1], flush=True)
    what = f"median seconds to a prompt's first token, {host.model.dtype}; see bench/first_token.py"
    write_rows(given.out, what, rows)


@torch.inference_mode()
def _bare(host: HFModel, prompt: Tensor) -> Tensor:
    hidden = host.hidden(prompt[None])[0]
    return host.unembedding.logits(hidden[-1:])


@torch.inference_mode()
def _steered(host: HFModel, mixture: Mixture, live: Live, ids: Tensor, *, twice: bool) -> Tensor:
    live.forget(ROW)
    hidden = host.hidden(ids[None])[0]
    pieces = tuple(host.vocabulary.token_bytes[i] for i in ids.tolist())
    prompt = ReadPrompt(ids, pieces, hidden, row=ROW)
    weights = mixture.weigh(host.unembedding, prompt)
    if twice:
        live.forget(ROW)
    text = text_before(pieces)
    host_ids = text_ids(ids, pieces, 0, len(ids))
    [reading] = live.read_rows([RowText(ROW, readable(text), host_ids)])
    logits = host.unembedding.logits(hidden[-1:]).float()
    return mixture.logprobs(
        Rows(logits, hidden[-1:], (text,), ((reading, range(1)),)), weights[:, None]
    )


if __name__ == "__main__":
    main()
