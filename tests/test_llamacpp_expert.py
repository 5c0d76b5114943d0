"""An expert and its reference in llama.cpp, against the same in torch (`make test-llamacpp`)."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fit import DOMAIN
from test_generate import PROMPTS, domain_text
from test_gguf import write_gguf
from test_llamacpp_host import assert_near
from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.backends.llamacpp import trees as in_llamacpp
from trimtab.backends.llamacpp.engine import Context
from trimtab.backends.open import open_model
from trimtab.backends.pair import Pair
from trimtab.backends.pair_passes import run_expert_line, run_pair, run_pair_after
from trimtab.backends.reading import PairCaches
from trimtab.backends.token_tree import ModelCache, TokenTree, run_after, run_tree
from trimtab.config import (
    EvaluateConfig,
    FitConfig,
    GenerateConfig,
    RecordConfig,
    TuneConfig,
)
from trimtab.errors import AdapterError, ModelError
from trimtab.evaluate import evaluate
from trimtab.fit import fit
from trimtab.generate import generate
from trimtab.record import record
from trimtab.steering.beside import open_beside
from trimtab.store.manifest import read_manifest
from trimtab.tune import tune

pytest.importorskip("llama_cpp", reason="`make test-llamacpp` builds it")

HOST = "tiny:gpt2?vocab=bytes"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    write_gguf(path, open_model("tiny:llama?vocab=bpe&hidden=32", dtype="float32"))
    return path


@pytest.fixture(scope="module")
def adapter(small: Path) -> Path:
    """An adapter whose small model is a GGUF file, with an expert that learnt much."""
    folder = small.parent
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TRIMTAB_HOME", str(folder / "home"))
        # What is held out follows from names, and with a folder's chance name some experts turn
        # out so that a few of torch's states are off by a hundred times the usual rounding.
        patched.chdir(folder)
        for number in range(4):
            (folder / f"{number}.txt").write_text(domain_text(number))
        (folder / "plain.md").write_text("Plain prose, about nothing in particular. " * 8)
        tuning = {"model": str(small), "data": ("*.txt",), "learning_rate": 3e-2}
        tuning |= {"window_tokens": 128, "held_out": 0.25, "validations": 1, "dtype": "float32"}
        tune(TuneConfig.model_validate({**tuning, "out": folder / "expert"}))
        recording = {"expert": folder / "expert", "general": ("*.md",)}
        recording |= {"window_tokens": 256, "stride_tokens": 192, "dtype": "float32"}
        record(RecordConfig.model_validate({**recording, "out": folder / "recording"}))
        fitting = {"recording": folder / "recording", "rank": 8, "epochs": 1, "key_size": 16}
        return fit(FitConfig.model_validate({**fitting, "out": folder / "adapter"})).folder


def pairs(adapter: Path, small: Path) -> tuple[Pair, Pair]:
    """The same pair in llama.cpp and in torch."""
    manifest = read_manifest(adapter)
    ours, theirs = (
        open_beside(manifest, adapter, small=ref, dtype="float32")
        for ref in (f"llamacpp:{small}", str(small))
    )
    return ours, theirs


def alone(model: HFModel, tree: TokenTree) -> Tensor:
    """States of all nodes, each from a pass over its own sequence."""
    states = []
    for node in range(len(tree.tokens)):
        ids = torch.tensor([[tree.tokens[above] for above in tree.line(node)]])
        states.append(model.hidden(ids)[0, -1])
    return torch.stack(states)


def grown(seed: int, nodes: int, trunk: int) -> TokenTree:
    """A tree with a long beginning and many branches."""
    dice, tree = random.Random(seed), TokenTree()
    lines = [[dice.randrange(40) for _ in range(trunk)]] if trunk else [[]]
    tree.add(lines[0])
    while len(tree.tokens) < nodes:
        line = [*dice.choice(lines), dice.randrange(40)]
        tree.add(line)
        lines.append(line)
    return tree


def test_the_expert_is_the_one_in_torch(adapter: Path, small: Path) -> None:
    ours, theirs = pairs(adapter, small)
    ids = torch.tensor([ours.reference.encode(DOMAIN)[:60]])
    for one, other in zip(ours.hidden(ids), theirs.hidden(ids), strict=True):
        assert_near(one, other)
    states = ours.hidden(ids)
    assert (states.expert - states.reference).abs().max() > 0.1 * states.reference.abs().max()
    assert_near(ours.expert_logits(ids), theirs.expert_logits(ids))
    assert_near(ours.reference_logits(ids), theirs.reference_logits(ids))


@pytest.mark.parametrize(("nodes", "trunk"), [(40, 20), (30, 0), (300, 8), (70, 70), (1, 1)])
def test_a_tree_is_read_as_each_of_its_sequences(
    nodes: int, trunk: int, adapter: Path, small: Path
) -> None:
    pair, _ = pairs(adapter, small)
    tree = grown(nodes, nodes, trunk)
    for model, cached in ((pair.reference, ModelCache()), (expert_of(pair), ModelCache())):
        plain = alone(model, tree)
        assert_near(run_tree(model, tree, cached), plain)
        assert_near(run_tree(model, tree, cached), plain)
        leaves = [(node, 5) for node in range(0, len(tree.tokens), 3)]
        longer = TokenTree()
        ends = [
            longer.add([*(tree.tokens[above] for above in tree.line(node)), token])
            for node, token in leaves
        ]
        assert_near(run_after(model, tree, leaves, cached), alone(model, longer)[ends])
        assert_near(run_tree(model, tree, cached), plain)


def expert_of(pair: Pair) -> HFModel:
    with pair.as_expert() as model:
        return model


def test_more_branches_than_sequences_are_read_in_turn(adapter: Path, small: Path) -> None:
    pair, _ = pairs(adapter, small)
    tree = TokenTree()
    for branch in range(250):
        tree.add([1, 2, 3, 4 + branch % 30, 4 + branch // 30])
    assert len(tree.tokens) > 250 > in_llamacpp.MAX_ROWS - in_llamacpp.LINES
    assert_near(run_tree(pair.reference, tree, ModelCache()), alone(pair.reference, tree))


def test_rows_that_go_on_go_back_and_make_room(
    adapter: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_llamacpp, "MIN_CELLS", 256)
    monkeypatch.setattr(in_llamacpp, "KEPT_CELLS", 512)
    monkeypatch.setattr(in_llamacpp, "LINES", 6)
    model = pairs(adapter, small)[0].reference
    dice = random.Random(1)
    rows = [(ModelCache(), [dice.randrange(40)]) for _ in range(9)]
    for step in range(120):
        cached, text = rows[dice.randrange(len(rows))]
        if dice.random() < 0.2:
            del text[max(1, len(text) - dice.randrange(1, 9)) :]
        text += [dice.randrange(40) for _ in range(dice.randrange(1, 7 if step < 80 else 90))]
        tree = TokenTree()
        for branch in range(dice.randrange(4)):
            tree.add([*text, branch, branch + 1])
        end = tree.add(text)
        states = run_tree(model, tree, cached)
        assert_near(states[tree.line(end)], model.hidden(torch.tensor([text]))[0])
        last = states[len(tree.tokens) - 1]
        line = [tree.tokens[node] for node in tree.line(len(tree.tokens) - 1)]
        assert_near(last, model.hidden(torch.tensor([line]))[0, -1])


def test_both_models_read_what_they_read_in_torch(adapter: Path, small: Path) -> None:
    trees = [grown(seed, 30, 12) for seed in (1, 2)]
    found = []
    for pair in pairs(adapter, small):
        caches = [PairCaches() for _ in trees]
        states = run_pair(pair, list(zip(trees, caches, strict=True)))
        leaves = [(3, 7), (20, 9), (3, 7)]
        after = run_pair_after(
            pair, [(tree, leaves, one) for tree, one in zip(trees, caches, strict=True)]
        )
        line = run_expert_line(pair, [*trees[0].tokens[:12], 5, 6], caches[0])
        found.append([*states[0], *states[1], *after[0], *after[1], line])
    for ours, theirs in zip(*found, strict=True):
        assert_near(ours, theirs)


@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_the_same_text_is_written_whoever_runs_the_expert(
    draft_tokens: int, adapter: Path, small: Path
) -> None:
    config = GenerateConfig(
        host=HOST,
        adapter=adapter,
        carriers=("head", "memory", "expert"),
        prompt=PROMPTS,
        max_new_tokens=16,
        dtype="float32",
        small=str(small),
        draft_tokens=draft_tokens,
    )
    texts = [
        generate(config.model_copy(update={"small": ref})).texts
        for ref in (f"llamacpp:{small}", str(small))
    ]
    assert texts[0] == texts[1]
    bare = GenerateConfig(host=HOST, prompt=PROMPTS, max_new_tokens=16, dtype="float32")
    assert texts[0] != generate(bare).texts


def test_evaluate_measures_the_same(adapter: Path, small: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The rudder turns the hull. The mast turns the sail.\n" * 8)
    found = []
    for number, ref in enumerate((f"llamacpp:{small}", str(small))):
        config = EvaluateConfig(
            adapter=adapter,
            host=HOST,
            data=(str(tmp_path / "text.txt"),),
            small=ref,
            rows=("host", "reference", "expert", "proxy", "live", "all"),
            out=tmp_path / f"report-{number}",
            dtype="float32",
        )
        (result,) = evaluate(config).report.hosts
        found.append({row: estimate.mean for row, estimate in result.domain.items()})
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert found[0]["live"] < found[0]["host"]


def test_a_pass_that_is_broken_off_leaves_nothing_wrong(
    adapter: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pairs(adapter, small)[0].reference
    tree, other, cached = grown(1, 40, 12), grown(2, 40, 12), ModelCache()
    run_tree(model, tree, cached)
    for name in ("copy", "state", "cut"):
        with monkeypatch.context() as patched:
            calls = iter(range(100))
            whole = getattr(Context, name)

            def broken(*given: Any, whole: Any = whole, calls: Any = calls) -> Any:
                if next(calls) == 3:
                    raise KeyboardInterrupt
                return whole(*given)

            patched.setattr(Context, name, broken)
            with pytest.raises(KeyboardInterrupt):
                run_tree(model, other, ModelCache())
        assert_near(run_tree(model, tree, cached), alone(model, tree))
        assert_near(run_tree(model, other, ModelCache()), alone(model, other))


def test_evaluate_shares_no_context_among_processes(
    adapter: Path, small: Path, tmp_path: Path
) -> None:
    """A copy of a process has none of the threads that llama.cpp began, and would wait for them."""
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(domain_text(number))
    words = ["evaluate", str(adapter), HOST, "--data", str(tmp_path / "*.txt"), "--rows", "live"]
    words += [
        "--small",
        f"llamacpp:{small}",
        "--out",
        str(tmp_path / "report"),
        "--dtype",
        "float32",
    ]
    found = subprocess.run(
        [sys.executable, "-m", "trimtab", *words, "--processes", "2"],
        env=os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        timeout=180,
        check=False,
    )
    assert found.returncode == 0, found.stderr.decode()


def test_what_cannot_be_done_there_is_said(adapter: Path, small: Path, tmp_path: Path) -> None:
    manifest = read_manifest(adapter)
    other = tmp_path / "other.gguf"
    write_gguf(other, open_model("tiny:llama?vocab=bpe&hidden=64", dtype="float32"))
    with pytest.raises(ModelError, match=r"the unembedding of llamacpp:.* has sha256"):
        open_beside(manifest, adapter, small=f"llamacpp:{other}")
    lora = tmp_path / "adapter" / "expert"
    lora.mkdir(parents=True)
    for file in (adapter / "expert").iterdir():
        (lora / file.name).write_bytes(file.read_bytes())
    weights = (lora / "adapter_model.safetensors").read_bytes()
    (lora / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(AdapterError, match="cannot read the LoRA's weights"):
        open_beside(manifest, lora.parent, small=f"llamacpp:{small}")
    (lora / "adapter_model.safetensors").write_bytes(weights)
    settings = (lora / "adapter_config.json").read_text()
    changed = json.loads(settings) | {"alpha_pattern": {"q_proj": 4}}
    (lora / "adapter_config.json").write_text(json.dumps(changed))
    with pytest.raises(AdapterError, match="another alpha for some layers"):
        open_beside(manifest, lora.parent, small=f"llamacpp:{small}")
    (lora / "adapter_config.json").write_text(settings.replace('"LORA"', '"IA3"'))
    with pytest.raises(AdapterError, match="is of PEFT type 'IA3'"):
        open_beside(manifest, lora.parent, small=f"llamacpp:{small}")
