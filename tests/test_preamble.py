"""A host that reads the same tokens before every text."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trimtab.backends.chat import chat_ids, prompt_ids
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.backends.tiny import MAX_POSITIONS
from trimtab.errors import InputError
from trimtab.steering.host_states import host_states
from trimtab.steering.predictors import Steering
from trimtab.steering.scoring import score_document
from trimtab.text.corpus import scored_windows
from trimtab.types import silent

PREAMBLE = "pub fn add(a: u32, b: u32) u32 { return a + b; }\n"
TEXT = "pub fn double(a: u32) u32 { return add(a, a); }\n"
FAMILIES = ["tiny:llama?vocab=bpe", "tiny:gemma3", "tiny:gpt2?vocab=bpe", "tiny:t5"]


def opened(ref: str, preamble: str = PREAMBLE) -> tuple[HFModel, HFModel]:
    """A host, and the same host that reads a preamble."""
    host = open_model(ref, dtype="float32")
    return host, replace(host, preamble=tuple(host.encode(preamble)))


def plain_logits(host: HFModel, before: list[int], ids: list[int]) -> Tensor:
    """The model's own logits at each of `ids`, after the first token and `before`."""
    read = [*host.first_ids, *before, *ids]
    return host.logits(torch.tensor([read]))[0, -len(ids) :]


@pytest.mark.parametrize("window", [256, 16])
@pytest.mark.parametrize("ref", FAMILIES)
def test_a_text_is_scored_as_after_the_preamble(ref: str, window: int) -> None:
    host, read = opened(ref)
    ids, before, expected = host.encode(TEXT), host.encode(PREAMBLE), []
    for part in scored_windows(len(ids), window, window // 2):
        shown = ids[part.start : part.end]
        logprobs = plain_logits(host, before, shown).log_softmax(-1)
        for place in range(part.score_from - part.start, len(shown)):
            expected.append(logprobs[place - 1, shown[place]])
    sizes = {"window_tokens": window, "stride_tokens": window // 2}
    scored = score_document(read, TEXT, Steering(("host",)), **sizes)
    assert scored.token_ids == tuple(ids[1:])
    found = scored.rows["host"].logprobs.float()
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)
    bare = score_document(host, TEXT, Steering(("host",)), **sizes).rows["host"].logprobs.float()
    assert not torch.allclose(found, bare, atol=1e-2)


@pytest.mark.parametrize("ref", FAMILIES)
def test_states_are_those_after_the_preamble(ref: str) -> None:
    host, read = opened(ref)
    states = host_states(read, [TEXT.encode(), TEXT.encode()], "reading", silent)
    ids = host.encode(TEXT)
    assert states.token_ids.tolist() == ids * 2
    logits = plain_logits(host, host.encode(PREAMBLE), ids)
    with torch.no_grad():
        found = host.unembedding.logits(states.hidden)
    torch.testing.assert_close(found, torch.cat([logits, logits]), atol=1e-4, rtol=1e-4)


def test_host_and_fingerprint_stay_as_they_were() -> None:
    host, read = opened("tiny:gemma3")
    assert host.context_ids() == host.first_ids == [256]
    assert read.context_ids() == [256, *PREAMBLE.encode()]
    assert read.model is host.model and read.fingerprint == host.fingerprint


def test_a_chat_reads_the_preamble_after_a_single_first_token() -> None:
    _, read = opened("tiny:gemma3", "ab")
    read.tokenizer.chat_template = "<bos>{{ messages[0]['content'] }}"
    assert chat_ids(read, "c") == [256, *b"abc"]
    assert prompt_ids(read, "c") == [256, *b"abc"]


def test_positions_count_the_preamble() -> None:
    host = open_model("tiny:gpt2", dtype="float32")
    with pytest.raises(InputError, match="has positions for 2048") as refused:
        replace(host, preamble=(7,) * MAX_POSITIONS)
    assert "shorten the preamble" in refused.value.hint
    full = replace(host, preamble=(7,) * (MAX_POSITIONS - 4))
    text = "ten bytes."
    # Windows shrink to the four positions that are left.
    states = host_states(full, [text.encode()], "reading", silent)
    assert len(states.hidden) == 10
    last = plain_logits(host, [7] * (MAX_POSITIONS - 4), host.encode(text[-4:]))[-1]
    with torch.no_grad():
        found = host.unembedding.logits(states.hidden[-1])
    torch.testing.assert_close(found, last, atol=1e-4, rtol=1e-4)
    assert score_document(full, text, Steering(), window_tokens=4, stride_tokens=2).token_ids
    with pytest.raises(InputError, match="2049 tokens at once, 2044 of them the preamble"):
        score_document(full, text, Steering(), window_tokens=5, stride_tokens=2)
    with pytest.raises(InputError, match="2050 tokens at once and has positions for 2048"):
        host.logits(torch.zeros(1, MAX_POSITIONS + 2, dtype=torch.long))
