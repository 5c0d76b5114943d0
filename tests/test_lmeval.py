"""Steered hosts in lm-evaluation-harness, against its own model of transformers and `generate`."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_generate import HOST, WORDS, adapter, domain_text, host, live, mounted
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from bench.lmeval_tasks import write_task
from bench.transfer.choices import Choice
from trimtab.backends.hf import HFModel
from trimtab.backends.live import Live
from trimtab.backends.open import open_model
from trimtab.carriers import search
from trimtab.cli import main
from trimtab.config import CarrierName, EvaluateConfig
from trimtab.errors import InputError, ModelError
from trimtab.evaluate import evaluate
from trimtab.lmeval.tasks import read_task
from trimtab.steering.answers import score_answers, score_text
from trimtab.steering.mounted import Mounted
from trimtab.steering.processor import mixture_of, steered
from trimtab.steering.scoring import score_document
from trimtab.types import Advance

__all__ = ["adapter", "host", "live", "mounted"]
ALL: tuple[CarrierName, ...] = ("head", "memory", "expert")
needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs trimtab[lmeval]")


class Forced(LogitsProcessor):
    """Lets `generate` choose one given continuation, and keeps each token's score."""

    def __init__(self, answer: Sequence[int]) -> None:
        self._left = list(answer)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        del input_ids
        only = torch.full_like(scores, -torch.inf)
        token_id = self._left.pop(0)
        only[:, token_id] = scores[:, token_id]
        return only


@pytest.mark.parametrize("carriers", [("head", "memory"), ALL])
def test_an_answer_is_as_likely_as_generate_finds_it(
    carriers: tuple[CarrierName, ...],
    host: HFModel,
    mounted: Mounted,
    live: Live,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert mounted.memory
    # Of entries as near as each other rounding takes one or the other, if not all of them count.
    monkeypatch.setattr(search, "NEIGHBOURS", len(mounted.memory.memory))
    context = host.context_ids() + host.encode(domain_text(8)[:50])
    answers = [host.encode_following(text) for text in (" rudder.\nThe keel", " xyz", " the hull")]
    mixture = mixture_of(host, mounted, carriers, 1.0, live)
    scored = score_answers(host, mixture, context, answers)
    with steered(host, mounted, carriers=carriers, live=live) as model:
        for answer, ours in zip(answers, scored, strict=True):
            result = model.generate(
                torch.tensor([context]),
                max_new_tokens=len(answer),
                logits_processor=LogitsProcessorList([Forced(answer)]),
                output_scores=True,
                return_dict_in_generate=True,
            )
            theirs = [
                float(step[0, token_id])
                for step, token_id in zip(result.scores, answer, strict=True)
            ]
            assert ours.logprobs.tolist() == pytest.approx(theirs, abs=1e-4)
        greedy = model.generate(torch.tensor([context]), max_new_tokens=3)[0, len(context) :]
    best = score_answers(host, mixture, context, [greedy.tolist()])
    assert best[0].is_greedy and not scored[1].is_greedy


def test_a_text_is_scored_as_evaluate_scores_it(
    host: HFModel, mounted: Mounted, live: Live
) -> None:
    text = domain_text(9)[:90]
    mixture = mixture_of(host, mounted, ALL, 1.0, live)
    expected = score_document(
        host, text, mixture.steering, window_tokens=256, stride_tokens=128
    ).rows["all"]
    ids, before = host.encode(text), host.context_ids()
    whole, after = score_text(host, mixture, [*before, *ids], len(before) + 1)
    assert torch.allclose(whole, expected.logprobs, atol=1e-5)
    assert float(after.sum()) == pytest.approx(1)


def questions(count: int) -> list[Choice]:
    """Real questions with four answers, of MMLU's development set: lm-eval carries them."""
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "flan_cot_fewshot"
    found = []
    for path in sorted(folder.glob("mmlu_*.yaml")):
        for sample in yaml.safe_load(path.read_text())["fewshot_config"]["samples"]:
            parts = re.split(r"\s*\(([ABCD])\) ", " ".join(sample["question"].split()))
            right = re.search(r"answer is \(([ABCD])\)", sample["target"])
            if parts[1::2] == list("ABCD") and right:
                before = f"Question: {parts[0]}\nAnswer:"
                found.append(Choice(before, tuple(parts[2::2]), "", "ABCD".index(right[1])))
    assert len(found) > 200
    return found[:: len(found) // count][:count]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def of_harness(host: HFModel, task: Path) -> tuple[dict[str, float], list[list[float]]]:
    """What lm-eval's own model of a transformers host answers."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from trimtab.lmeval.run import _quiet

    with _quiet():
        model = HFLM(pretrained=host.model, tokenizer=host.tokenizer, batch_size=8)
        found = evaluator.simple_evaluate(
            model=model,
            tasks=[dict(read_task(task).config)],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=1_000,
        )
    assert found
    (name,) = found["results"]
    resps = [[one[0] for one in sample["filtered_resps"]] for sample in found["samples"][name]]
    return found["results"][name], resps


REAL = Path(os.environ.get("TRIMTAB_TEST_MODELS", "build/models")) / "smollm2-135m-instruct"
REAL_HOST = pytest.param(
    str(REAL / "model.gguf"),
    marks=pytest.mark.skipif(not REAL.is_dir(), reason="the model is not here"),
)


@needs_harness
@pytest.mark.parametrize("ref", [HOST, REAL_HOST])
def test_the_bare_host_answers_as_lm_evals_own_model(
    ref: str, adapter: Path, tmp_path: Path
) -> None:
    # A real host is slow here, and each of its questions is four passes of some hundred tokens.
    asked = 6 if ref == HOST else 3
    task = write_task("mmlu-dev", questions(asked), tmp_path / "task")
    host = open_model(ref, dtype="float32")
    figures, resps = of_harness(host, task)
    config = EvaluateConfig(
        adapter=adapter, host=ref, out=tmp_path / "out", tasks=(task,), dtype="float32"
    )
    found = evaluate(config, host=host, is_named=True)
    assert found.tasks
    by_key = {(f.metric, f.row): f for f in found.tasks.figures}
    assert {row for _, row in by_key} == {"host", "head+memory"}
    for metric in ("acc", "acc_norm"):
        ours = by_key[metric, "host"]
        assert ours.value.mean == figures[f"{metric},none"] and ours.questions == asked
        assert ours.value.stderr == figures[f"{metric}_stderr,none"]
        assert by_key[metric, "head+memory"].change is not None
    kept = json.loads((tmp_path / "out" / "tasks" / "host.json").read_text())
    samples = kept["tasks"]["mmlu-dev"]["samples"]
    assert [[one[0] for one in sample["filtered_resps"]] for sample in samples] == resps
    steered_row = json.loads((tmp_path / "out" / "tasks" / "head+memory.json").read_text())
    assert steered_row["tasks"]["mmlu-dev"]["samples"] != samples
    # A second run reads what the first has kept.
    stamp = (tmp_path / "out" / "tasks" / "host.json").stat().st_mtime_ns
    assert evaluate(config).tasks == found.tasks
    assert (tmp_path / "out" / "tasks" / "host.json").stat().st_mtime_ns == stamp


@needs_harness
@pytest.mark.parametrize("row", ["live", "expert", "temperature"])
def test_other_rows_and_kinds_of_tasks(
    row: str,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # No repository, of which git would say so.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.jsonl").write_text(
        "\n".join(json.dumps({"text": domain_text(n)[:40], "word": WORDS[n]}) for n in range(3))
    )
    common = {"dataset_path": "json", "test_split": "test"}
    common |= {"dataset_kwargs": {"data_files": {"test": "lines.jsonl"}}}
    rolling = {"task": "texts", "output_type": "loglikelihood_rolling", "doc_to_text": ""}
    rolling |= {"doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}]}
    written = {"task": "words", "output_type": "generate_until", "doc_to_text": "{{text}}"}
    written |= {"doc_to_target": "{{word}}", "metric_list": [{"metric": "exact_match"}]}
    written |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}}
    paths = []
    for config in (rolling, written):
        paths.append(tmp_path / f"{config['task']}.yaml")
        paths[-1].write_text(yaml.safe_dump(common | config))
    words = [str(adapter), HOST, "--out", str(tmp_path / "out"), "--dtype", "float32"]
    words += [word for path in paths for word in ("--tasks", str(path))]
    with pytest.raises(SystemExit) as end:
        main(["evaluate", *words, "--rows", row])
    assert end.value.code == 0
    shown = capfd.readouterr().err
    assert "git" not in shown and "it/s" not in shown
    figures = json.loads((tmp_path / "out" / "tasks.json").read_text())["figures"]
    assert {figure["task"] for figure in figures} == {"texts", "words"}
    assert {figure["row"] for figure in figures} == {"host", row}


@needs_harness
@pytest.mark.parametrize("carriers", [(), ("head", "memory")])
def test_progress_is_told_request_by_request(
    carriers: tuple[CarrierName, ...], host: HFModel, mounted: Mounted
) -> None:
    from lm_eval.api.instance import Instance

    from trimtab.lmeval.model import SteeredLM

    told: dict[str, list[int]] = {}

    @contextmanager
    def shown(label: str, total: int) -> Iterator[Advance]:
        del total
        told[label] = []
        yield told[label].append

    def asked(kind: str, *arguments: object) -> Any:
        return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)

    mixture = mixture_of(host, mounted, carriers, 1.0, None) if carriers else None
    model = SteeredLM(host, mixture, batch_size=2, progress=shown)
    choices = [asked("loglikelihood", "The keel", f" {word}") for word in WORDS[:4]]
    assert len(model.loglikelihood([*choices, choices[0]])) == 5
    texts = [asked("loglikelihood_rolling", domain_text(n)[:40]) for n in range(2)]
    assert len(model.loglikelihood_rolling(texts)) == 2
    stops = {"until": ["\n"], "max_gen_toks": 3}
    written = [asked("generate_until", f"The {word}", stops) for word in WORDS[:3]]
    assert len(model.generate_until(written)) == 3
    assert told == {"answers": [1] * 5, "texts": [1] * 2, "continuations": [1] * 3}


@needs_harness
def test_an_answer_that_is_cut_short_is_refused(
    host: HFModel, mounted: Mounted, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.instance import Instance

    from trimtab.lmeval.model import SteeredLM

    config: Any = live.pair.reference.model.config
    model = SteeredLM(host, mixture_of(host, mounted, ALL, 1.0, live))
    arguments = "The keel turns", {"until": ["\n\n\n"], "max_gen_toks": 12}
    asked = Instance(request_type="generate_until", doc={}, arguments=arguments, idx=0)
    monkeypatch.setattr(config, "max_position_embeddings", 18)
    with pytest.raises(ModelError, match="has positions for 18 tokens"):
        model.generate_until([asked])


def test_a_task_that_brings_code_or_a_hub_is_refused(tmp_path: Path) -> None:
    path, data = tmp_path / "task.yaml", "dataset_kwargs: {data_files: {test: a.jsonl}}\n"
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    cases = {
        "task: a\ndataset_path: json\ndoc_to_text: !function utils.text\n" + data: "cannot be read",
        "task: a\ndataset_path: allenai/ai2_arc\n" + data: "dataset_path 'allenai/ai2_arc'",
        "task: a\ndataset_path: json\ninclude: other.yaml\n" + data: "has include",
        "dataset_path: json\n" + data: "has no name",
        "task: a\ndataset_path: json\n": "names no data_files",
        "task: a\ndataset_path: json\n" + data.replace("a.jsonl", "b.jsonl"): "is not there",
        "- 1\n": "is no table",
    }
    for text, message in cases.items():
        path.write_text(text)
        with pytest.raises(InputError, match=re.escape(message)):
            read_task(path)
    with pytest.raises(InputError, match="cannot read the task file"):
        read_task(tmp_path / "nothing.yaml")


@needs_harness
def test_a_template_cannot_reach_beyond_its_question() -> None:
    from jinja2.exceptions import SecurityError
    from lm_eval import utils

    from trimtab.lmeval.run import _quiet

    with _quiet():
        assert utils.apply_template("{{a | regex_replace('b', 'c')}}", {"a": "bb"}) == "cc"
        with pytest.raises(SecurityError):
            utils.apply_template("{{ a.__class__.__mro__ }}", {"a": "b"})
    assert type(utils.env).__name__ == "Environment"
