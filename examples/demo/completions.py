"""How a host goes on after held-out functions, before and after; kept, since it takes a minute."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import trimtab
from examples.demo.corpus import HeldOutFunction
from trimtab import GenerateConfig
from trimtab.backends.hf import HFModel
from trimtab.progress import Display
from trimtab.report import Completion
from trimtab.store.adapter_schema import MANIFEST_NAME
from trimtab.store.files import sha256_file, write_json
from trimtab.store.home import read_kept

KEPT_NAME = "completions.json"
TOKENS = 32
COMPLETIONS_NOTE = (
    "All three carriers, the small model beside the host; greedy, and cut after"
    f" {TOKENS} tokens. Three samples show how it reads, not how good it is: greedy"
    " text of models this small falls into loops, steered or not. The figures above are the"
    " measure."
)


def completed(
    host: HFModel,
    adapter: Path,
    functions: Sequence[HeldOutFunction],
    *,
    kept: Path,
    display: Display,
) -> tuple[Completion, ...]:
    """Let a host complete functions without and with an adapter, unless that was done before.

    Args:
        host: The host, open.
        adapter: The adapter, with all three carriers.
        functions: What is completed.
        kept: File of the completions, for the next run.
        display: Shows the tokens.
    """
    if not functions:
        return ()
    asked = _fingerprint(host, adapter, functions)
    if (found := _read(kept, asked)) is not None:
        print("completions are there from an earlier run")
        return found
    prompts = tuple(function.prompt for function in functions)
    before, after = (_texts(host, seat, prompts, display) for seat in (None, adapter))
    found = tuple(
        Completion(function.name, function.prompt, function.truth, plain, steered)
        for function, plain, steered in zip(functions, before, after, strict=True)
    )
    write_json(kept, {"asked": asked, "completions": [asdict(one) for one in found]})
    return found


def _texts(
    host: HFModel, adapter: Path | None, prompts: tuple[str, ...], display: Display
) -> tuple[str, ...]:
    config = GenerateConfig(
        host=host.ref,
        adapter=adapter,
        carriers=("head", "memory", "expert") if adapter else None,
        prompt=prompts,
        max_new_tokens=TOKENS,
    )
    return trimtab.generate(config, host=host, progress=display.progress).texts


def _fingerprint(host: HFModel, adapter: Path, functions: Sequence[HeldOutFunction]) -> str:
    asked = [host.ref, sha256_file(adapter / MANIFEST_NAME), TOKENS, *map(asdict, functions)]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _read(path: Path, asked: str) -> tuple[Completion, ...] | None:
    """Completions of an earlier run; none if it was asked something else, or wrote half a file."""
    kept = read_kept(path)
    if kept is None or kept.get("asked") != asked:
        return None
    return tuple(Completion(**one) for one in kept["completions"])
