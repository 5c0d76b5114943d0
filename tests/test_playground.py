"""The playground in a real browser: type, stream, move a slider, choose a token, see its sources.

Needs Chromium on the path (or TRIMTAB_TEST_CHROMIUM) and the extra `browser`.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import httpx2
import pytest
from test_generate import adapter as adapter  # a fixture
from test_generate import host as host  # a fixture
from test_serve_engine import served

from trimtab.backends.hf import HFModel
from trimtab.serving.keys import add_key
from trimtab.serving.run import Running, running

CHROMIUM = os.environ.get("TRIMTAB_TEST_CHROMIUM") or shutil.which("chromium")
sync_api: Any = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

PROMPT = "The rudder turns the hull.\nThe keel turns the"
TOKENS = 12
PICTURES = Path(__file__).parent.parent / "build" / "playground"
"""How the page looked at the end of each test."""


@pytest.fixture(scope="module")
def server(host: HFModel, adapter: Path) -> Iterator[Running]:
    with running(served(f"sea={adapter}", f"ship={adapter}"), host=host) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as started:
        # As root, and in containers, Chromium cannot make a sandbox of its own.
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Tab:
    """A page, with all that it asked for and complained of."""

    def __init__(self, browser: Any, url: str) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 900})
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.asked: list[Any] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on(
            "console",
            lambda said: self.errors.append(said.text) if said.type == "error" else None,
        )
        self.page.goto(url)

    def run(self, *, tokens: int = TOKENS) -> None:
        self.page.get_by_label("Most tokens").fill(str(tokens))
        self.page.get_by_role("button", name="Continue the text").click()
        self.wait()

    def wait(self) -> None:
        self.page.get_by_role("status").filter(has_text="Done").wait_for()

    def text(self, side: str) -> str:
        return "".join(self.page.locator(f"#{side}-text [role=option]").all_text_contents())

    def bodies(self) -> list[dict[str, Any]]:
        posts = [one for one in self.asked if one.url.endswith("/v1/completions")]
        return [json.loads(one.post_data) for one in posts]


@pytest.fixture
def tab(browser: Any, server: Running, request: pytest.FixtureRequest) -> Iterator[Tab]:
    found = Tab(browser, server.base_url)
    found.page.get_by_label("Prompt").fill(PROMPT)
    yield found
    PICTURES.mkdir(parents=True, exist_ok=True)
    found.page.screenshot(path=PICTURES / f"{request.node.name}.png", full_page=True)
    assert found.errors == []
    # It works offline: everything came from the server itself.
    assert all(one.url.startswith((server.base_url, "data:")) for one in found.asked)
    found.context.close()


def api(server: Running, model: str, **options: object) -> dict[str, Any]:
    body = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": TOKENS, **options}
    found = httpx2.post(f"{server.base_url}/v1/completions", json=body, timeout=60)
    assert found.status_code == 200, found.text
    return found.json()["choices"][0]


def test_both_columns_stream_what_the_api_says(tab: Tab, server: Running) -> None:
    tab.run()
    steered = api(server, "host+sea", trimtab={"trace": True, "carriers": ["head", "memory"]})
    assert tab.text("plain") == api(server, "host")["text"]
    assert tab.text("steered") == steered["text"] != tab.text("plain")
    marks = tab.page.locator("#steered-text [role=option]")
    names = [
        (name or "").split()[0] for name in [one.get_attribute("class") for one in marks.all()]
    ]
    assert names == [token["by"] for token in steered["trimtab"]["trace"]]
    for side in ("plain", "steered"):
        assert re.fullmatch(
            rf"[\d.]+ tokens/s · {marks.count()} tokens",
            tab.page.locator(f"#{side}-rate").inner_text(),
        )
    # What the page shows and hides while it streams is told to those who cannot see it.
    assert tab.page.locator("#steered-text").get_attribute("aria-busy") == "false"


def test_a_slider_steers_again_and_the_host_is_left_alone(tab: Tab, server: Running) -> None:
    tab.run()
    plain, asked = tab.text("plain"), len(tab.bodies())
    slider = tab.page.get_by_label("Strength of sea")
    slider.focus()
    tab.page.keyboard.press("Home")
    tab.page.get_by_role("status").filter(has_text=re.compile("Done .steered")).wait_for()
    new = tab.bodies()[asked:]
    assert [body["model"] for body in new] == ["host+sea"]
    assert new[0]["trimtab"] == {"trace": True, "carriers": ["head", "memory"], "strength": 0}
    # At strength 0 an adapter says nothing.
    assert tab.text("steered") == tab.text("plain") == plain
    assert tab.page.locator("#adapter-rows .value").first.inner_text() == "0.00"


def test_a_slider_asks_the_host_too_where_the_prompt_is_another(tab: Tab) -> None:
    tab.run()
    asked = len(tab.bodies())
    tab.page.get_by_label("Prompt").fill(PROMPT + " again")
    tab.page.get_by_label("Strength of sea").focus()
    tab.page.keyboard.press("Home")
    tab.page.get_by_role("status").filter(has_text=re.compile("Done .alone")).wait_for()
    new = tab.bodies()[asked:]
    assert sorted(body["model"] for body in new) == ["host", "host+sea"]
    assert {body["prompt"] for body in new} == {PROMPT + " again"}


def test_a_token_explains_itself_with_file_and_line(
    tab: Tab, server: Running, adapter: Path
) -> None:
    tab.run()
    trace = api(server, "host+sea", trimtab={"trace": True, "carriers": ["head", "memory"]})[
        "trimtab"
    ]["trace"]
    number = next(i for i, token in enumerate(trace) if token["neighbours"])
    tab.page.locator("#steered-text [role=option]").nth(number).click()
    page, token = tab.page, trace[number]
    assert page.locator("#inspector").is_visible()
    # Whoever clicks sees the answer, without scrolling.
    bars = page.locator("#inspector .bars").bounding_box()
    assert bars and 0 <= bars["y"] and bars["y"] + bars["height"] <= 901
    assert f"{token['moved_nats']:.2f} nats" in page.locator("#verdict").inner_text()
    for side in ("before", "after"):
        shares = page.locator(f"#{side} .share").all_inner_texts()
        assert len(shares) == len(token[side]) == 5
        for shown, (_, prob) in zip(shares, token[side], strict=True):
            assert shown == ("< 0.1 %" if prob < 0.0005 else f"{100 * prob:.1f} %")
        bar = page.locator(f"#{side} .bar i").first.get_attribute("style") or ""
        assert float(re.findall(r"[\d.]+", bar)[0]) == pytest.approx(100 * token[side][0][1], 1e-3)
    where = page.locator("#neighbours .where span:first-child").all_inner_texts()
    near = [token["neighbours"][0], *(n for n in token["neighbours"][1:] if n["weight"] >= 0.005)]
    assert where == [f"{one['source']}, line {one['line']}" for one in near]
    # The line is that of the file which the adapter was made from.
    lines = (adapter.parent / near[0]["source"]).read_text().split("\n")
    said = near[0]["before"].rpartition("\n")[2] + near[0]["after"].partition("\n")[0]
    assert said in lines[near[0]["line"] - 1]
    page.get_by_role("button", name="Close the explanation").click()
    assert page.locator("#inspector").is_hidden()


def test_the_keyboard_alone_is_enough(tab: Tab) -> None:
    page = tab.page
    page.get_by_label("Most tokens").fill(str(TOKENS))
    page.get_by_label("Prompt").focus()
    page.keyboard.press("Control+Enter")
    tab.wait()
    page.locator('#steered-text [role=option][tabindex="0"]').focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    place = page.locator("#steered-text [role=option]").count() - 2
    assert page.evaluate("document.activeElement.dataset.place") == str(place)
    page.keyboard.press("Enter")
    assert page.locator("#inspector").is_visible()
    assert page.locator("#steered-text [aria-selected=true]").count() == 1
    assert "nats" in page.get_by_role("status").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#inspector").is_hidden()
    assert page.evaluate("document.activeElement.dataset.place") == str(place)
    # One stop for the Tab key in each text.
    assert page.locator('.text [tabindex="0"]').count() == 2


def test_a_link_holds_the_state_and_no_key(browser: Any, tab: Tab, server: Running) -> None:
    page = tab.page
    page.get_by_text("API key").first.click()
    page.get_by_label("API key").fill("sk-secret")
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Seed").fill("5")
    page.get_by_role("checkbox", name="memory").uncheck()
    page.get_by_role("checkbox", name="ship").check()
    page.get_by_label("Strength of ship").fill("0.3")
    tab.run()
    sampled = tab.text("steered")
    assert tab.bodies()[-1]["model"] == "host+sea:1+ship:0.3"
    state = {name: value[0] for name, value in parse_qs(page.url.partition("#")[2]).items()}
    assert state["prompt"] == PROMPT and state["carriers"] == "head"
    assert "secret" not in page.url
    assert page.evaluate("localStorage.length + sessionStorage.length") == 0
    other = Tab(browser, page.url)
    other.page.get_by_label("Strength of ship").wait_for()
    assert other.page.get_by_label("Prompt").input_value() == PROMPT
    assert other.page.get_by_label("API key", exact=True).input_value() == ""
    assert not other.page.get_by_role("checkbox", name="memory").is_checked()
    # Nothing runs by itself when a link is opened.
    assert other.bodies() == []
    other.run()
    assert other.text("steered") == sampled
    other.context.close()


def test_all_carriers_that_are_served_are_ticked(
    browser: Any, host: HFModel, adapter: Path
) -> None:
    config = served(f"sea={adapter}", carriers=("head", "memory", "expert"))
    with running(config, host=host) as server:
        tab = Tab(browser, server.base_url)
        tab.page.get_by_label("Strength of sea").wait_for()
        tab.page.get_by_label("Prompt").fill(PROMPT)
        tab.run()
        # As a request does that names none.
        assert tab.text("steered") == api(server, "host+sea")["text"]
        tab.page.goto("about:blank")
        tab.page.goto(f"{server.base_url}/#carriers=head")
        tab.page.get_by_label("Strength of sea").wait_for()
        boxes = tab.page.locator("[name=carrier]:checked").all()
        assert [box.get_attribute("value") for box in boxes] == ["head"]
        tab.context.close()


def test_who_types_before_the_server_has_answered_keeps_the_adapters(
    tab: Tab, server: Running
) -> None:
    held: list[Any] = []
    tab.page.route("**/v1/models", lambda route: held.append(route))
    for link, chosen in (("", ["sea"]), ("#adapters=ship%3A0.3", ["ship"])):
        tab.page.goto("about:blank")
        tab.page.goto(f"{server.base_url}/{link}")
        tab.page.get_by_label("Prompt").fill(PROMPT)
        tab.page.get_by_label("Most tokens").fill("3")
        held.pop().continue_()
        for name in ("sea", "ship"):
            box = tab.page.get_by_role("checkbox", name=name)
            box.wait_for()
            assert box.is_checked() == (name in chosen)
        assert tab.page.get_by_label("Prompt").input_value() == PROMPT


def test_what_goes_wrong_is_said_in_plain_words(
    browser: Any, host: HFModel, adapter: Path, tmp_path: Path
) -> None:
    key = add_key(tmp_path / "keys.json", "ann")
    config = served(f"sea={adapter}", keys=tmp_path / "keys.json")
    with running(config, host=host) as locked:
        tab = Tab(browser, locked.base_url)
        page, alert = tab.page, tab.page.get_by_role("alert")
        alert.filter(has_text="asks for an API key").wait_for()
        assert page.evaluate("document.activeElement.id") == "key"
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Tab")
        page.get_by_label("Strength of sea").wait_for()
        assert alert.is_hidden()
        page.get_by_role("button", name="Continue the text").click()
        alert.filter(has_text="Write a prompt first").wait_for()
        page.get_by_label("Prompt").fill(PROMPT)
        page.get_by_label("Most tokens").fill("99999")
        page.keyboard.press("Control+Enter")
        alert.filter(has_text="from 1 to 2048").wait_for()
        page.get_by_label("Prompt").fill(PROMPT)
        tab.run(tokens=3)
        # A server with keys does not tell its adapters' text unless it is told to.
        page.locator("#steered-text [role=option]").first.click()
        assert page.locator("#inspector").is_visible()
        assert page.locator("#neighbours-box").is_hidden()
    page.get_by_role("button", name="Continue the text").click()
    alert.filter(has_text="cannot be reached").wait_for()
    tab.context.close()


def test_narrow_screens_and_the_dark_theme(browser: Any, server: Running) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 700}, color_scheme="dark")
    page = context.new_page()
    page.goto(server.base_url)
    page.get_by_label("Strength of sea").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", ground)[:3])) < 60
    context.close()


def test_the_page_forbids_what_it_does_not_need(server: Running) -> None:
    for path in ("/", "/page/playground.css", "/page/playground.js"):
        found = httpx2.get(f"{server.base_url}{path}")
        assert found.status_code == 200
        policy = found.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
    assert httpx2.get(f"{server.base_url}/page/other.js").status_code == 404
    assert httpx2.get(f"{server.base_url}/page/..%2fapp.py").status_code == 404
