r"""How many of a prompt's last tokens must be evidence for how far an adapter is trusted.

    python -m bench.evidence --adapter FOLDER --host MODEL --small MODEL --zig FOLDER \\
        --leave-out FOLDER ... --out RESULT.json

The first tokens of a document are a prompt, the next ones what a host would write: each is scored
by the mixture of the predictors that the prompt's last k tokens weigh, and compared with the
mixture that all of them weigh. Text: middles of Zig files that lie in none of the folders to leave
out (the demo's training and test files), and of modules of Python's library.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bench import held_out
from trimtab import MountConfig
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.blend import evidence_weights, mixture_logprobs
from trimtab.config import CarrierName
from trimtab.mount import mount
from trimtab.progress import Display
from trimtab.steering.evidence import Mixture, ReadPrompt
from trimtab.steering.processor import mixture_of, open_live
from trimtab.store.files import package_versions, write_json
from trimtab.types import Document

CARRIERS: tuple[tuple[CarrierName, ...], ...] = (("head", "memory"), ("head", "memory", "expert"))
COUNTS = (256, 192, 128, 96, 64, 32, 16, 0)


def main() -> None:
    """Measure and write."""
    parser = held_out.arguments(__doc__)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--written-tokens", type=int, default=64)
    given = parser.parse_args()
    display = Display()
    host = open_model(given.host, progress=display.progress)
    config = MountConfig(adapter=given.adapter, host=given.host)
    mounted = mount(config, host=host, progress=display.progress)
    live = open_live(mounted, host, small=given.small, progress=display.progress)
    mixtures = {
        "+".join(carriers): mixture_of(host, mounted, carriers, 1.0, live) for carriers in CARRIERS
    }
    texts = {
        "zig": held_out.zig_documents(given.zig, given.leave_out)[: given.documents],
        "python": held_out.python_documents()[: given.documents // 2],
    }
    nats: dict[str, dict[str, list[Tensor]]] = {
        name: {kind: [] for kind in texts} for name in mixtures
    }
    with display.progress("scoring (documents)", sum(map(len, texts.values()))) as advance:
        for kind, documents in texts.items():
            for document in documents:
                for name, mixture in mixtures.items():
                    nats[name][kind] += scored(host, mixture, document, given.written_tokens)
                advance(1)
    found = {name: {kind: figures(some) for kind, some in of.items()} for name, of in nats.items()}
    write_json(
        given.out,
        {
            "schema": 1,
            "what": "nats of each written token more than with 256 tokens of evidence (mean and"
            " standard error over documents), by the number of the prompt's last tokens that are"
            " evidence; `host`: of the bare host",
            "written_tokens": given.written_tokens,
            "mixtures": found,
            "packages": package_versions(),
        },
    )


def scored(host: HFModel, mixture: Mixture, document: Document, written: int) -> list[Tensor]:
    """Nats a written token by each count and of the host, shape [counts + 1]; none if too short."""
    ids = [*host.context_ids(), *host.encode(document.text)]
    # The first token of text has no position among those asked about.
    first = 1 + max(COUNTS) + len(host.context_ids())
    if len(ids) < first + written:
        return []
    ids = torch.tensor(ids[: first + written])
    with torch.inference_mode():
        hidden = host.hidden(ids[None])[0]
        pieces = tuple(host.vocabulary.token_bytes[i] for i in ids.tolist())
        prompt = ReadPrompt(ids, pieces, hidden)
        asked = range(len(host.context_ids()), len(ids) - 1)
        logprobs = torch.cat(
            [
                said.of_tokens(ids[[p + 1 for p in positions]])
                for positions, said in mixture.read(host.unembedding, prompt, asked)
            ],
            1,
        )
    before, after = logprobs[:, :-written], logprobs[:, -written:]
    ways = [after_evidence(mixture, before, after, count) for count in COUNTS]
    return [torch.stack([*ways, -after[0].double().mean()])]


def after_evidence(mixture: Mixture, before: Tensor, after: Tensor, count: int) -> Tensor:
    """Nats a token of what is written, trust fixed after the last tokens of a prompt."""
    evidence = before[:, before.shape[1] - count :]
    weights = evidence_weights(evidence, mixture.prior, share=mixture.steering.blend.share)[:, -1:]
    return -mixture_logprobs(after.double(), weights).mean()


def figures(nats: Sequence[Tensor]) -> Mapping[str, object]:
    """Means and standard errors of the differences from all evidence."""
    stacked = torch.stack(list(nats))
    less = stacked - stacked[:, :1]
    errors = less.std(0) / len(less) ** 0.5
    names = [*map(str, COUNTS), "host"]
    return {
        "documents": len(nats),
        "nats_with_all": round(float(stacked[:, 0].mean()), 4),
        "more": {
            name: {"mean": round(float(mean), 5), "stderr": round(float(error), 5)}
            for name, mean, error in zip(names, less.mean(0), errors, strict=True)
        },
    }


if __name__ == "__main__":
    main()
