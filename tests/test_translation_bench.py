"""The translation bench's own parts: parallel sentences, and scores with their errors."""

import statistics
from importlib import import_module
from pathlib import Path

import pytest

from bench.translation.__main__ import main
from bench.translation.corpus import Pair, is_french, sentence_pairs, write_pairs, write_texts
from bench.translation.data import SETS, TEST_CHAPTERS, Data, _sample, _training
from bench.translation.run import EVALUATED, ROWS
from trimtab.errors import InputError
from trimtab.store.files import read_json, write_json
from trimtab.text.probe import probe_documents


def test_sentences_are_paired_where_both_sides_have_as_many() -> None:
    english = "The package is configured by this command. It asks the administrator some questions."
    french = "Le paquet est configuré par cette commande. Il pose des questions à l'administrateur."
    pairs = list(sentence_pairs(english, french))
    assert [source[:11] for source, _ in pairs] == ["The package", "It asks the"]
    assert [target[:9] for _, target in pairs] == ["Le paquet", "Il pose d"]
    assert list(sentence_pairs(english, french.replace(". Il", " et il"))) == []
    assert list(sentence_pairs("Too short.", "Trop court.")) == []
    assert list(sentence_pairs(english, "Le paquet. Il.")) == []


def test_what_was_not_translated_is_no_french() -> None:
    assert is_french("Le fichier est dans le répertoire de l'administrateur.")
    assert not is_french("The file is in the directory of the administrator.")
    assert not is_french("apt-get update")


def test_no_training_text_is_of_a_test_chapter() -> None:
    texts = {chapter: (f"{chapter} {n}" for n in range(3)) for chapter in TEST_CHAPTERS}
    texts = {name: tuple(found) for name, found in texts.items()}
    texts["other"] = tuple(map(str, range(20)))
    training = list(_training(texts))
    assert "\n\n".join(part.strip() for part in training).split("\n\n") == list(texts["other"])
    pairs = [Pair("apt", str(n), str(n)) for n in range(9)]
    assert _sample(pairs, 4, 1) == _sample(pairs, 4, 1) != _sample(pairs, 4, 2)
    assert len(_sample(pairs, 40, 1)) == 9


def test_scores_are_sacrebleus_and_errors_are_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    from bench.translation import scores

    monkeypatch.setattr(scores, "RESAMPLES", 20)
    references = [f"le chat numéro {n} dort sur la table verte" for n in range(12)]
    worse = [text.replace("dort", "mange") if n % 2 else text for n, text in enumerate(references)]
    found = scores.score({"host": worse, "same": worse, "right": references}, references, 0)
    assert found["host"]["bleu"]["mean"] == pytest.approx(
        sacrebleu.corpus_bleu(worse, [references]).score, abs=1e-3
    )
    assert found["host"]["chrf"]["mean"] == pytest.approx(
        sacrebleu.corpus_chrf(worse, [references]).score, abs=1e-3
    )
    assert found["same"]["chrf"]["change"] == found["same"]["chrf"]["change_stderr"] == 0
    assert found["right"]["bleu"]["mean"] == pytest.approx(100)
    draws = [scores._draw(12, n) for n in range(20)]
    samples = []
    for draw in draws:
        picked = [[side[i] for i in draw] for side in (worse, references)]
        samples.append(100 - sacrebleu.corpus_bleu(picked[0], [picked[1]]).score)
    assert found["right"]["bleu"]["change_stderr"] == pytest.approx(
        statistics.stdev(samples), abs=1e-3
    )


def test_without_sacrebleu_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.translation import scores

    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(InputError) as error:
        scores.signatures()
    assert "trimtab[translation]" in error.value.hint


def test_the_bench_runs_all_its_steps_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sacrebleu")
    monkeypatch.setattr(
        import_module("trimtab.record"), "probe_documents", lambda: probe_documents()[::8]
    )
    # A random host never ends by itself.
    monkeypatch.setattr("bench.translation.run.MAX_NEW_TOKENS", 24)
    data = Data(tmp_path / "data")
    data.folder.mkdir()
    write_texts(data.train, [f"La barre {n} tourne le navire. " * 12 for n in range(12)])
    write_texts(data.general, [f"Le chat {n} dort sur la table. " * 8 for n in range(3)])
    for name in SETS:
        pairs = [Pair("apt", f"The {name} turns {n}.", f"La {name} tourne {n}.") for n in range(3)]
        write_pairs(data.pairs(name), pairs)
    asked = {"sentences": 3, "seed": 0}
    write_json(data.folder / "data.json", {"schema": 1, "asked": asked, "packages": {}})
    words = ["--folder", str(tmp_path), "--small", "tiny:llama", "--host", "tiny:marian"]
    words += ["--sentences", "3", "--train-tokens", "1200", "--results", str(tmp_path / "out.json")]
    main([*words, "--translations", "1"])
    first = read_json(tmp_path / "out.json", "results")
    assert {*first["bits_per_byte"]["handbook"]} == {*EVALUATED}
    main([*words, "--translations", "2", "--steps", "translate"])
    found = read_json(tmp_path / "out.json", "results")
    for name in SETS:
        assert {*found["translations"][name]["rows"]} == {*ROWS}
        assert found["translations"][name]["sentences"] == 2
        kept = read_json(tmp_path / "translations" / f"{name}-all-1.json", "translations")
        assert len(kept["texts"]) == 2
