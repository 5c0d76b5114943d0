"""Expert and reference beside a host: against their own distributions and plain forward passes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.align.covers import Cover, covers_of
from trimtab.backends import token_tree
from trimtab.backends.hf import HFModel, adopt_model
from trimtab.backends.live import Live
from trimtab.backends.open import open_model
from trimtab.backends.pair import Pair, open_pair
from trimtab.backends.reading import RowText
from trimtab.backends.token_tree import ModelCache, TokenTree, run_after, run_tree
from trimtab.config import TuneConfig
from trimtab.tune import tune

SMALL = "tiny:llama?vocab=bpe"
FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "gpt2")
TEXT = "The small rudder turns the large one, and the large one turns the ship. "
CONTEXTS = [
    b"The",
    b"The small rudder",
    b"The small rudder turns ",
    b"The small ship",
    b"The small ship\n    ",
    "The small €".encode()[:-1],
    b"The  ",
    b"ship\n\n",
    b"",
]
steady = settings(deadline=None, derandomize=True, max_examples=40)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("expert")
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"{number}: {TEXT * 6}")
    config = {
        "model": SMALL,
        "data": (str(folder / "*.txt"),),
        "out": folder / "expert",
        "learning_rate": 1e-2,
        "window_tokens": 64,
        "epochs": 12,
        "validations": 1,
        "dtype": "float32",
    }
    return open_pair(tune(TuneConfig.model_validate(config)).folder, dtype="float32")


@pytest.fixture(scope="module")
def same_host() -> HFModel:
    return open_model("tiny:qwen3?vocab=bpe&seed=4", dtype="float32")


@pytest.fixture(scope="module")
def byte_host() -> HFModel:
    return open_model("tiny:gpt2?vocab=bytes&seed=5", dtype="float32")


def host_probs(rows: int, vocab: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(rows, vocab, generator=generator)).softmax(-1)


def scores(
    live: Live, contexts: list[bytes], probs: Tensor, row: int | None = None
) -> tuple[Tensor, Tensor]:
    reading = live.read(contexts, row=row)
    found = live.score(reading, range(len(contexts)), probs, torch.arange(probs.shape[1]))
    return found.expert, found.reference


def test_rows_that_only_the_small_models_have_are_not_expected_of_the_host() -> None:
    filled: list[HFModel] = []
    for seed in (1, 2):
        small = open_model(f"{SMALL}&seed={seed}", dtype="float32")
        tokens = len(small.vocabulary)
        small.model.resize_token_embeddings(tokens + 8, mean_resizing=False)
        with torch.no_grad():
            small.model.lm_head.weight[tokens:] *= 8
        filled.append(adopt_model(small.ref, small.model, small.tokenizer))
    host = open_model("tiny:qwen3?vocab=bpe&seed=4", dtype="float32")
    live = Live(Pair(*filled), host)
    assert live.is_one_vocabulary and len(filled[0].vocabulary) > len(host.vocabulary)
    reading = live.read(CONTEXTS[:3])
    assert int(live.expected_small(reading, range(3), 16).max()) >= len(host.vocabulary)
    assert int(live.expected(reading, range(3)).max()) < len(host.vocabulary)
    probs = host_probs(3, len(host.vocabulary))
    expert, _ = scores(live, CONTEXTS[:3], probs)
    torch.testing.assert_close(expert.sum(-1), torch.ones(3), atol=1e-5, rtol=0)


def own(pair: Pair, text: bytes) -> tuple[Tensor, Tensor]:
    """Expert's and reference's next-token probabilities after the tokenizer's own reading."""
    ids = torch.tensor([pair.reference.encode(text.decode())])
    logits = pair.expert_logits(ids)[0, -1], pair.reference_logits(ids)[0, -1]
    return logits[0].softmax(-1), logits[1].softmax(-1)


sequences = st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=6)


@steady
@given(sequences=sequences)
def test_a_tree_holds_each_beginning_once(sequences: list[list[int]]) -> None:
    tree = TokenTree()
    ends = [tree.add(sequence) for sequence in sequences]
    beginnings = {tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)}
    assert len(tree.tokens) == len(beginnings)
    visible = tree.visible()
    for sequence, end in zip(sequences, ends, strict=True):
        line = tree.line(end)
        assert [tree.tokens[node] for node in line] == sequence
        assert [tree.depths[node] for node in line] == list(range(len(line)))
        if line:
            assert sorted(line) == torch.nonzero(visible[end])[:, 0].tolist()
    trunk = tree.trunk()
    assert tree.parents[:trunk] == list(range(-1, trunk - 1))
    assert trunk == len(tree.tokens) or tree.parents[trunk] != trunk - 1 or len(sequences) > 1


def test_the_trunk_ends_at_the_first_branch() -> None:
    tree = TokenTree()
    assert tree.trunk() == 0
    tree.add([1, 2, 3, 4])
    assert tree.trunk() == 4
    tree.add([1, 2, 5])
    assert tree.trunk() == 2
    tree.add([9])
    assert tree.trunk() == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_is_read_as_each_sequence_alone(family: str) -> None:
    model = open_model(f"tiny:{family}?vocab=bpe", dtype="float32")
    live = Live(Pair(model, model), model)
    reading = live.read(CONTEXTS)
    start = model.context_ids()
    for ways, ends in zip(reading.covers, reading.ends, strict=True):
        for cover, end in zip(ways, ends, strict=True):
            alone = model.hidden(torch.tensor([[*start, *cover.tokens]]))[0, -1]
            torch.testing.assert_close(reading.states.reference[end], alone, atol=1e-4, rtol=1e-4)


def test_the_same_vocabulary_gives_the_small_models_own_distribution(
    pair: Pair, same_host: HFModel
) -> None:
    live = Live(pair, same_host)
    contexts = [b"The small rudder", b"The small rudder turns the large one,"]
    probs = host_probs(2, len(same_host.vocabulary))
    is_text = torch.tensor([text is not None for text in same_host.vocabulary.token_bytes])
    probs = probs * is_text / (probs * is_text).sum(-1, keepdim=True)
    for found, side in zip(scores(live, contexts, probs), (0, 1), strict=True):
        for row, context in zip(found, contexts, strict=True):
            # Other readings of the context have little weight, here as in a trained model.
            distance = 0.5 * (row - own(pair, context)[side]).abs().sum()
            assert distance < 0.1


def test_equal_tokens_are_compared_without_their_strings(
    pair: Pair, same_host: HFModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = Live(pair, same_host)
    texts = ["The small rudder", "The small rudder turns the large one,", "The"]
    ids = [same_host.encode(text) for text in texts]
    reading = live.read([text.encode() for text in texts], host_ids=ids)
    probs = host_probs(3, len(same_host.vocabulary))
    # Rows of padding, tokens of no text, and a choice of the others, in any order.
    for token_ids in (torch.arange(probs.shape[1]), torch.randperm(probs.shape[1])[:200]):
        asked = reading, range(3), probs[:, token_ids], token_ids
        direct = live.score(*asked)
        with monkeypatch.context() as patch:
            patch.setattr("trimtab.backends.live.reads_host_tokens", lambda _: False)
            by_strings = live.score(*asked)
        canonical = torch.tensor(
            [
                text is None or same_host.encode_following(text.decode(errors="ignore")) == [i]
                for i, text in enumerate(same_host.vocabulary.token_bytes)
            ]
        )[token_ids]
        for one, other in zip(direct, by_strings, strict=True):
            torch.testing.assert_close(one[:, canonical], other[:, canonical], atol=1e-5, rtol=1e-3)


def oracle_bytes(pair: Pair, context: bytes, side: int) -> Tensor:
    """Next-byte probabilities by every cover, from plain forward passes; exact for its covers."""
    vocabulary = pair.vocabulary
    total = torch.zeros(256, dtype=torch.float64)
    covers = covers_of(context, pair.reference.encode, vocabulary)
    if covers[0].tokens and not covers[0].rest:
        *before, last = covers[0].tokens
        text = vocabulary.token_bytes[last] or b""
        inside = [(vocabulary.ids_by_bytes.get(text[:n]), text[n:]) for n in range(1, len(text))]
        through = [Cover((*before, i), rest) for i, rest in inside if i is not None]
        covers += [cover for cover in through if cover not in covers and before]
    for cover in covers:
        if not cover.tokens:
            continue
        ids = torch.tensor([list(cover.tokens)])
        logits = (pair.expert_logits if side == 0 else pair.reference_logits)(ids)[0].double()
        logprobs = logits.log_softmax(-1)
        path = sum(float(logprobs[i - 1, t]) for i, t in enumerate(cover.tokens) if i)
        for token_id, text in enumerate(vocabulary.token_bytes):
            if text and text.startswith(cover.rest) and len(text) > len(cover.rest):
                share = torch.tensor(path).double() + logprobs[-1, token_id]
                total[text[len(cover.rest)]] += share.exp()
    return total / total.sum()


@pytest.mark.parametrize("context", [c for c in CONTEXTS if len(c) > 3])
def test_a_byte_host_gets_next_byte_probabilities(
    pair: Pair, byte_host: HFModel, context: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With nothing passed over for speed, a byte host gets what the covers say, exactly.
    monkeypatch.setattr("trimtab.align.follow.FOLLOWED_TOKENS", 512)
    monkeypatch.setattr("trimtab.align.follow.FOLLOWED_SHARE", 0.0)
    monkeypatch.setattr("trimtab.backends.ways.MIN_SHARE", 0.0)
    monkeypatch.setattr("trimtab.backends.ways.MIN_INSIDE", 1e-30)
    monkeypatch.setattr("trimtab.backends.live.DOUBT", 0.0)
    live = Live(pair, byte_host)
    probs = host_probs(1, len(byte_host.vocabulary))
    for side, found in enumerate(scores(live, [context], probs)):
        given_text = found[0, :256] / found[0, :256].sum()
        oracle = oracle_bytes(pair, context, side)
        torch.testing.assert_close(given_text.double(), oracle, atol=1e-5, rtol=1e-3)
        assert float(found[0].sum()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("host", ["same_host", "byte_host"])
def test_many_contexts_are_scored_as_one_by_one(
    pair: Pair, host: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(host)
    live = Live(pair, model)
    probs = host_probs(len(CONTEXTS), len(model.vocabulary))
    together = scores(live, CONTEXTS, probs)
    alone = [scores(live, [c], probs[i : i + 1]) for i, c in enumerate(CONTEXTS)]
    for side in (0, 1):
        one_by_one = torch.cat([pair_of[side] for pair_of in alone])
        torch.testing.assert_close(together[side], one_by_one, atol=1e-4, rtol=1e-4)
        assert (together[side] >= -1e-6).all()
        assert (together[side].sum(-1) <= 1 + 1e-4).all()
    some = live.score(live.read(CONTEXTS), range(1, 3), probs[1:3], torch.arange(probs.shape[1]))
    torch.testing.assert_close(some.expert, together[0][1:3], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("host", ["same_host", "byte_host"])
def test_a_kept_cache_changes_nothing(
    pair: Pair, host: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(host)
    cached, plain = Live(pair, model), Live(pair, model)
    probs = host_probs(1, len(model.vocabulary))
    growing = [b"The small rudder turns the  ship\n"[:n] for n in (1, 4, 9, 10, 11, 26, 28, 33)]
    # It goes back, repeats itself, and turns to another text.
    other = [b"The small", b"The small", b"def f(x):\n    return", b"", b"The"]
    for context in [*growing, *other]:
        found, oracle = scores(cached, [context], probs, row=0), scores(plain, [context], probs)
        for side in (0, 1):
            torch.testing.assert_close(found[side], oracle[side], atol=1e-4, rtol=1e-4)


def test_rows_keep_their_own_caches(pair: Pair, byte_host: HFModel) -> None:
    live, plain = Live(pair, byte_host), Live(pair, byte_host)
    probs = host_probs(1, len(byte_host.vocabulary))
    for row, context in ((0, b"The ship"), (1, b"A rudder"), (0, b"The ship is"), (1, b"A rud")):
        found, oracle = scores(live, [context], probs, row=row), scores(plain, [context], probs)
        torch.testing.assert_close(found[0], oracle[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("host", ["same_host", "byte_host"])
@pytest.mark.parametrize("together_tokens", [token_tree.JOINT_TOKENS, 30])
def test_rows_that_are_read_together_are_read_as_alone(
    pair: Pair,
    host: str,
    together_tokens: int,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_tree, "JOINT_TOKENS", together_tokens)
    model = request.getfixturevalue(host)
    together, alone = Live(pair, model), Live(pair, model)
    every = torch.arange(len(model.vocabulary))
    # Rows grow, end, begin with nothing, stand in another order, and one goes on from a chat.
    chat = tuple(pair.reference.encode("<user>a<eos>", markup=True))
    steps = [
        {0: b"The small rudder", 1: b"", 2: b"A"},
        {0: b"The small rudder t", 1: b"T", 2: b"A "},
        {2: b"A ship", 0: b"The small rudder turns"},
        {3: b"The small", 2: b"A ship ", 0: b"The small rudder turns "},
        {0: b"The small rudder turns the"},
    ]
    for step in steps:
        texts = [
            RowText(
                row,
                text,
                model.encode(text.decode()),
                model.encode(text.decode())[-1] if text else None,
                chat if row == 2 else None,
            )
            for row, text in step.items()
        ]
        probs = host_probs(len(texts), len(model.vocabulary))
        readings = together.read_rows(texts)
        expected = [together.expected(reading, range(1)) for reading in readings]
        found = together.score_all([(one, range(1)) for one in readings], probs, every)
        for number, text in enumerate(texts):
            reading = alone.read(
                [text.context],
                host_ids=[text.host_ids],
                host_lasts=[text.host_last],
                start=text.start,
                row=text.row,
            )
            oracle = alone.score(reading, range(1), probs[number : number + 1], every)
            for side, other in zip(found, oracle, strict=True):
                torch.testing.assert_close(side[number], other[0], atol=1e-5, rtol=1e-3)
            assert torch.equal(expected[number], alone.expected(reading, range(1)))


def test_rows_share_passes(pair: Pair, byte_host: HFModel) -> None:
    live, passes = Live(pair, byte_host), []
    texts = [RowText(row, f"{row}: The ship".encode(), []) for row in range(5)]
    handle = pair.reference.model.base_model.register_forward_hook(lambda *_: passes.append(1))
    try:
        live.read_rows(texts)
    finally:
        handle.remove()
    assert len(passes) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_given_tokens_are_read_first_and_never_given_back(family: str) -> None:
    model = open_model(f"tiny:{family}?vocab=bpe", dtype="float32")
    start = model.encode("<user>The<eos><assistant>", markup=True)
    assert model.vocabulary.eos_id in start
    reading = Live(Pair(model, model), model).read(CONTEXTS, start=start)
    for context, ways, ends in zip(CONTEXTS, reading.covers, reading.ends, strict=True):
        assert ways == covers_of(context, model.encode, model.vocabulary)
        for cover, end in zip(ways, ends, strict=True):
            alone = model.hidden(torch.tensor([[*start, *cover.tokens]]))[0, -1]
            torch.testing.assert_close(reading.states.reference[end], alone, atol=1e-4, rtol=1e-4)


def test_after_given_tokens_the_same_vocabulary_has_the_pairs_own_distribution() -> None:
    # Byte tokens read a text in one way only.
    one, two = (open_model(f"tiny:llama?seed={seed}", dtype="float32") for seed in (1, 2))
    small = Pair(one, two)
    start = one.encode("<user>The<eos><assistant>", markup=True)
    contexts = [b"", b"T", b"The ship"]
    is_text = torch.tensor([text is not None for text in one.vocabulary.token_bytes])
    probs = host_probs(len(contexts), len(is_text)) * is_text
    probs = probs / probs.sum(-1, keepdim=True)
    live = Live(small, one)
    for row in (None, 0):
        for context, host in zip(contexts, probs.split(1), strict=True):
            reading = live.read([context], start=start, row=row)
            found = live.score(reading, range(1), host, torch.arange(len(is_text)))
            ids = torch.tensor([[*start, *context]])
            for side, logits in zip(
                found, (small.expert_logits(ids), small.reference_logits(ids)), strict=True
            ):
                own_probs = logits[0, -1].masked_fill(~is_text, -torch.inf).softmax(-1)
                torch.testing.assert_close(side[0], own_probs, atol=1e-6, rtol=1e-4)


def test_a_kept_cache_after_given_tokens_changes_nothing(pair: Pair, byte_host: HFModel) -> None:
    cached, plain = Live(pair, byte_host), Live(pair, byte_host)
    probs, every = host_probs(1, len(byte_host.vocabulary)), torch.arange(len(byte_host.vocabulary))
    starts = [pair.reference.encode(text, markup=True) for text in ("<user>a<eos>", "<bos>b")]
    for start in starts:
        for context in (b"", b"The s", b"The sm", b"The small ", b"", b"A rudder"):
            found, oracle = (
                live.score(live.read([context], start=start, row=row), range(1), probs, every)
                for live, row in ((cached, 0), (plain, None))
            )
            torch.testing.assert_close(found.expert, oracle.expert, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found.reference, oracle.reference, atol=1e-4, rtol=1e-4)


def test_nothing_read_leaves_the_host_as_it_is(pair: Pair, same_host: HFModel) -> None:
    # Without a beginning-of-text token the small model cannot speak before the first token.
    live = Live(pair, same_host)
    probs = host_probs(1, len(same_host.vocabulary))
    expert, reference = scores(live, [b""], probs)
    assert torch.equal(expert, probs) and torch.equal(reference, probs)


def test_the_end_of_a_text_is_left_to_the_host(pair: Pair, byte_host: HFModel) -> None:
    live = Live(pair, byte_host)
    probs = host_probs(1, len(byte_host.vocabulary))
    end = byte_host.vocabulary.eos_id
    expert, reference = scores(live, [b"The small rudder turns"], probs)
    assert float(expert[0, end]) == pytest.approx(float(probs[0, end]), rel=1e-4)
    torch.testing.assert_close(expert[0, end], reference[0, end])


def test_the_expert_has_learned_more_than_the_reference(pair: Pair, byte_host: HFModel) -> None:
    live = Live(pair, byte_host)
    text = TEXT.encode()
    contexts = [text[:n] for n in range(20, 60)]
    probs = host_probs(len(contexts), len(byte_host.vocabulary))
    expert, reference = scores(live, contexts, probs)
    truth = torch.tensor([[text[n]] for n in range(20, 60)])
    gain = (expert.gather(1, truth) / reference.gather(1, truth)).log().mean()
    assert gain > 0.05


def test_the_references_own_states_are_those_of_the_plain_text(
    pair: Pair, byte_host: HFModel
) -> None:
    contexts = CONTEXTS[:6]
    reading = Live(pair, byte_host).read(contexts)
    found = reading.reference_states(range(len(contexts)))
    for context, state in zip(contexts[:5], found, strict=False):
        ids = pair.reference.context_ids() + pair.reference.encode(context.decode())
        plain = pair.reference.hidden(torch.tensor([ids]))[0, -1]
        assert state is not None
        torch.testing.assert_close(state, plain, atol=1e-4, rtol=1e-3)
    # No token of its own ends where the context cuts a character.
    assert found[5] is None


def test_a_token_that_the_host_has_ended_does_not_go_on(
    same_host: HFModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.align.cut.ASKED_TOKENS", 256)
    monkeypatch.setattr("trimtab.backends.live.DOUBT", 0.0)
    # Byte models beside a host with longer tokens: after "T" no "h" where "Th" is a token.
    one, two = (open_model(f"tiny:llama?seed={seed}", dtype="float32") for seed in (1, 2))
    live, token_bytes = Live(Pair(one, two), same_host), same_host.vocabulary.token_bytes
    longer = next(
        text
        for text in token_bytes
        if text and len(text) == 2 and text.isalpha() and text.isascii()
    )
    assert len(same_host.encode(longer.decode())) == 1
    last = same_host.vocabulary.ids_by_bytes[longer[:1]]
    goes_on = [i for i, text in enumerate(token_bytes) if text and text.startswith(longer[1:])]
    every, probs = torch.arange(len(token_bytes)), host_probs(1, len(token_bytes))
    for lasts, forbidden in (([last], True), (None, False)):
        reading = live.read([longer[:1]], host_lasts=lasts)
        found = live.score(reading, range(1), probs, every)
        for side in found:
            assert (float(side[0, goes_on].sum()) == 0.0) is forbidden
            assert float(side.sum()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("row", [None, 3])
def test_a_host_with_longer_tokens_is_told_by_the_small_models(
    same_host: HFModel, row: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Byte models beside host tokens of one and two bytes: two steps of theirs say all, exactly.
    for name, value in (("replies.MAX_ASKED", 512), ("replies.MIN_UNDECIDED", 0.0)):
        monkeypatch.setattr(f"trimtab.align.{name}", value)
    for name, value in (("FOLLOWED_TOKENS", 512), ("FOLLOWED_SHARE", 0.0), ("FORESEEN_PROB", 2.0)):
        monkeypatch.setattr(f"trimtab.align.follow.{name}", value)
    monkeypatch.setattr("trimtab.backends.live.DOUBT", 0.0)
    models = [open_model(f"tiny:llama?seed={seed}", dtype="float32") for seed in (1, 2)]
    context, vocabulary = b"The sm", same_host.vocabulary
    texts = {text: i for text, i in vocabulary.ids_by_bytes.items() if len(text) <= 2}
    token_ids = torch.tensor(list(texts.values()))
    live = Live(Pair(models[0], models[1]), same_host)
    live.read([b"The "], row=row)
    reading = live.read([context], row=row)
    probs = host_probs(1, len(token_ids))
    found = live.score(reading, range(1), probs, token_ids)
    for model, carried in zip((found.expert, found.reference), models[::-1], strict=True):
        oracle = two_step_oracle(carried, context, list(texts))
        torch.testing.assert_close(model[0].double(), oracle, atol=1e-5, rtol=1e-3)
    # Asked again, from the same caches: the leaves of the first time are gone.
    again = live.score(reading, range(1), probs, token_ids)
    torch.testing.assert_close(again.expert, found.expert)


def test_a_context_that_fills_the_small_models_can_still_be_scored(
    same_host: HFModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("MAX_ASKED", 512), ("MIN_UNDECIDED", 0.0)):
        monkeypatch.setattr(f"trimtab.align.replies.{name}", value)
    models = [open_model(f"tiny:gpt2?seed={seed}", dtype="float32") for seed in (1, 2)]
    longest = models[0].max_tokens
    assert longest is not None
    context = b"a" * (longest - len(models[0].context_ids()))
    live = Live(Pair(models[0], models[1]), same_host)
    probs = host_probs(1, len(same_host.vocabulary))
    for text in (context, context[:-1]):
        found = live.score(live.read([text]), range(1), probs, torch.arange(probs.shape[1]))
        assert float(found.expert.sum()) == pytest.approx(1, abs=1e-3)


def test_one_live_serves_in_and_outside_inference_mode(pair: Pair, byte_host: HFModel) -> None:
    live, probs = Live(pair, byte_host), host_probs(1, len(byte_host.vocabulary))
    token_ids = torch.arange(probs.shape[1])
    with torch.inference_mode():
        live.score(live.read([b"The"]), range(1), probs[:, :9], token_ids[:9])
    assert live.score(live.read([b"The"]), range(1), probs, token_ids).expert.isfinite().all()


def test_only_the_last_tree_is_gone_on_from(pair: Pair) -> None:
    cached, model = ModelCache(), pair.reference
    first, second = TokenTree(), TokenTree()
    node = first.add(model.encode("The small rudder"))
    second.add(model.encode("The"))
    run_tree(model, first, cached)
    assert run_after(model, first, [(node, 1)], cached).shape[0] == 1
    run_tree(model, second, cached)
    with pytest.raises(ValueError, match="another tree"):
        run_after(model, first, [(node, 1)], cached)


def two_step_oracle(model: HFModel, context: bytes, texts: list[bytes]) -> Tensor:
    """Probabilities of a host's tokens of one or two bytes, of which it takes the longer."""
    of_bytes = model.vocabulary.ids_by_bytes
    start = [*model.context_ids(), *(of_bytes[bytes([b])] for b in context)]
    is_text = torch.tensor([bool(text) for text in model.vocabulary.token_bytes])
    first = model.logits(torch.tensor([start]))[0, -1].double().masked_fill(~is_text, -torch.inf)
    first = first.softmax(-1)
    begun = sorted({text[:1] for text in texts})
    rows = torch.tensor([[*start, of_bytes[byte]] for byte in begun])
    afters = dict(zip(begun, model.logits(rows)[:, -1].double().softmax(-1), strict=True))
    probs = []
    for text in texts:
        after = afters[text[:1]]
        if len(text) == 2:
            within = after[of_bytes[text[1:]]]
        else:
            joined = [of_bytes[t[1:]] for t in texts if len(t) == 2 and t[:1] == text]
            within = 1.0 - after[joined].sum()
        probs.append(first[of_bytes[text[:1]]] * within)
    return torch.stack(probs)


def test_what_is_carried_keeps_a_share_of_the_hosts_view(
    pair: Pair, byte_host: HFModel, same_host: HFModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts = CONTEXTS[:4]
    for host, doubt in ((byte_host, 0.2), (same_host, 0.0)):
        probs = host_probs(len(contexts), len(host.vocabulary))
        found = []
        for share in (0.0, 0.2):
            monkeypatch.setattr("trimtab.backends.live.DOUBT", share)
            found.append(scores(Live(pair, host), contexts, probs))
        for sure, doubted in zip(*found, strict=True):
            oracle = (1 - doubt) * sure + doubt * probs
            torch.testing.assert_close(doubted, oracle, atol=1e-6, rtol=1e-5)
