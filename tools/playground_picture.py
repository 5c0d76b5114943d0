"""Take the picture of the playground that the documentation shows.

    python -m tools.playground_picture HOST ADAPTER PROMPT_FILE OUT.png

Needs Chromium on the path and the extra `browser`. The page answers the prompt with all of the
adapter's carriers; the first token that the memory decided, else the first, is explained.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from trimtab.cli_errors import run_program
from trimtab.config import ServeConfig
from trimtab.serving.run import running

WAIT_MS = 600_000
TOKENS = 40


def main() -> None:
    """Take the picture from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name in ("host", "adapter"):
        parser.add_argument(name)
    for name in ("prompt", "out"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    run_program(lambda: take(given.host, given.adapter, given.prompt, given.out))


def take(host: str, adapter: str, prompt: Path, out: Path) -> None:
    """Serve a host with an adapter, ask it to go on with a file's text, and write the picture."""
    config = ServeConfig(
        host=host,
        name="gemma-3-270m",
        adapter=(f"zig={adapter}",),
        carriers=("head", "memory", "expert"),
        port=0,
        time_limit_sec=WAIT_MS / 1000,
    )
    with running(config) as server, sync_playwright() as started:
        # As root, and in containers, Chromium cannot make a sandbox of its own.
        browser = started.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(WAIT_MS)
        page.goto(server.base_url)
        _ask(page, prompt.read_text(encoding="utf-8"))
        page.screenshot(path=out, full_page=True)
        browser.close()


def _ask(page: Any, prompt: str) -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Most tokens").fill(str(TOKENS))
    page.get_by_role("checkbox", name="expert").check()
    page.get_by_role("button", name="Continue the text").click()
    page.get_by_role("status").filter(has_text="Done").wait_for()
    by_memory = page.locator("#steered-text [role=option].memory")
    chosen = by_memory if by_memory.count() else page.locator("#steered-text [role=option]")
    chosen.first.click()


if __name__ == "__main__":
    main()
