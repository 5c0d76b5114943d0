"""Count the tokens that each step of the demo works on, which its report does not hold.

`python -m bench.cost.demo_tokens --small FILE --host FILE --out FILE --date DAY`: the models of the
demo (`python -m examples.demo.models`), and the demo's own choice of text.
"""

import argparse
import tempfile
from pathlib import Path

from examples.demo import corpus
from examples.demo.run import CHOICE, HEAD_EPOCHS, SEED, TEXTS
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.config import TuneConfig
from trimtab.store.expert import HELD_OUT_NAME, TRAIN_NAME
from trimtab.store.files import write_json
from trimtab.text.corpus import load_documents
from trimtab.text.probe import probe_documents
from trimtab.tuning.training_text import gather_documents


def main() -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name in ("--small", "--host", "--out", "--date"):
        parser.add_argument(name, required=True)
    given = parser.parse_args()
    small, host = (open_model(ref, dtype="bfloat16") for ref in (given.small, given.host))
    chosen = corpus.choose(corpus.fetch_zig(TEXTS), CHOICE)
    counted = {
        "schema": 1,
        "date": given.date,
        "what": "tokens of the demo's text, training and held-out, by the small model's tokenizer,"
        " and of the probe text by both; parameters of both models",
        "head_epochs": HEAD_EPOCHS,
        "text_tokens": text_tokens(chosen, small),
        "probe_tokens": probe_tokens(small),
        "host_probe_tokens": probe_tokens(host),
        "small": sizes(small),
        "host": sizes(host),
    }
    write_json(Path(given.out), counted)
    print(counted)


def text_tokens(chosen: dict[str, dict[str, str]], small: HFModel) -> int:
    """Tokens that tune trains on or holds out.

    How many of each depends on the folder's name; the demo's report says how many were recorded.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("train", "test"):
            corpus.write_texts(root / name, chosen[name])
        (root / "expert").mkdir()
        config = TuneConfig(
            model=small.ref,
            data=(str(root / "train"),),
            against=(str(root / "test"),),
            out=root / "expert",
            seed=SEED,
        )
        gather_documents(config, small)
        documents = [
            document
            for name in (TRAIN_NAME, HELD_OUT_NAME)
            for document in load_documents(config.out / name)
        ]
    return sum(len(small.encode(document.text)) for document in documents)


def probe_tokens(model: HFModel) -> int:
    """Tokens of the shipped probe text."""
    return sum(len(model.encode(document.text)) for document in probe_documents())


def sizes(model: HFModel) -> dict[str, int]:
    """Parameters, and the shape of the unembedding."""
    vocab, hidden = model.unembedding.weight.shape
    params = sum(weight.numel() for weight in model.model.parameters())
    return {"params": params, "vocab": vocab, "hidden": hidden}


if __name__ == "__main__":
    main()
