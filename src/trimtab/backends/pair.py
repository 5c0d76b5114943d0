"""The source pair: a reference and its expert, which share one set of weights where they can."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from trimtab.backends.growing_text import GrowingText, cuts_before_words
from trimtab.backends.heads import read_unembedding
from trimtab.backends.hf import HFModel, ModelFingerprint
from trimtab.backends.open import is_in_llamacpp, one_device, open_model
from trimtab.carriers.expert import LoraSwitch, attach_lora
from trimtab.config import Dtype
from trimtab.errors import ModelError
from trimtab.store.expert import read_expert
from trimtab.types import Progress, silent
from trimtab.unembedding import Unembedding
from trimtab.vocab import Vocabulary


class PairStates(NamedTuple):
    """What reference and expert make of the same tokens, shapes [batch, seq, ...]."""

    reference: Tensor
    expert: Tensor


@final
class Pair:
    """A reference and its expert over one vocabulary.

    A LoRA expert lives inside the reference's own model, switched off, so that `reference` is
    the base bit for bit except inside `as_expert` and `as_both`; its passes with a cache are the
    base's up to rounding, once `pair_passes.prepare` has made them lean. Calls from several
    threads are not covered.

    Attributes:
        serves_both: Whether one pass can serve both models; None until `pair_passes` has tried.
        reads_trees: Whether `pair_passes` has seen that the reference reads texts as trees.
    """

    def __init__(self, reference: HFModel, expert: HFModel | LoraSwitch) -> None:
        """Pair an open reference with a second model, or with the LoRA inside it.

        Raises:
            ModelError: The two have different vocabularies or numbers of hidden features.
        """
        self._reference = reference
        self._switch = expert if isinstance(expert, LoraSwitch) else None
        self._expert = reference if isinstance(expert, LoraSwitch) else expert
        self.serves_both: bool | None = None
        self.reads_trees = False
        if self._expert.vocabulary.sha256 != reference.vocabulary.sha256:
            raise ModelError(
                f"{self._expert.ref} and {reference.ref} have different vocabularies",
                hint="tune the expert again from this reference",
            )

    @property
    def reference(self) -> HFModel:
        """The small model before fine-tuning."""
        return self._reference

    @property
    def vocabulary(self) -> Vocabulary:
        """The bytes of every token id, of both."""
        return self._reference.vocabulary

    @property
    def reference_unembedding(self) -> Unembedding:
        """From the reference's hidden states to its logits."""
        return self._reference.unembedding

    @property
    def expert_unembedding(self) -> Unembedding:
        """From the expert's hidden states to its logits; the reference's own for a LoRA."""
        return self._expert.unembedding

    def growing_text(self, *, follows: bool) -> GrowingText:
        """The tokenizer for a text that grows; one that follows other tokens, or begins."""
        following = self._reference.encode_following
        return GrowingText(
            following if follows else self._reference.encode,
            following if self._cuts_before_words else None,
            self.vocabulary.token_bytes,
        )

    @cached_property
    def _cuts_before_words(self) -> bool:
        model = self._reference
        return cuts_before_words(model.encode, model.encode_following, model.vocabulary)

    @contextmanager
    def as_expert(self, *, briefly: bool = False) -> Iterator[HFModel]:
        """Give the expert as a model, for as long as the context lasts.

        For a LoRA this is the reference's own model switched over; both cannot run at once, but
        their key-value caches can live side by side.

        Args:
            briefly: For a pass or two: nothing is made for it that is kept.
        """
        if self._switch is None:
            yield self._expert
            return
        with self._switch.on(briefly=briefly):
            # What is kept of the reference is not true of its switched model.
            yield replace(self._expert, source=None)

    @contextmanager
    def as_both(self) -> Iterator[HFModel]:
        """Give the model that is the reference to a batch's first row, the expert to its second.

        Raises:
            ValueError: They share no weights, or (inside, from a pass) a layer is given the tokens
                in another form than two rows of them.
        """
        if self._switch is None:
            raise ValueError("two models with weights of their own cannot share a pass")
        with self._switch.on_second():
            yield replace(self._reference, source=None)

    def expert_copy(self, dtype: torch.dtype) -> HFModel:
        """A copy of an expert that shares its weights with the reference, in numbers of its own.

        Args:
            dtype: Of its weights.

        Raises:
            ValueError: The two share no weights.
        """
        if self._switch is None:
            raise ValueError("the expert has weights of its own")
        model = self._switch.merged_copy(self._reference.model, dtype)
        unembedding = read_unembedding(model)
        return replace(self._reference, model=model, unembedding=unembedding, source=None)

    @property
    def shares_weights(self) -> bool:
        """The expert is the reference with a LoRA beside linear layers, all of them at hand."""
        return self._switch is not None and self._switch.is_linear

    def hidden(self, token_ids: Tensor, *, attention_mask: Tensor | None = None) -> PairStates:
        """Compute both final hidden states.

        Args:
            token_ids: Shape [batch, seq].
            attention_mask: 1 for tokens and 0 for padding on the right, shape [batch, seq].

        Returns:
            Two tensors of shape [batch, seq, hidden].
        """
        with torch.inference_mode():
            reference = self._reference.hidden(token_ids, attention_mask=attention_mask)
            with self.as_expert() as model:
                expert = model.hidden(token_ids, attention_mask=attention_mask)
        return PairStates(reference, expert)

    def reference_logits(self, token_ids: Tensor) -> Tensor:
        """The reference's own logits, shape [batch, seq, vocab]."""
        with torch.inference_mode():
            return self._reference.logits(token_ids)

    def expert_logits(self, token_ids: Tensor) -> Tensor:
        """The expert's own logits, shape [batch, seq, vocab]."""
        with torch.inference_mode(), self.as_expert() as model:
            return model.logits(token_ids)


def open_pair(
    expert_folder: Path,
    *,
    dtype: Dtype = "auto",
    device_map: str | None = None,
    progress: Progress = silent,
) -> Pair:
    """Open the expert that `tune` wrote, with its reference.

    Args:
        expert_folder: Folder with expert.json.
        dtype: Arithmetic of both.
        device_map: Where both go; None is the first accelerator, or the CPU.
        progress: Shows the opening of the reference.

    Raises:
        InputError: The folder holds no finished expert.
        ModelError: The reference cannot be opened, or is not the one that was tuned.
        AdapterError: The LoRA is broken or does not fit.
    """
    manifest = read_expert(expert_folder)
    fingerprint = ModelFingerprint(
        manifest.base.vocabulary_sha256, manifest.base.unembedding_sha256
    )
    options: dict[str, Any] = {
        "dtype": dtype,
        "device_map": device_map or one_device(),
        "progress": progress,
    }
    if manifest.method != "full":
        folder = expert_folder / "lora"
        return open_pair_from(manifest.base.ref, folder, fingerprint=fingerprint, **options)
    reference = open_checked(manifest.base.ref, fingerprint=fingerprint, **options)
    return Pair(reference, open_model(str(expert_folder / "model"), **options))


def open_pair_from(
    base_ref: str,
    lora_folder: Path,
    *,
    fingerprint: ModelFingerprint,
    dtype: Dtype = "auto",
    device_map: str | None = None,
    progress: Progress = silent,
) -> Pair:
    """Open a base model and put a LoRA into it.

    Args:
        base_ref: The base: hub name[@revision], folder, GGUF file, tiny:NAME, or
            llamacpp:FILE.gguf, of which both models run in llama.cpp, as quantised as it is.
        lora_folder: PEFT folder of the LoRA.
        fingerprint: What the base must be.
        dtype: Arithmetic.
        device_map: Where it goes; None is the first accelerator, or the CPU.
        progress: Shows the opening.

    Raises:
        ModelError: The base cannot be opened or has another fingerprint.
        AdapterError: The LoRA is broken or does not fit.
    """
    if is_in_llamacpp(base_ref):
        # Imported here: what it needs is in an extra.
        from trimtab.backends.llamacpp.opening import with_expert

        reference = open_checked(
            base_ref, fingerprint=fingerprint, dtype=dtype, engines=True, progress=progress
        )
        return Pair(reference, with_expert(reference, lora_folder))
    reference = open_checked(
        base_ref,
        fingerprint=fingerprint,
        dtype=dtype,
        device_map=device_map or one_device(),
        progress=progress,
    )
    return Pair(reference, attach_lora(reference.model, lora_folder))


def open_checked(
    ref: str,
    *,
    fingerprint: ModelFingerprint,
    dtype: Dtype = "auto",
    device_map: str | None = None,
    engines: bool = False,
    progress: Progress = silent,
) -> HFModel:
    """Open a model and make sure that it is the one that is meant.

    Raises:
        ModelError: It cannot be opened, or its vocabulary or unembedding is another.
    """
    model = open_model(
        ref,
        dtype=dtype,
        device_map=device_map,
        engines=engines,
        progress=progress,
    )
    found = model.fingerprint
    pairs = {
        "vocabulary": (found.vocabulary_sha256, fingerprint.vocabulary_sha256),
        "unembedding": (found.unembedding_sha256, fingerprint.unembedding_sha256),
    }
    for part, (ours, expected) in pairs.items():
        if ours != expected:
            raise ModelError(
                f"the {part} of {ref} has sha256 {ours[:12]}, expected {expected[:12]}",
                hint="this is not the model that the expert was tuned from; name that one",
            )
    return model
