"""What the translation bench does, step by step; a step goes on where it was left."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import trimtab
from bench.translation.data import SETS, Data, prepare
from bench.translation.models import fetch_host
from bench.translation.scores import score, signatures
from examples.demo.models import fetch_model
from trimtab.backends.chat import prompt_ids
from trimtab.backends.hf import HFModel
from trimtab.backends.live import Live
from trimtab.backends.open import open_model
from trimtab.config import (
    CarrierName,
    EvaluateConfig,
    FitConfig,
    MountConfig,
    RecordConfig,
    RowName,
    TuneConfig,
)
from trimtab.progress import Display
from trimtab.steering.mounted import Mounted
from trimtab.steering.processor import open_live
from trimtab.store.files import package_versions, read_json, write_json
from trimtab.text.documents import json_lines

ROWS: Mapping[str, tuple[CarrierName, ...]] = {
    "host": (),
    "head+memory": ("head", "memory"),
    "live": ("expert",),
    "all": ("head", "memory", "expert"),
}
EVALUATED: tuple[RowName, ...] = (
    *("host", "reference", "expert", "head", "memory", "head+memory"),
    *("head-shuffled", "memory-shuffled", "live", "all"),
)
MAX_NEW_TOKENS = 160


@dataclass(frozen=True)
class Settings:
    """What is run; see `python -m bench.translation --help`."""

    small: str | None
    host: str | None
    sentences: int
    translations: int
    train_tokens: int
    seed: int
    beams: int
    steps: Sequence[str]
    folder: Path
    results: Path

    @property
    def adapter(self) -> Path:
        """Folder of the adapter."""
        return self.folder / "adapter"

    @property
    def host_ref(self) -> str:
        """The host's folder or name; fetched if none is named."""
        return self.host or str(fetch_host(self.folder / "opus-mt-en-fr"))


def run(settings: Settings, display: Display) -> None:
    """Run the steps that are asked for, and keep what they found.

    Raises:
        TrimtabError: As the verbs.
    """
    torch.manual_seed(settings.seed)
    data = prepare(settings.folder / "data", settings.sentences, settings.seed)
    for step in settings.steps:
        STEPS[step](settings, data, display)


def adapt(settings: Settings, data: Data, display: Display) -> None:
    """Tune the small model on French text of the handbook, record it, and fit an adapter."""
    folder, tokens = settings.folder, settings.train_tokens
    small = settings.small or str(fetch_model("smollm2-135m-instruct"))
    tuning = TuneConfig(
        model=small,
        data=(str(data.train),),
        out=folder / "expert",
        against=(str(data.pairs("handbook")),),
        max_tokens=tokens,
        validation_tokens=1024,
        validations=2,
        seed=settings.seed,
    )
    trimtab.tune(tuning, progress=display.progress)
    recording = RecordConfig(
        expert=folder / "expert",
        out=folder / "recording",
        general=(str(data.general),),
        max_tokens=tokens,
    )
    trimtab.record(recording, progress=display.progress)
    trimtab.fit(
        FitConfig(recording=folder / "recording", out=settings.adapter), progress=display.progress
    )


def measure(settings: Settings, data: Data, display: Display) -> None:
    """Bits per byte of the French sentence given the English one; of GIMP's manual as well."""
    evaluation = trimtab.evaluate(
        EvaluateConfig(
            adapter=settings.adapter,
            host=settings.host_ref,
            data=(str(data.pairs("handbook")),),
            general=(f"gimp={data.pairs('gimp')}",),
            out=settings.folder / "report",
            rows=EVALUATED,
            # The decoder's start takes one of its 512 positions.
            window_tokens=480,
            stride_tokens=240,
            seed=settings.seed,
        ),
        progress=display.progress,
    )
    (result,) = evaluation.report.hosts
    found = {
        name: {
            row: {
                "mean": round(figure.mean, 4),
                "stderr": round(figure.stderr, 4),
                "change": round(changes[row].mean, 4),
                "change_stderr": round(changes[row].stderr, 4),
            }
            for row, figure in figures.items()
        }
        for name, figures, changes in (
            ("handbook", result.domain, result.domain_change),
            ("gimp", result.general, result.general_change),
        )
    }
    _add(settings, {"bits_per_byte": found})


def translate(settings: Settings, data: Data, display: Display) -> None:
    """Translate both manuals with every row, and score the translations."""
    found: dict[str, Any] = {}
    for name in SETS:
        pairs = [pair for _, pair in json_lines(data.pairs(name))][: settings.translations]
        rows = {row: _translated(settings, name, row, pairs, display) for row in ROWS}
        references = [pair["target"] for pair in pairs]
        scores = score({row: kept["texts"] for row, kept in rows.items()}, references, 0)
        for row, kept in rows.items():
            scores[row]["wall_sec"] = round(kept["wall_sec"], 1)
        found[name] = {"sentences": len(pairs), "rows": scores}
    _add(settings, {"translations": found, "metrics": signatures(), "beams": settings.beams})


def _translated(
    settings: Settings, name: str, row: str, pairs: Sequence[Mapping[str, str]], display: Display
) -> dict[str, Any]:
    path = settings.folder / "translations" / f"{name}-{row}-{settings.beams}.json"
    asked = {"sources": [pair["source"] for pair in pairs], "seed": settings.seed}
    kept = read_json(path, "translations") if path.exists() else {"texts": [], "wall_sec": 0.0}
    before = kept.get("asked", asked)
    shared = min(len(before["sources"]), len(asked["sources"]))
    if before["seed"] != asked["seed"] or before["sources"][:shared] != asked["sources"][:shared]:
        kept = {"texts": [], "wall_sec": 0.0}
    if len(kept["texts"]) < len(pairs):
        with torch.inference_mode():
            _go_on(settings, row, path, {**kept, "asked": asked}, display)
    found = read_json(path, "translations")
    return {**found, "texts": found["texts"][: len(pairs)]}


def _go_on(
    settings: Settings, row: str, path: Path, kept: dict[str, Any], display: Display
) -> None:
    host = open_model(settings.host_ref)
    carriers, mounted, live = ROWS[row], None, None
    if carriers:
        seat = MountConfig(adapter=settings.adapter, host=settings.host_ref)
        mounted = trimtab.mount(seat, host=host, progress=display.progress)
        live = open_live(mounted, host) if "expert" in carriers else None
    sources, texts = kept["asked"]["sources"], list(kept["texts"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with display.progress(f"{path.stem}", len(sources)) as advance:
        advance(len(texts))
        for source in sources[len(texts) :]:
            start = time.perf_counter()
            texts.append(_translation(host, source, settings.beams, (carriers, mounted, live)))
            kept["wall_sec"] += time.perf_counter() - start
            write_json(path, {**kept, "texts": texts})
            advance(1)


def _translation(
    host: HFModel,
    source: str,
    beams: int,
    steers: tuple[Sequence[CarrierName], Mounted | None, Live | None],
) -> str:
    carriers, mounted, live = steers
    options: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "num_beams": beams}
    options |= {"input_ids": torch.tensor([prompt_ids(host, source)]), "do_sample": False}
    if mounted is None:
        ids = host.model.generate(**options)[0]  # type: ignore[operator]
    else:
        with trimtab.steered(host, mounted, carriers=carriers, live=live) as model:
            ids = model.generate(**options)[0]  # type: ignore[operator]
    pieces = (host.vocabulary.token_bytes[i] or b"" for i in ids.tolist())
    return b"".join(pieces).decode("utf-8", "replace").strip()


def _add(settings: Settings, found: Mapping[str, Any]) -> None:
    stored = read_json(settings.results, "results") if settings.results.exists() else {"schema": 1}
    asked = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()}
    asked = {k: v for k, v in asked.items() if k not in ("folder", "results", "steps")}
    data = read_json(settings.folder / "data" / "data.json", "the bench's texts")
    stored |= {"settings": asked, "packages": {**data["packages"], **package_versions()}, **found}
    settings.results.parent.mkdir(parents=True, exist_ok=True)
    write_json(settings.results, stored)
    print(json.dumps(found, indent=1, ensure_ascii=False))


STEPS: Mapping[str, Callable[[Settings, Data, Display], None]] = {
    "adapt": adapt,
    "measure": measure,
    "translate": translate,
}
