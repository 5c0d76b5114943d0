"""Opening a host behind an API, and finding out what it can do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trimtab.config import HostedOptions, ProbeConfig
from trimtab.errors import InputError, ModelError
from trimtab.hosted.address import Address, missing_key
from trimtab.hosted.client import Client, Manners
from trimtab.hosted.host import HostedModel
from trimtab.hosted.identity import Identity, identified
from trimtab.hosted.ledger import Ledger, Price
from trimtab.hosted.probing import capabilities_of
from trimtab.hosted.tokens import open_known
from trimtab.types import OnNote, Progress, silent


@contextmanager
def opened(
    host: str,
    options: HostedOptions,
    *,
    probe_again: bool = False,
    progress: Progress = silent,
    on_note: OnNote | None = None,
) -> Iterator[HostedModel]:
    """Open a host behind an API, and find out what it can do.

    Args:
        host: openai:MODEL or anthropic:MODEL.
        options: How it is reached and called.
        probe_again: Ask what it can do, whatever was found before.
        progress: Shows the opening of a tokenizer.
        on_note: Gets why a request is sent again, what seems to be wrong with key or tokenizer, and
            what a look has used that came to no end.

    Raises:
        ModelError: It cannot be reached, or refuses key or model.
        InputError: It has not been looked at yet, and the budget of tokens may be too small for it.
    """
    address = Address.of(host, options.api_url)
    tokens = open_known(options.api_tokenizer, progress) if options.api_tokenizer else None
    ledger = Ledger(options.api_budget_tokens)
    client = Client(address, manners_of(options), ledger, on_note=on_note)
    if on_note is not None and (note := missing_key(address)):
        on_note(note)
    named, by, top = options.api_tokenizer or "", None, options.api_top_logprobs

    def look(*, again: bool) -> HostedModel:
        found = capabilities_of(client, tokens, top=top, named=named, again=again)
        return HostedModel(client, found, tokens)

    try:
        model = look(again=probe_again)
        if options.api_cache:
            model = _recognised(model, look, on_note)
        by = model.by
        yield model
    finally:
        client.close()
        # What a look has used is to be paid, however it has ended.
        if by is None and ledger.calls and on_note is not None:
            on_note(f"used {ledger.summary(price_of(options))}")


def _recognised(
    host: HostedModel, look: Callable[..., HostedModel], on_note: OnNote | None
) -> HostedModel:
    """Use and keep this model's answers alone; one that is not the former is looked at anew."""
    client, is_looked_at = host.client, bool(host.client.ledger.calls)
    found = identified(host)
    if found.is_other and not is_looked_at:
        host = look(again=True)
        again = identified(host)
        found = Identity(again.name, is_other=True)
    client.keep_for(found.name)
    for note in _notes(client.address, found):
        if on_note is not None:
            on_note(note)
    return host


def _notes(address: Address, found: Identity) -> Iterator[str]:
    if found.is_other:
        yield (
            f"{address.url} does not answer as it did: it is taken for another model under the"
            f" name {address.model}, and no answers kept of the former are used"
        )
    elif found.name is None:
        yield (
            "the budget does not allow the question that tells whether the model is the one whose"
            " answers are kept: none are used, and none of this run are kept"
        )


def manners_of(options: HostedOptions) -> Manners:
    """How an API is to be called."""
    return Manners(
        options.api_timeout_sec,
        options.api_attempts,
        options.api_requests_per_min,
        options.api_cache,
    )


def served_model(options: ProbeConfig, *, on_note: OnNote | None = None) -> str:
    """The one model that an address serves.

    Args:
        options: The address, and how it is called.
        on_note: Gets why a request is sent again.

    Raises:
        InputError: It serves none or several, among which a user must choose.
        ModelError: It cannot be reached, or does not tell.
    """
    address = Address.of(options.host, options.api_url)
    client = Client(address, manners_of(options), Ledger(), on_note=on_note)
    try:
        found = client.get("/models")
    finally:
        client.close()
    listed = found.get("data")
    if not isinstance(listed, list):
        raise ModelError(
            f"{options.api_url}/models answers without a list of models",
            hint="name the model: openai:MODEL --api-url URL",
        )
    names = [str(one.get("id")) for one in listed if isinstance(one, dict)]
    if len(names) == 1:
        return names[0]
    shown = ", ".join(names[:8]) or "none that it names"
    raise InputError(
        f"{options.api_url} serves {len(names)} models: {shown}",
        hint="name one: openai:MODEL --api-url URL",
    )


def price_of(options: HostedOptions) -> Price | None:
    """The price that was given, if one was."""
    if options.api_price_in is None or options.api_price_out is None:
        return None
    return Price(options.api_price_in, options.api_price_out)
