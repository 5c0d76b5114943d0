"""What a host lets us see, and which carriers can steer it."""

from dataclasses import dataclass

from trimtab.backends.open import open_model
from trimtab.config import ProbeConfig, is_hosted
from trimtab.types import OnNote, Progress, silent


@dataclass(frozen=True)
class ProbeResult:
    """What was found out about a host.

    Attributes:
        host: Its name.
        table: What it lets us see, and which carriers can use it, in words.
    """

    host: str
    table: str

    def summary(self) -> str:
        """Name and table."""
        return f"{self.host}\n\n{self.table}"


def probe(
    config: ProbeConfig, *, progress: Progress = silent, on_note: OnNote | None = None
) -> ProbeResult:
    """Find out what a host lets us see. An API is asked a dozen short questions, which it charges.

    Args:
        config: The host. An address of an API is asked for its models, and must serve one only.
        progress: Shows the opening of a local host.
        on_note: Gets why a request is sent again, and what a look has used that came to no end.

    Raises:
        InputError: An address serves several models.
        ModelError: The host cannot be opened or reached, or refuses.
    """
    if not is_hosted(config.host) and not config.host.startswith(("http://", "https://")):
        return ProbeResult(config.host, _local(config.host, progress))
    # Imported here: what it needs is in an extra.
    from trimtab.hosted.address import ANY_MODEL
    from trimtab.hosted.opening import opened, price_of, served_model

    if not is_hosted(config.host):
        url = config.host
        values = config.model_dump() | {"api_url": url, "host": f"openai:{ANY_MODEL}"}
        config = ProbeConfig.model_validate(values)
        name = f"openai:{served_model(config, on_note=on_note)}"
        config = ProbeConfig.model_validate(values | {"host": name})
    with opened(config.host, config, probe_again=True, progress=progress, on_note=on_note) as host:
        used = host.client.ledger.summary(price_of(config))
        table = host.by.table(knows_tokens=host.tokens is not None)
        return ProbeResult(f"{config.host} at {host.client.address.url}", f"{table}\nused {used}")


def _local(ref: str, progress: Progress) -> str:
    host = open_model(ref, engines=True, progress=progress)
    target = "the target of a source" if host.is_encoder_decoder else "a text"
    rows = [
        ("continues", target),
        ("tokens", f"{len(host.vocabulary):,}"),
        ("positions", "unbounded" if host.max_tokens is None else f"{host.max_tokens:,}"),
        ("chat template", "yes" if host.tokenizer.chat_template else "no"),
        ("full logits", "yes"),
        ("hidden states", f"yes, {host.unembedding.weight.shape[1]:,} features"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]
    return "\n".join([*lines, "", "head, memory and expert can steer it, in any combination"])
