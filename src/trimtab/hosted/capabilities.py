"""What an API lets us see, in words and on disk."""

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from trimtab.hosted.address import Address
from trimtab.hosted.ledger import counted
from trimtab.store.files import sha256_bytes, write_json
from trimtab.store.home import read_kept, trimtab_home

Prefill = Literal["none", "plain", "flagged"]
Bias = Literal["none", "accepted", "works"]


class Capabilities(BaseModel):
    """What was found when an API was asked."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    schema_version: Literal[1] = 1
    """Changes whenever a field means something else."""
    dialect: Literal["openai", "anthropic"]
    """How it is spoken to."""
    completions: bool = False
    """/completions continues a text."""
    chat: bool = False
    """/chat/completions, or /messages, answers a message."""
    top_completions: int = 0
    """Likeliest tokens that it shows at each place of a continuation."""
    top_chat: int = 0
    """The same in a chat."""
    echo: bool = False
    """/completions shows the tokens of the prompt with their log-probabilities."""
    token_prompts: bool = False
    """/completions takes token ids for a prompt, and reads them as the tokenizer given."""
    prefill: Prefill = "none"
    """A chat goes on from the beginning of an answer: by itself, or where fields of the request
    ask for it."""
    several: bool = False
    """One request can ask for several continuations."""
    logit_bias: Bias = "none"
    """logit_bias is refused, or accepted, or was seen to work."""
    length_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """How a chat's longest answer is called."""
    takes_temperature: bool = True
    """A request can say how tokens are drawn, by temperature and top_p; otherwise they are drawn in
    the API's own way."""
    shortest_tokens: int = 1
    """Least bound on the length of an answer that it takes."""

    def top(self, *, chat: bool) -> int:
        """Likeliest tokens shown at each place that can be steered; 0 where none can be."""
        if not chat:
            return self.top_completions if self.completions else 0
        return self.top_chat if self.chat and self.prefill != "none" else 0

    def table(self, *, knows_tokens: bool) -> str:
        """What there is, and which carriers can use it, in words.

        Args:
            knows_tokens: The API's tokenizer was given; without it some things are not tried.
        """
        tokens = _yes(self.token_prompts) if knows_tokens else "not tried without --api-tokenizer"
        rows = [
            ("plain text (/completions)", _yes(self.completions)),
            ("chat", _yes(self.chat)),
            ("top logprobs, plain text", _count(self.top_completions)),
            ("top logprobs, chat", _count(self.top_chat)),
            ("logprobs of the prompt (echo)", _yes(self.echo)),
            ("prompt as token ids", tokens),
            ("answer goes on from a beginning", _PREFILL[self.prefill]),
            ("several candidates a request", _yes(self.several)),
            ("logit_bias", _BIAS[self.logit_bias]),
            ("temperature", _yes(self.takes_temperature)),
            ("shortest answer", counted(self.shortest_tokens, "token")),
            ("full logits", "no"),
            ("hidden states", "no"),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:{width}}  {value}" for name, value in rows]
        return "\n".join([*lines, "", *self._carriers()])

    def _carriers(self) -> list[str]:
        plain, chat = self.top(chat=False), self.top(chat=True)
        ways = [("plain text", plain, self.completions), ("chat", chat, self.chat)]
        lines = []
        for way, top, there in ways:
            if top:
                how = f"expert, blended token by token with the top {top} logprobs"
                lines.append(f"{way}: {how}")
            elif there:
                lines.append(f"{way}: expert, which chooses the best of several candidates")
        if self.top_chat and not chat:
            lines.append(
                "the chat shows logprobs but starts every answer anew, so that no token can be"
                " chosen for it"
            )
        lines.append("head and memory read a host's hidden states, which no API shows")
        return lines


_PREFILL = {"none": "no", "plain": "yes", "flagged": "yes, where asked for"}
_BIAS = {"none": "no", "accepted": "accepted, effect not seen", "works": "yes"}


def _yes(found: bool) -> str:
    return "yes" if found else "no"


def _count(top: int) -> str:
    return str(top) if top else "none"


def kept_path(address: Address, asked: str) -> Path:
    """Where the capabilities of an address are kept, which differ with what was asked for."""
    name = json.dumps([address.dialect, address.url, address.model, asked])
    return trimtab_home() / "hosted" / "endpoints" / f"{sha256_bytes(name.encode())}.json"


def read_capabilities(path: Path) -> Capabilities | None:
    """What was found before; None where nothing is kept, or nothing that can be read."""
    try:
        return Capabilities.model_validate(read_kept(path))
    except ValidationError:
        return None


def write_capabilities(path: Path, found: Capabilities) -> None:
    """Keep what was found."""
    write_json(path, found.model_dump(mode="json"))
