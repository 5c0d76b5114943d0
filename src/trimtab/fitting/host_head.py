"""Host-fit: the same head fitted on one host's own hidden states, against recorded soft targets.

The host runs forward over the recorded text and is never trained: no gradient passes through it.
Labels, the text's own next tokens, can be followed in place of soft targets: the control that
says what the soft targets are worth.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.align.carry import Alignment
from trimtab.align.strings import token_lengths
from trimtab.backends.hf import HFModel
from trimtab.blend import BlendWeights, log_linear
from trimtab.carriers.head import Head
from trimtab.config import FitConfig
from trimtab.errors import InputError
from trimtab.fitting.head import Checkpoint, HeadData, HeadSettings, fit_head
from trimtab.fitting.recorded import Columns, SmallLogits, byte_ends, document_bytes
from trimtab.steering.host_states import HostStates, host_states, same_bytes
from trimtab.types import Progress

KEPT_BYTES = 2**30
"""Targets up to this size are computed once and kept in float16, else anew in each pass."""

CARRY_POSITIONS = 256
"""Positions whose targets are computed at once when they are kept."""

LEAST_PROB = 1e-9
"""Probability of a host token to which the alignment carries nothing; a logit needs one."""


IMPOSSIBLE_LOGIT = -1e4
"""Logit of a token that is not the label: its probability is 0 in float32, and 0 times it is 0."""

TARGET_BLEND = BlendWeights(0.5, 1.0, 0.5)
"""What a blend target is made of; its weights sum to one, so that equal models change nothing."""


@dataclass(frozen=True)
class Followed:
    """What the head is to follow on the training text.

    Attributes:
        rows: Rows of the host's training states, shape [followed].
        logits: From places in `rows` [batch] to log-probabilities, up to a constant,
            shape [batch, active].
    """

    rows: Tensor
    logits: Callable[[Tensor], Tensor]


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

    def soft_targets(
        self, active: Tensor, expert: SmallLogits, reference: SmallLogits | None = None
    ) -> Followed:
        """The expert in the host's tokens, or its blend with the host and the reference.

        Both are carried to the host's tokens where host and small model have read the same bytes;
        the other positions have no target.

        Args:
            active: Host tokens that the loss tells apart, shape [active].
            expert: The expert at recorded positions.
            reference: The reference likewise, to follow the blend by `TARGET_BLEND`.

        Raises:
            InputError: Nowhere do both tokenizers end a token after the same bytes.
        """
        if not len(self.small_rows):
            raise InputError(
                f"{self.host.ref} and the small model never end a token after the same bytes of"
                " the recorded text",
                hint="fit without --host: head and memory are then mounted by the vocabulary",
            )

        def carried(small: SmallLogits, batch: Tensor, host_probs: Tensor) -> Tensor:
            probs = small(self.small_rows[batch], None).float().softmax(-1)
            return self.alignment.to_host(probs, host_probs, active).clamp_min(LEAST_PROB).log()

        def logits(batch: Tensor) -> Tensor:
            host_logits = self._host_logits(self.train.hidden[self.host_rows[batch]], active)
            host_probs = host_logits.softmax(-1)
            expert_logprobs = carried(expert, batch, host_probs)
            if reference is None:
                return expert_logprobs
            reference_logprobs = carried(reference, batch, host_probs)
            return log_linear(
                host_logits.log_softmax(-1), expert_logprobs, reference_logprobs, TARGET_BLEND
            )

        return Followed(self.host_rows, logits)

    def label_targets(self, active: Tensor) -> Followed:
        """The text's own next tokens, as the host reads it; the loss is then the cross entropy.

        No alignment is needed: every position counts whose next token is of the same document
        and active. A label outside the active tokens, which the loss cannot tell apart, is
        passed over.

        Args:
            active: Host tokens that the loss tells apart, shape [active].

        Raises:
            InputError: No position has such a label.
        """
        place = torch.full((len(self.host.vocabulary),), -1)
        place[active] = torch.arange(len(active))
        labels = place[self.train.token_ids[1:]]
        goes_on = self.train.document_index[1:] == self.train.document_index[:-1]
        rows = (goes_on & (labels >= 0)).nonzero().flatten()
        if not len(rows):
            raise InputError(
                f"no document of the recorded text has a next token of {self.host.ref} to follow",
                hint="record longer documents, or raise --active-tokens",
            )

        def logits(batch: Tensor) -> Tensor:
            others = torch.full((len(batch), len(active)), IMPOSSIBLE_LOGIT)
            return others.scatter_(1, labels[rows[batch]][:, None], 0.0)

        return Followed(rows, logits)

    def head_data(self, followed: Followed, active: Tensor, general_weight: float) -> HeadData:
        """What the head is fitted to: targets on the domain, the host itself elsewhere.

        Args:
            followed: The targets.
            active: Host tokens that the loss tells apart, shape [active].
            general_weight: How much a position of general text counts.
        """
        domain = len(followed.rows)
        hidden = torch.cat([self.train.hidden[followed.rows], self.general.hidden])
        weight = torch.ones(len(hidden))
        weight[domain:] = general_weight

        def logits(batch: Tensor, compared: Tensor) -> tuple[Tensor, Tensor]:
            own, steered = self._host_logits(hidden[batch], active[compared]), batch < domain
            target = own.clone()
            if steered.any():
                target[steered] = followed.logits(batch[steered])[:, compared]
            return own, target

        return HeadData(hidden, logits, weight)

    def _host_logits(self, states: Tensor, active: Tensor) -> Tensor:
        unembedding = self.host.unembedding
        return unembedding.logits(states.to(self.host.device), active).float().cpu()


def prepare(
    host: HFModel, small: HFModel, splits: dict[str, Columns], progress: Progress
) -> HostFit:
    """Run a host over a recording's training and general text.

    Args:
        host: The host.
        small: The recorded model.
        splits: train and general of the recording.
        progress: Shows both passes.
    """
    domain, general = (
        host_states(host, document_bytes(small.vocabulary, splits[name]), label, progress)
        for name, label in (
            ("train", "running the host over the domain text"),
            ("general", "running the host over general text"),
        )
    )
    train = splits["train"]
    # Documents count from 0 in both, even where a limit cuts the recording's end.
    rows = same_bytes(train["document_index"], byte_ends(small.vocabulary, train), domain)
    alignment = Alignment(small.strings, host.strings)
    return HostFit(host, alignment, domain, general, *rows)


def fit_host_head(
    config: FitConfig,
    prepared: HostFit,
    expert: SmallLogits,
    reference: SmallLogits,
    checkpoint: Checkpoint,
    progress: Progress,
) -> Head:
    """Fit the head on the host's states.

    The base that it shifts is the host's own logits and the target what the configuration says:
    the expert, the blend or the labels. On general text the target is the host itself.

    Args:
        config: Targets, rank, passes, step size.
        prepared: The host's states.
        expert: The expert at recorded positions.
        reference: The reference likewise.
        checkpoint: Where the fit is saved and continued.
        progress: Counts positions.

    Raises:
        InputError: No position has a target.
        NumericalError: The loss is not finite.
    """
    unembedding = prepared.host.unembedding
    active = prepared.active(config.active_tokens)
    rows = unembedding.weight[active.to(unembedding.weight.device)].detach().float().cpu()
    if config.targets == "labels":
        followed = prepared.label_targets(active)
    else:
        beside = reference if config.targets == "blend" else None
        followed = prepared.soft_targets(active, expert, beside)
        if 2 * len(followed.rows) * len(active) <= KEPT_BYTES:
            followed = _kept(followed, progress)
    spread = prepared.general.hidden.float()
    data = prepared.head_data(followed, active, config.general_weight)
    # All active tokens are compared: a label would seldom be among a few.
    settings = HeadSettings(
        config.rank, config.epochs, config.learning_rate, config.seed, drawn=None
    )
    moments = (spread.mean(0), spread.std(0))
    return fit_with_progress(
        data, rows * unembedding.scale, moments, settings, checkpoint, progress
    )


@torch.no_grad()
def _kept(followed: Followed, progress: Progress) -> Followed:
    parts = []
    with progress("carrying the targets to the host's tokens", len(followed.rows)) as advance:
        for batch in torch.arange(len(followed.rows)).split(CARRY_POSITIONS):
            parts.append(followed.logits(batch).half())
            advance(len(batch))
    kept = torch.cat(parts)
    return Followed(followed.rows, lambda batch: kept[batch].float())


def fit_with_progress(
    data: HeadData,
    rows: Tensor,
    moments: tuple[Tensor, Tensor],
    settings: HeadSettings,
    checkpoint: Checkpoint,
    progress: Progress,
) -> Head:
    """Fit a head under a progress display; arguments as `fit_head`."""
    total = settings.epochs * len(data.hidden)
    with progress("fitting the head (tokens)", total) as advance:
        return fit_head(data, rows, moments, settings, checkpoint=checkpoint, on_batch=advance)
