"""Keeps schemathesis's requests small, and sends most of them to a model that is served.

Schemathesis imports it (SCHEMATHESIS_HOOKS). What breaks the document's rules is left as it is.
"""

from typing import Any

import schemathesis

TOKENS = 4
_CHOICES = ("host", "host+sea", "host+sea:0.7+ship:0.3")


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Give a request a served model, and few tokens."""
    del context, kwargs
    body = case.body
    if not isinstance(body, dict) or not {"prompt", "messages"} & set(body):
        return
    model = body.get("model")
    # One in four keeps a model that is not served.
    if isinstance(model, str) and len(model) <= 1024 and len(model) % 4:
        body["model"] = _CHOICES[len(model) % len(_CHOICES)]
    for name in ("max_tokens", "max_completion_tokens"):
        asked = body.get(name)
        if type(asked) is int and asked > TOKENS:
            body[name] = TOKENS
    names = {"max_tokens", "max_completion_tokens"}
    if "messages" in body and all(body.get(name) is None for name in names):
        body["max_tokens"] = TOKENS
