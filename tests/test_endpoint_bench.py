"""The simulated endpoint: with all tokens shown it is the host itself."""

from pathlib import Path

import pytest
from test_generate import adapter as adapter  # a fixture
from test_generate import domain_text
from test_generate import host as host  # a fixture

from bench import endpoint
from trimtab.backends.hf import HFModel
from trimtab.backends.live import Live
from trimtab.steering.beside import open_beside
from trimtab.steering.predictors import Steering
from trimtab.steering.unseen import Unseen
from trimtab.store.manifest import read_manifest
from trimtab.types import Document


def test_all_tokens_shown_keep_all_of_the_gain(
    adapter: Path, host: HFModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = len(host.vocabulary)
    monkeypatch.setattr(endpoint, "TOPS", (every, 5))
    manifest = read_manifest(adapter)
    live = Live(open_beside(manifest, adapter, dtype="float32"), host)
    steering = Steering(("host", "live"), live=live, blend=manifest.blend)
    sums = endpoint.Sums()
    for seed in (5, 6):
        document = Document(str(seed), domain_text(seed)[:160])
        endpoint.score(host, steering, Unseen(live), document, 40, sums)
    assert sums.nats[f"top {every}"] == pytest.approx(sums.nats["full"], rel=1e-3)
    assert sums.nats[f"host, top {every}"] == pytest.approx(sums.nats["host"], rel=1e-4)
    share, error = sums.kept(f"top {every}")
    assert share == pytest.approx(1.0, abs=0.01) and error < 0.01
    assert 0 < sums.tokens <= 80 and len(sums.sizes) == 2
