r"""Does an expert of another tokenizer steer as well as an equal one of the host's own?

    python -m bench.equal_experts --pair PAIR --same SMALL --domain NAME --out RESULT

Both small models learn the same text, and the one that shares the host's tokenizer is stopped where
it pays as many bits per byte of the test text as the other: two that are equal on other text may
differ on this one, and then are not what is asked for. Each makes an adapter of the same text; both
adapters steer the host over the same test text. What is asked is which share of the one gain the
other is. The pair of two tokenizers is the transfer suite's, with its adapter and scores.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.transfer.domains import DOMAINS
from bench.transfer.pairs import PAIRS, Pair, model_ref, pair_of
from bench.transfer.steps import BOTH_ROWS
from bench.transfer.suite import FOLDER, Run, adapter_of, lay_out_texts, prepare
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.backends.pair import open_pair
from trimtab.cli_errors import run_program
from trimtab.errors import InputError
from trimtab.evaluate import scores_by_row
from trimtab.metrics import DocumentScore, bits_per_byte, bootstrap, draws, resampled_bits
from trimtab.progress import Display
from trimtab.store.expert import HeldOut, read_expert
from trimtab.store.files import package_versions, write_json
from trimtab.store.home import HOME_VARIABLE

STEERED = ("head", "memory", "head+memory", "live", "all")
FIRST_TOKENS, TRIALS = 2_048, 5
"""Training tokens of the first trial, and how many trials there are to come near."""

NEAR_SHARE = 0.005
"""Experts whose bits per byte differ by less are equal."""

Scores = Mapping[str, Sequence[DocumentScore]]


def held_out(expert: Path) -> HeldOut:
    """What an expert makes of the text that was held out of its training."""
    found = read_expert(expert, verify=False).held_out
    if found is None:
        raise InputError(f"{expert} held no text out", hint="tune it with --held-out above 0")
    return found


def stopped(
    run: Run,
    goal_bits: float,
    adapter: Path,
    display: Display,
    *,
    first_tokens: int = FIRST_TOKENS,
) -> Path:
    """An expert that pays about as many bits per byte of the test text as is asked for.

    A loss falls about evenly with the logarithm of what was learnt from, so the number of tokens is
    halved, doubled, or set by a line between the two nearest that lie on both sides.

    Args:
        run: The small model and its text.
        goal_bits: What is asked for.
        adapter: Any adapter of this domain; the evaluation wants one.
        display: Shows progress.
        first_tokens: Training tokens of the first trial.

    Raises:
        InputError: The small model is better untuned.
    """

    def bits_of(name: str, model: HFModel) -> float:
        found = run.evaluated(name, ("host",), display, adapter=adapter, host=model)
        return bits_per_byte(scores_by_row(found.scored[""], ("host",))["host"])

    untuned_bits = bits_of("untuned", open_model(model_ref(run.pair.small)))
    if untuned_bits <= goal_bits:
        raise InputError(
            f"{run.pair.small} pays {untuned_bits:.3f} bits per byte untuned, less than the other"
            f" expert's {goal_bits:.3f}: no training makes the two equal",
            hint="take another --domain or another small model",
        )
    found: dict[int, tuple[float, Path]] = {}  # by the tokens that it learnt from
    tokens = first_tokens
    for _ in range(TRIALS):
        out = run.folder / "experts" / str(tokens)
        expert = run.tuned(run.pair.small, out, display, max_tokens=tokens)
        with open_pair(expert, progress=display.progress).as_expert() as tuned:
            bits = bits_of(f"trial-{tokens}", tuned)
        print(f"{tokens:,} tokens: {bits:.4f} bits per byte for {goal_bits:.4f}", flush=True)
        learnt_tokens = read_expert(expert, verify=False).train_tokens
        is_known = learnt_tokens in found
        found[learnt_tokens] = (bits, expert)
        if abs(bits / goal_bits - 1) < NEAR_SHARE or (is_known and bits > goal_bits):
            break
        tokens = next_tokens({n: one for n, (one, _) in found.items()}, goal_bits)
    return min(found.values(), key=lambda one: abs(one[0] - goal_bits))[1]


def next_tokens(found: Mapping[int, float], goal_bits: float) -> int:
    """How many training tokens to try after those whose bits per byte are known."""
    worse = [n for n, bits in found.items() if bits > goal_bits]
    better = [n for n, bits in found.items() if bits <= goal_bits]
    if not better:
        return 2 * max(worse)
    if not worse:
        return min(better) // 2
    low, high = max(worse), min(better)
    between = (found[low] - goal_bits) / (found[low] - found[high])
    return round(low * (high / low) ** between)


def scores(run: Run, display: Display) -> Scores:
    """What each row pays for each document of the test text."""
    return scores_by_row(run.evaluated("both", BOTH_ROWS, display).scored[""], BOTH_ROWS)


def shares(other: Scores, same: Scores, *, seed: int = 0) -> dict[str, dict[str, float]]:
    """Of each steered row's gain with the same tokenizer, what part the other's is, in percent.

    Errors are by bootstrap over documents, which both rows share.
    """
    drawn = draws(len(same["host"]), seed)
    found = {}
    for row in STEERED:
        gains, resampled = [], []
        for one in (other, same):
            gains.append(bits_per_byte(one["host"]) - bits_per_byte(one[row]))
            resampled.append(resampled_bits(one["host"], drawn) - resampled_bits(one[row], drawn))
        ratio = resampled[0] / resampled[1]
        found[row] = {
            "other_gain_bits_per_byte": gains[0],
            "same_gain_bits_per_byte": gains[1],
            "share_percent": 100 * gains[0] / gains[1],
            "stderr_percent": float(100 * np.std(ratio)),
        }
    return found


def measure(given: argparse.Namespace) -> None:
    """Make both adapters, steer the host with both, and write what was found."""
    display, pair = Display(), pair_of(given.pair, None, None)
    equal = Pair(f"equal-to-{pair.name}", given.same, pair.host)
    runs = {
        which: Run(
            one,
            given.domain,
            given.seed,
            base,
            given.test_tokens,
            scores_general=False,
            train_bytes=given.train_bytes,
        )
        for which, one, base in (
            ("other", pair, given.folder),
            ("same", equal, given.folder / "equal"),
        )
    }
    other, same = runs["other"], runs["same"]
    prepare(other, display)
    lay_out_texts(same)
    found = compared(other, same, display, first_tokens=given.first_tokens)
    what = (__doc__ or "").split("\n")[0]
    write_json(given.out, {"schema": 1, "what": what} | found | {"packages": package_versions()})
    for row, one in found["shares"].items():
        print(f"{row}: {one['share_percent']:.0f} +- {one['stderr_percent']:.0f} %")


def compared(
    other: Run, same: Run, display: Display, *, first_tokens: int = FIRST_TOKENS
) -> dict[str, Any]:
    """What both adapters gain on their host, and which part of the one the other is.

    Args:
        other: The pair of two tokenizers; its adapter is made.
        same: The pair of one; its texts are laid out.
        display: Shows progress.
        first_tokens: Training tokens of the first trial.
    """
    first = other.lora(other.pair.small, display)
    of_other = scores(other, display)
    goal_bits = bits_per_byte(of_other["expert"])
    equal = stopped(same, goal_bits, other.adapter, display, first_tokens=first_tokens)
    adapter_of(same, equal, display)
    of_same = scores(same, display)
    return {
        "host": other.pair.host,
        "domain": other.domain,
        "seed": other.seed,
        "documents": len(of_other["host"]),
        "experts": {
            "other": _described(other.pair.small, first, of_other),
            "same": _described(same.pair.small, equal, of_same),
        },
        "shares": shares(of_other, of_same, seed=other.seed),
    }


def _described(model: str, expert: Path, rows: Scores) -> dict[str, Any]:
    """An expert and what rows pay that it steers, in bits per byte."""
    quality = held_out(expert)
    return {
        "model": model,
        "train_tokens": read_expert(expert, verify=False).train_tokens,
        "held_out_bits_per_byte_untuned": quality.bits_per_byte_before,
        "held_out_bits_per_byte": quality.bits_per_byte_after,
        "rows": {row: asdict(bootstrap(of_row)) for row, of_row in rows.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pair", required=True, choices=list(PAIRS), help="of two tokenizers")
    parser.add_argument("--same", required=True, help="small model of the host's tokenizer")
    parser.add_argument("--domain", required=True, choices=list(DOMAINS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-tokens", type=int, default=10_000)
    parser.add_argument("--train-bytes", type=int, help="training text, if not the domain's budget")
    parser.add_argument(
        "--first-tokens", type=int, default=FIRST_TOKENS, help="training tokens of the first trial"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="the transfer suite's")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    os.environ.setdefault(HOME_VARIABLE, "build/cache")
    run_program(lambda: measure(given))


if __name__ == "__main__":
    main()
