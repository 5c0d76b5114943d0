"""What Trimtab makes of one family, as host and as small model, against plain computations."""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.compatibility.families import WINDOW_TOKENS, Family, family_model, family_tokenizer
from trimtab.backends.chat import prompt_ids
from trimtab.backends.hf import HFModel, adopt_model, quiet_transformers
from trimtab.backends.live import Live
from trimtab.backends.padding import check_padding
from trimtab.backends.pair import open_pair
from trimtab.backends.token_tree import ModelCache, TokenTree, run_after, run_tree
from trimtab.backends.tree_check import check_tree
from trimtab.config import CarrierName, MountConfig, RecordConfig, TuneConfig
from trimtab.errors import TrimtabError
from trimtab.generate import steered
from trimtab.mount import mount
from trimtab.record import record
from trimtab.steering.mounted import Mounted
from trimtab.steering.processor import mixture_of, open_live
from trimtab.steering.rows import row_of
from trimtab.steering.scoring import score_document
from trimtab.tune import tune

PROMPTS = ("The rudder turns the hull and the mast of", "The anchor")
TEXT = "The rudder turns the hull and the anchor."
SOURCE = "A rudder, a hull."
CELLS = ("logits", "head", "memory", "head+memory", "expert", "small")
LOGIT_TOLERANCE = 1e-4
STATE_TOLERANCE = 1e-4
NATS_TOLERANCE = 1e-3
LEAST_NATS = -12.0
"""Tokens that are less likely are left out: rows of a batch share the candidates for steering, and
what is no candidate is steered as one tail."""
TARGET_NATS_TOLERANCE = 0.05
"""Of encoder-decoders: a step of generation leaves a target's end to the host, a row does not."""


@dataclass(frozen=True)
class Cell:
    """What was found of a family and a carrier.

    Attributes:
        status: works, refused, wrong, or failed where an error came that is none of Trimtab's.
        worst: Largest difference from the plain computation: logits, nats or states.
        message: Of the refusal or error, or what is wrong.
    """

    status: str
    worst: float | None = None
    message: str = ""


class _Wrong(Exception):
    def __init__(self, what: str, worst: float) -> None:
        super().__init__(what)
        self.worst = worst


def measure(family: Family, adapter: Path, folder: Path) -> dict[str, Cell]:
    """All cells of a family; what its own code says names no file of this machine.

    Args:
        family: Which.
        adapter: One with all carriers, of a small model with the same tokenizer.
        folder: For the expert that is tuned here.
    """
    with quiet_transformers():
        hosts: list[HFModel] = []
        cells = {"logits": _cell(lambda: _logits(family, hosts))}
        if not hosts:
            return cells
        host = hosts[0]
        asked: dict[str, tuple[CarrierName, ...]] = {
            "head": ("head",),
            "memory": ("memory",),
            "head+memory": ("head", "memory"),
            "expert": ("expert",),
        }
        for name, carriers in asked.items():
            cells[name] = _cell(lambda carriers=carriers: _steering(host, adapter, carriers))
        if not host.is_encoder_decoder:
            cell = _cell(lambda: _small(host, folder))
            message = cell.message.replace(str(folder / "model"), family.name)
            message = message.replace(str(folder), "a folder")
            cells["small"] = replace(cell, message=message)
        return cells


def _cell(run: Callable[[], float]) -> Cell:
    try:
        return Cell("works", run())
    except TrimtabError as error:
        return Cell("refused", message=error.message)
    except _Wrong as error:
        return Cell("wrong", error.worst, str(error))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = (str(error) or type(error).__name__).splitlines()[0]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return Cell("failed", message=f"{type(error).__name__}: {said} ({where})")


def _within(what: str, found: float, tolerance: float) -> float:
    if not found <= tolerance:
        raise _Wrong(f"{what}: {found:.2g}, expected at most {tolerance:.2g}", found)
    return found


def _logits(family: Family, hosts: list[HFModel]) -> float:
    host = adopt_model(family.name, family_model(family), family_tokenizer())
    hosts.append(host)
    ids = torch.tensor([list(range(40, 40 + 2 * WINDOW_TOKENS))] * 2)
    ids[1, 3:] += 7
    with torch.no_grad():
        ours, own = host.unembedding.logits(host.hidden(ids)), host.logits(ids)
    return _within("logits of the hidden state", float((ours - own).abs().max()), LOGIT_TOLERANCE)


def _steering(host: HFModel, adapter: Path, carriers: tuple[CarrierName, ...]) -> float:
    seat = {"adapter": adapter, "host": host.ref, "dtype": "float32", "cache": False}
    mounted = mount(MountConfig.model_validate(seat), host=host)
    live = (
        open_live(mounted, host, dtype="float32", draft_tokens=0) if "expert" in carriers else None
    )
    check_padding(host, [prompt_ids(host, prompt) for prompt in PROMPTS])
    batch = _inputs(host, PROMPTS)
    plain = host.model.generate(**batch, **_options(host, 3))
    with steered(host, mounted, carriers=carriers, strength=0) as model:
        same = model.generate(**batch, **_options(host, 3))
    equal = all(torch.equal(a, b) for a, b in zip(plain.scores, same.scores, strict=True))
    _within("strength 0 against the bare host", 0.0 if equal else float("inf"), 0.0)
    worst = 0.0
    with steered(host, mounted, carriers=carriers, live=live) as model:
        found = model.generate(**batch, **_options(host, 3))
        if all(torch.equal(a, b) for a, b in zip(found.scores, plain.scores, strict=True)):
            raise _Wrong("nothing was steered", 0.0)
        for row, prompt in enumerate(PROMPTS):
            bare = host_alone(host, prompt, plain, row)
            if bare > NATS_TOLERANCE:
                raise _Wrong("the bare host is another one with a cache than without", bare)
            for cached in (True, False):
                options = _options(host, 3, use_cache=cached)
                alone = model.generate(**_inputs(host, [prompt]), **options)
                apart = _apart(found.scores, alone.scores, row)
                what = (
                    f"a batch against each prompt alone {'with' if cached else 'without'} a cache"
                )
                worst = max(worst, _within(what, apart, NATS_TOLERANCE))
    after = host.model.generate(**batch, **_options(host, 3))
    equal = all(torch.equal(a, b) for a, b in zip(plain.scores, after.scores, strict=True))
    _within("the host after steering", 0.0 if equal else float("inf"), 0.0)
    return max(worst, _against_rows(host, mounted, carriers, live))


def host_alone(host: HFModel, prompt: str, plain: Any, row: int) -> float:
    """How far the bare host's batch is from what it makes of one prompt alone without a cache."""
    bare = type(host.model).generate(
        host.model, **_inputs(host, [prompt]), **_options(host, 3, use_cache=False)
    )
    return _apart(plain.scores, bare.scores, row)


def _apart(batch: Sequence[Tensor], alone: Sequence[Tensor], row: int) -> float:
    worst = 0.0
    for one, other in zip(batch, alone, strict=False):
        ours, theirs = one[row].log_softmax(-1), other[0].log_softmax(-1)
        some = torch.maximum(ours, theirs) > LEAST_NATS
        worst = max(worst, float((ours - theirs)[some].abs().max()))
        if int(one[row].argmax()) != int(other[0].argmax()):
            # What follows goes on from another token; a tie is within the tolerance.
            break
    return worst


def _against_rows(
    host: HFModel, mounted: Mounted, carriers: tuple[CarrierName, ...], live: Live | None
) -> float:
    steering = mixture_of(host, mounted, carriers, 1.0, live).steering
    source = SOURCE if host.is_encoder_decoder else None
    sizes = {"window_tokens": 64, "stride_tokens": 32}
    scored = score_document(host, TEXT, steering, source=source, **sizes)
    ids, logprobs = host.encode(TEXT), scored.rows[row_of(carriers)].logprobs
    worst, begin = 0.0, 0 if source else 1
    for place in (begin, len(ids) // 2, len(ids) - 1):
        begun = torch.tensor([host.context_ids() + ids[:place]])
        batch: dict[str, Tensor] = {"input_ids": begun}
        if source:
            batch = {"input_ids": torch.tensor([prompt_ids(host, source)])}
            batch["decoder_input_ids"] = begun
        with steered(host, mounted, carriers=carriers, live=live) as model:
            found = model.generate(**batch, **_options(host, 1))
        ours = float(found.scores[0][0].log_softmax(-1)[ids[place]])
        worst = max(worst, abs(ours - float(logprobs[place - begin])))
    tolerance = TARGET_NATS_TOLERANCE if source else NATS_TOLERANCE
    return _within("a step of generation against the row of evaluate", worst, tolerance)


def _options(host: HFModel, tokens: int, **more: Any) -> dict[str, Any]:
    forced = {"forced_bos_token_id": None, "forced_eos_token_id": None}
    return {
        "max_new_tokens": tokens,
        "do_sample": False,
        "num_beams": 1,
        "eos_token_id": None,
        "output_scores": True,
        "return_dict_in_generate": True,
        "pad_token_id": host.pad_id,
        **(forced if host.is_encoder_decoder else {}),
        **more,
    }


def _inputs(host: HFModel, prompts: Sequence[str]) -> dict[str, Tensor]:
    return host.padded([prompt_ids(host, prompt) for prompt in prompts])


def _small(host: HFModel, folder: Path) -> float:
    host.model.save_pretrained(folder / "model")
    host.tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT * 12, encoding="utf-8")
    settings: dict[str, Any] = {"model": str(folder / "model"), "out": folder / "expert"}
    settings |= {"data": (str(folder / "text.txt"),), "held_out": 0, "learning_rate": 1e-2}
    settings |= {"dtype": "float32", "window_tokens": 32, "max_tokens": 64, "epochs": 1}
    tune(TuneConfig.model_validate(settings))
    settings = {"expert": folder / "expert", "out": folder / "recording", "dtype": "float32"}
    settings |= {"general": (str(folder / "text.txt"),), "window_tokens": 32, "stride_tokens": 24}
    record(RecordConfig.model_validate(settings))
    pair = open_pair(folder / "expert", dtype="float32")
    check_tree(pair.reference)
    worst = _tree_apart(pair.reference)
    with pair.as_expert() as expert:
        worst = max(worst, _tree_apart(expert))
    return _within("a branching tree against plain passes", worst, STATE_TOLERANCE)


def _tree_apart(model: HFModel) -> float:
    """Largest difference between nodes of two trees, read one after the other, and plain passes."""
    cached, worst = ModelCache(), 0.0
    trunk = [40 + 3 * n for n in range(2 * WINDOW_TOKENS)]
    for length in (WINDOW_TOKENS + 1, 2 * WINDOW_TOKENS):
        begin, tree = trunk[:length], TokenTree()
        sequences = [[*begin, 33, 34, 35], [*begin, 33, 36], [*begin, 37, 38]]
        lines = [tree.line(tree.add(sequence)) for sequence in sequences]
        states = run_tree(model, tree, cached)
        leaves = [(lines[1][-1], 50), (lines[2][-2], 51), (lines[0][length - 2], 52)]
        after = run_after(model, tree, leaves, cached)
        for sequence, line in zip(sequences, lines, strict=True):
            plain = model.hidden(torch.tensor([sequence]))[0]
            worst = max(worst, float((states[line] - plain).abs().max()))
        for (node, token), state in zip(leaves, after, strict=True):
            sequence = [*(tree.tokens[n] for n in tree.line(node)), token]
            plain = model.hidden(torch.tensor([sequence]))[0, -1]
            worst = max(worst, float((state - plain).abs().max()))
    return worst
