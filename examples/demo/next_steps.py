"""What to type after the demo: the same adapter by hand, and in the playground."""

import html
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlencode

from trimtab.report import Completion
from trimtab.store.files import writing_atomically
from trimtab.store.home import HOME_VARIABLE

PLAYGROUND = "http://127.0.0.1:8000/"
"""Where `trimtab serve` shows its page."""

CARRIERS = "head,memory,expert"


def next_steps(host: str, adapter: Path, prompt: Path, page: Path) -> str:
    """Commands to go on with.

    Args:
        host: What the adapter steers.
        adapter: Its folder.
        prompt: A file whose beginning is gone on from.
        page: What `write_playground` wrote.
    """
    home = os.environ.get(HOME_VARIABLE)
    cache = f"{HOME_VARIABLE}={shlex.quote(home)} " if home else ""
    trimtab_at, pip = (
        shlex.quote(str(Path(sys.executable).with_name(name))) for name in ("trimtab", "pip")
    )
    generate = ("generate", "--host", host, "--adapter", str(adapter))
    generate += ("--carriers", CARRIERS, "--temperature", "0.7")
    serve = ("serve", host, "--adapter", f"zig={adapter}", "--carriers", CARRIERS)
    return (
        f"next:    {trimtab_at} show {shlex.quote(str(adapter))}\n"
        f"         {cache}{trimtab_at} {shlex.join(generate)}"
        f' "$(head -n 40 {shlex.quote(str(prompt))})"\n'
        f"         {cache}{trimtab_at} {shlex.join(serve)}\n"
        f"         and then open {page} (to serve: {pip} install -c constraints.txt -e '.[serve]')"
    )


def write_playground(path: Path, completions: Sequence[Completion]) -> None:
    """A page that leads to the playground, with a prompt that went on otherwise once steered.

    Args:
        path: Of the page.
        completions: How the host went on, before and after.
    """
    state = {"carriers": CARRIERS, "tokens": "40"}
    differ = (one for one in completions if _first_line(one.before) != _first_line(one.after))
    if (found := next(differ, None)) is not None:
        state["prompt"] = found.prompt
    address = html.escape(f"{PLAYGROUND}#{urlencode(state)}")
    with writing_atomically(path) as partial:
        partial.write_text(
            f"""<!doctype html>
<meta charset="utf-8"><meta http-equiv="refresh" content="0; url={address}">
<title>Trimtab's playground</title>
<p>Start the server as the demo says, and open <a href="{address}">the playground</a>.</p>
"""
        )


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
