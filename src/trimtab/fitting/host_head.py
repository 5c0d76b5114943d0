"""Host-fit: the same head fitted on one host's own hidden states, against recorded soft targets.

The host runs forward over the recorded text and is never trained: no gradient passes through it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.align import Alignment, Strings, token_lengths
from trimtab.backends.hf import HFModel
from trimtab.carriers.head import Head, HeadData, HeadSettings, fit_head
from trimtab.config import FitConfig
from trimtab.errors import InputError
from trimtab.fitting.recorded import Columns, ExpertLogits, byte_ends, document_bytes
from trimtab.steering.host_states import HostStates, host_states, same_bytes
from trimtab.types import Progress
from trimtab.vocab import Vocabulary

KEPT_BYTES = 2**30
"""Targets up to this size are computed once and kept in float16, else anew in each pass."""

CARRY_POSITIONS = 256
"""Positions whose targets are computed at once when they are kept."""

LEAST_PROB = 1e-9
"""Probability of a host token to which the alignment carries nothing; a logit needs one."""


@dataclass(frozen=True)
class HostFit:
    """What a host-fit works on.

    Attributes:
        host: The host.
        alignment: From the small model's tokens to the host's.
        train: The host on the training text.
        general: The host on general text.
        small_rows: Recorded positions that the host reads at the same bytes, shape [pairs].
        host_rows: Rows of `train` that do, shape [pairs].
    """

    host: HFModel
    alignment: Alignment
    train: HostStates
    general: HostStates
    small_rows: Tensor
    host_rows: Tensor

    def active(self, limit: int) -> Tensor:
        """The host's most frequent tokens in the recorded text that stand for text."""
        ids = torch.cat([self.train.token_ids, self.general.token_ids])
        counts = torch.bincount(ids, minlength=len(self.host.vocabulary))
        order = torch.argsort(counts, descending=True, stable=True)
        return order[token_lengths(self.host.vocabulary)[order] > 0][:limit]

    @property
    def hidden(self) -> Tensor:
        """The host's states: of the pairs, then of general text, shape [positions, hidden]."""
        return torch.cat([self.train.hidden[self.host_rows], self.general.hidden])

    def expert_targets(self, expert: ExpertLogits, active: Tensor) -> Callable[[Tensor], Tensor]:
        """The expert in the host's tokens.

        Args:
            expert: The expert at recorded positions.
            active: Host tokens, shape [active].

        Returns:
            From pairs [batch] to log-probabilities, up to a constant, shape [batch, active].
        """
        weight, device = self.host.unembedding, self.host.device

        def carried(batch: Tensor) -> Tensor:
            states = self.train.hidden[self.host_rows[batch]].to(device)
            host_probs = weight.logits(states, active).float().cpu().softmax(-1)
            probs = expert(self.small_rows[batch], None).float().softmax(-1)
            return self.alignment.to_host(probs, host_probs, active).clamp_min(LEAST_PROB).log()

        return carried

    def head_data(
        self, target: Callable[[Tensor], Tensor], active: Tensor, general_weight: float
    ) -> HeadData:
        """What the head is fitted to: the expert on the domain, the host itself elsewhere.

        Args:
            target: From pairs to the expert in the host's tokens, as `expert_targets` gives it.
            active: Host tokens that the loss tells apart, shape [active].
            general_weight: How much a position of general text counts.
        """
        pairs, hidden = len(self.small_rows), self.hidden
        weight = torch.ones(len(hidden))
        weight[pairs:] = general_weight

        def base(batch: Tensor) -> Tensor:
            states = hidden[batch].to(self.host.device)
            return self.host.unembedding.logits(states, active).float().cpu()

        def followed(batch: Tensor) -> Tensor:
            logits, domain = base(batch), batch < pairs
            if domain.any():
                logits[domain] = target(batch[domain])
            return logits

        return HeadData(hidden, base, followed, weight)


def prepare(
    host: HFModel, small: Vocabulary, splits: dict[str, Columns], progress: Progress
) -> HostFit:
    """Run a host over a recording's training and general text.

    Args:
        host: The host.
        small: Vocabulary of the recorded model.
        splits: train and general of the recording.
        progress: Shows both passes.

    Raises:
        InputError: Nowhere do both tokenizers end a token after the same bytes.
    """
    domain, general = (
        host_states(host, document_bytes(small, splits[name]), label, progress)
        for name, label in (
            ("train", "running the host over the domain text"),
            ("general", "running the host over general text"),
        )
    )
    train = splits["train"]
    # Documents count from 0 in both, even where a limit cuts the recording's end.
    rows = same_bytes(train["document_index"], byte_ends(small, train), domain)
    if not len(rows[0]):
        raise InputError(
            f"{host.ref} and the small model never end a token after the same bytes of the"
            " recorded text",
            hint="fit without --host: head and memory are then mounted by the vocabulary",
        )
    alignment = Alignment(Strings(small), Strings(host.vocabulary))
    return HostFit(host, alignment, domain, general, *rows)


def fit_host_head(
    config: FitConfig, prepared: HostFit, expert: ExpertLogits, progress: Progress
) -> Head:
    """Fit the head on the host's states.

    The base that it shifts is the host's own logits and the target the expert's distribution,
    carried to the host's tokens wherever both have read the same bytes; on general text the
    target is the host itself.

    Args:
        config: Rank, passes, step size.
        prepared: The host's states.
        expert: The expert at recorded positions.
        progress: Counts positions.

    Raises:
        NumericalError: The loss is not finite.
    """
    unembedding = prepared.host.unembedding
    active = prepared.active(config.active_tokens)
    rows = unembedding.weight[active.to(unembedding.weight.device)].detach().float().cpu()
    target = prepared.expert_targets(expert, active)
    pairs = len(prepared.small_rows)
    if 2 * pairs * len(active) <= KEPT_BYTES:
        target = _kept(target, pairs, progress)
    spread = prepared.general.hidden.float()
    data = prepared.head_data(target, active, config.general_weight)
    settings = HeadSettings(config.rank, config.epochs, config.learning_rate, config.seed)
    return fit_with_progress(
        data, rows * unembedding.scale, (spread.mean(0), spread.std(0)), settings, progress
    )


@torch.no_grad()
def _kept(
    target: Callable[[Tensor], Tensor], pairs: int, progress: Progress
) -> Callable[[Tensor], Tensor]:
    parts = []
    with progress("carrying the expert to the host's tokens", pairs) as advance:
        for batch in torch.arange(pairs).split(CARRY_POSITIONS):
            parts.append(target(batch).half())
            advance(len(batch))
    kept = torch.cat(parts)
    return lambda batch: kept[batch].float()


def fit_with_progress(
    data: HeadData,
    rows: Tensor,
    moments: tuple[Tensor, Tensor],
    settings: HeadSettings,
    progress: Progress,
) -> Head:
    """Fit a head under a progress display; arguments as `fit_head`, moments its mean and std."""
    total = settings.epochs * len(data.hidden)
    with progress("fitting the head", total) as advance:
        return fit_head(data, rows, *moments, settings, on_batch=advance)
