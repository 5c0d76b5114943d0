"""The bench of a server's step: all ways say what the server would, about the same text."""

import json
from pathlib import Path

import pytest
import torch
from test_generate import adapter as adapter  # a fixture
from test_generate import host as host  # a fixture

from bench.serve_step import BARE, main, steps, ways_of
from bench.serve_throughput import ADAPTER
from trimtab.backends.hf import HFModel
from trimtab.config import ServeConfig
from trimtab.serving.adapters import Adapters
from trimtab.serving.batch import Batch

HOST = "tiny:qwen3?vocab=bpe&hidden=32"


def test_ways_write_the_same_text_and_differ_in_what_they_say(host: HFModel, adapter: Path) -> None:
    config = ServeConfig(host=HOST, name=BARE, dtype="float32", carriers=("head",))
    adapters, batch = Adapters(config, host), Batch(host)
    adapters.load(ADAPTER, adapter)
    bare, steered = ways = ways_of(host, batch, adapters, [("head",)], 3)
    took = steps(host, batch, ways, 4)
    assert {name: len(found) for name, found in took.items()} == {"pass": 4, BARE: 4, "head": 4}
    for one, other in zip(bare.rows, steered.rows, strict=True):
        assert one.token_ids == other.token_ids and one.new_tokens == 5
        assert one.pieces == other.pieces
    hidden = torch.cat([host.hidden(torch.tensor([row.token_ids]))[0, -1:] for row in bare.rows])
    logits = host.unembedding.logits(hidden).float()
    with torch.inference_mode():
        # The batch has read all but the last one.
        last = batch.step([row.token_ids[-1] for row in bare.rows])
        said = [way.say(logits, hidden) for way in ways]
    torch.testing.assert_close(last, hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(said[0], logits.log_softmax(-1))
    assert (said[1] - said[0]).abs().max() > 1e-3
    torch.testing.assert_close(said[1].logsumexp(-1), torch.zeros(3), rtol=0, atol=1e-4)


def test_the_bench_writes_what_each_way_costs(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "step.json"
    words = f"serve_step --host {HOST} --adapter {adapter} --rows 2 --steps 10 --out {out}"
    monkeypatch.setattr("sys.argv", words.split())
    main()
    found = json.loads(out.read_text())
    assert set(found["ways"]) == {BARE, "head", "head+memory", "expert", "head+memory+expert"}
    assert found["ways"][BARE]["cost"] == {"median": 1, "lowest_tenth": 1, "highest_tenth": 1}
    for way in found["ways"].values():
        cost = way["cost"]
        assert (
            0 < way["own_sec"] and cost["lowest_tenth"] <= cost["median"] <= cost["highest_tenth"]
        )
