"""Whom solved questions teach to trust for an answer, against slow references."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_generate import adapter, domain_text, host, live, mounted
from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.backends.live import Live
from trimtab.comparing.kept import Kept
from trimtab.comparing.questions import Kind, Question
from trimtab.comparing.scoring import Subject, choice_logprobs, written_logprobs
from trimtab.comparing.trust import learnt_trust
from trimtab.config import CarrierName
from trimtab.steering.answers import alternatives_nats, answer_evidence, score_answers
from trimtab.steering.evidence import Mixture
from trimtab.steering.mounted import Mounted
from trimtab.steering.predictors import Steering
from trimtab.steering.processor import mixture_of
from trimtab.types import silent

__all__ = ["adapter", "host", "live", "mounted"]
LIGHT: tuple[CarrierName, ...] = ("head", "memory")
ALL: tuple[CarrierName, ...] = (*LIGHT, "expert")
LINES = tuple(line for number in range(3) for line in domain_text(number).splitlines()[:2])


def alone(steering: Steering, number: int) -> Mixture:
    """One predictor of a mixture, trusted wholly."""
    members = Mixture(steering).members
    return Mixture(steering, torch.eye(len(members))[number])


def solved(*answers: str) -> list[Question]:
    choices = (" rudder", " keel", " hull of the mast")
    return [
        Question(f"{line}\nNext:", choices[number % 2], answers or choices)
        for number, line in enumerate(LINES)
    ]


@pytest.mark.parametrize("carriers", [LIGHT, ALL])
def test_an_answers_evidence_is_what_each_predictor_alone_gives_it(
    carriers: tuple[CarrierName, ...], host: HFModel, mounted: Mounted, live: Live
) -> None:
    mixture = mixture_of(host, mounted, carriers, 1.0, live)
    context = host.context_ids() + host.encode(domain_text(8)[:40])
    # Two begin alike, one is the beginning of another.
    texts = (" rudder", " rudder turns", " rudder mast", " xyz")
    answers = [host.encode_following(text) for text in texts]
    found = answer_evidence(host, mixture, context, answers)
    for number in range(len(mixture.members)):
        alone_scores = score_answers(host, alone(mixture.steering, number), context, answers)
        slow = [float(score.logprobs.sum()) for score in alone_scores]
        assert found[number].tolist() == pytest.approx(slow, abs=1e-4)


def test_a_choice_is_as_likely_as_among_the_choices(host: HFModel, mounted: Mounted) -> None:
    subject = Subject(host, mixture_of(host, mounted, LIGHT, 1.0, None).steering)
    question = solved()[0]
    found = choice_logprobs(subject, question)
    context = host.context_ids() + host.encode(question.prompt)
    for number, row in enumerate(found):
        scores = [
            float(score.logprobs.sum().exp())
            for score in score_answers(
                host,
                alone(subject.mixture.steering, number),
                context,
                [host.encode(f"{question.prompt}{choice}")[len(context) - len(host.context_ids()) :]
                 for choice in question.choices],
            )
        ]  # fmt: skip
        assert row.exp().tolist() == pytest.approx([s / sum(scores) for s in scores], rel=1e-3)
    # Written, an answer ends with its line.
    written = written_logprobs(subject, question)
    assert (written < 0).all() and len(written) == len(subject.mixture.members)


def test_alternatives_share_what_they_have_together(host: HFModel, mounted: Mounted) -> None:
    mixture = mixture_of(host, mounted, LIGHT, 1.0, None)
    context = host.context_ids() + host.encode(domain_text(8)[:40])
    answers = [host.encode_following(text) for text in (" rudder", " keel turns", " xyz")]
    scores = score_answers(host, mixture, context, answers)
    # What each predictor alone gives is the same, however they are asked.
    evidence = answer_evidence(host, mixture, context, answers)
    torch.testing.assert_close(torch.stack([score.alone for score in scores], 1), evidence)
    own = torch.stack([score.logprobs.sum() for score in scores])
    found = alternatives_nats(scores, mixture.prior)
    assert float(found.logsumexp(0)) == pytest.approx(float(own.logsumexp(0)))
    probs = evidence.exp()
    shares = (mixture.prior[:, None] * probs / probs.sum(1, keepdim=True)).sum(0)
    torch.testing.assert_close((found - found.logsumexp(0)).exp(), shares)
    # With the host alone trusted they are told apart as the host does; one keeps its own.
    bare = alternatives_nats(scores, torch.eye(len(mixture.members))[0])
    torch.testing.assert_close(bare - bare[0], evidence[0] - evidence[0, 0])
    single = alternatives_nats(scores[:1], mixture.prior)
    assert float(single[0]) == pytest.approx(float(own[0]))


@pytest.mark.parametrize("kind", ["choice", "text"])
def test_trust_is_the_posterior_and_survives_an_interruption(
    kind: Kind, host: HFModel, mounted: Mounted, tmp_path: Path
) -> None:
    steering = mixture_of(host, mounted, LIGHT, 1.0, None).steering
    subject, questions = Subject(host, steering), solved()
    found = learnt_trust(subject, kind, questions, Kept(tmp_path / "a.json", "key"), silent)
    posterior = subject.mixture.prior.double()
    for question in questions:
        # None of them is in the memory.
        if kind == "choice":
            nats = choice_logprobs(subject, question)[:, question.right]
        else:
            nats = written_logprobs(subject, question)
        posterior = posterior * nats.exp()
    assert found is not None
    torch.testing.assert_close(found, (posterior / posterior.sum()).float(), atol=1e-4, rtol=1e-3)
    first = Kept(tmp_path / "b.json", "key")
    learnt_trust(subject, kind, questions[:2], first, silent)
    first.add_solved([0.0] + [-50.0] * (len(found) - 1))
    # What is kept is taken as it is: the third question has spoken for the host alone.
    again = learnt_trust(subject, kind, questions, Kept(tmp_path / "b.json", "key"), silent)
    assert again is not None and float(again[0]) > 1 - 1e-6
    bare = Subject(host)
    assert learnt_trust(bare, kind, questions, Kept(tmp_path / "c.json", "key"), silent) is None
    assert learnt_trust(subject, kind, [], Kept(tmp_path / "d.json", "key"), silent) is None


def test_a_memory_is_not_trusted_for_answers_that_it_holds(
    host: HFModel, mounted: Mounted, tmp_path: Path
) -> None:
    steering = mixture_of(host, mounted, ("memory",), 1.0, None).steering
    memory = steering.memories["memory"]
    text = memory.memory.text.numpy().tobytes().strip(b"\0").split(b"\0" * 16)[0].decode()
    # The end of the first document as the answer to all before it.
    prompt, answer = text[:-8], text[-8:].rstrip("\n")
    questions = [Question(prompt, answer, (answer, "qqqq"))]
    assert f"{prompt}{answer}" in text

    def trust(of: Steering) -> Tensor:
        kept = Kept(tmp_path / f"{len(list(tmp_path.iterdir()))}.json", "key")
        found = learnt_trust(Subject(host, of), "text", questions, kept, silent)
        assert found is not None
        return found

    mine = memory.memory.positions <= 16 + len(text.encode())
    assert 0 < int(mine.sum()) < len(mine)
    # As if it had never been remembered.
    without = replace(steering, memories={"memory": memory.only(~mine)})
    torch.testing.assert_close(trust(steering), trust(without))
    known = written_logprobs(Subject(host, steering), questions[0])
    honest = written_logprobs(Subject(host, without), questions[0])
    assert float(known[1:].max()) > float(honest[1:].max())
    # Where nothing is left, the memory proposes nothing, and says what the host does.
    alone = replace(steering, memories={"memory": memory.only(mine)})
    torch.testing.assert_close(trust(alone), Subject(host, alone).mixture.prior)
