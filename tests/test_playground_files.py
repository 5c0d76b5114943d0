"""The playground's files by themselves: nothing from elsewhere, labels, contrast in both themes."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import trimtab

PAGE = Path(trimtab.__file__).parent / "serving" / "page"
HTML = (PAGE / "index.html").read_text(encoding="utf-8")
CSS = (PAGE / "playground.css").read_text(encoding="utf-8")
SCRIPT = (PAGE / "playground.js").read_text(encoding="utf-8")
AA_TEXT, AA_GRAPHICS = 4.5, 3.0


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.in_label: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.found.append((tag, given))
        if tag == "label":
            self.open.append(tag)
        elif self.open:
            self.in_label.append(given)

    def handle_endtag(self, tag: str) -> None:
        if tag == "label":
            self.open.pop()


@pytest.fixture(scope="module")
def elements() -> Elements:
    parser = Elements()
    parser.feed(HTML)
    return parser


def test_it_is_three_files_that_load_nothing_from_elsewhere(elements: Elements) -> None:
    assert {path.name for path in PAGE.iterdir()} == {
        "index.html",
        "playground.css",
        "playground.js",
    }
    loaded = [a.get("src") or a.get("href") for t, a in elements.found if t in ("script", "link")]
    assert [one for one in loaded if one and not one.startswith("data:")] == [
        "page/playground.css",
        "page/playground.js",
    ]
    for text in (HTML.replace("http://www.w3.org/2000/svg", ""), CSS, SCRIPT):
        assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text)


def test_texts_of_the_server_are_never_html_and_nothing_is_stored() -> None:
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("):
        assert word not in SCRIPT
    for word in ("localStorage", "sessionStorage", "indexedDB", "cookie"):
        assert word not in SCRIPT
    # The server's policy allows no script and no style inside the page.
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", HTML)


def test_ids_are_unique_and_everything_referred_to_is_there(elements: Elements) -> None:
    ids = [given["id"] for _, given in elements.found if "id" in given]
    assert len(ids) == len(set(ids))
    for _, given in elements.found:
        for name in ("for", "aria-labelledby", "aria-describedby"):
            assert set((given.get(name) or "").split()) <= set(ids)
    used = set(re.findall(r'byId\("([\w-]+)"\)', SCRIPT))
    assert used <= set(ids)


def test_every_field_has_a_label(elements: Elements) -> None:
    labelled = {given["for"] for tag, given in elements.found if tag == "label" and "for" in given}
    fields = [given for tag, given in elements.found if tag in ("input", "textarea", "select")]
    assert len(fields) >= 8
    for given in fields:
        assert given.get("id") in labelled or given in elements.in_label


def colours(theme: str) -> dict[str, tuple[float, float, float]]:
    """The style sheet's variables in one theme."""
    blocks = re.findall(r":root \{(.*?)\}", CSS, re.S)
    light = dict(re.findall(r"--([\w-]+): ([^;]+);", blocks[0]))
    values = light | (
        dict(re.findall(r"--([\w-]+): ([^;]+);", blocks[1])) if theme == "dark" else {}
    )
    found = {}
    for name, value in values.items():
        if re.fullmatch(r"#[0-9a-f]{6}", value):
            found[name] = tuple(int(value[i : i + 2], 16) / 255 for i in (1, 3, 5))
        elif re.fullmatch(r"\d+ \d+ \d+", value):
            found[name] = tuple(int(part) / 255 for part in value.split())
    return found


def luminance(colour: tuple[float, ...]) -> float:
    """WCAG 2.2, relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def over(top: tuple[float, ...], below: tuple[float, ...], alpha: float) -> tuple[float, ...]:
    return tuple(alpha * a + (1 - alpha) * b for a, b in zip(top, below, strict=True))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast_is_at_least_aa(theme: str) -> None:
    by = colours(theme)
    assert {"page", "card", "ink", "muted", "field", "accent", "on-accent", "warn"} <= set(by)
    for text, ground in [
        *((text, ground) for text in ("ink", "muted") for ground in ("page", "card", "soft")),
        ("accent", "page"),
        ("accent", "card"),
        ("on-accent", "accent"),
        ("warn", "warn-page"),
        *((f"{name}-ink", "card") for name in ("host", "head", "memory", "expert")),
    ]:
        assert contrast(by[text], by[ground]) >= AA_TEXT, (text, ground)
    assert contrast(by["field"], by["card"]) >= AA_GRAPHICS
    strongest = max(map(float, re.findall(r"calc\(var\(--a\) \* (\.\d+)\)", CSS)))
    for name in ("host", "head", "memory", "expert"):
        tinted = over(by[name], by["card"], strongest)
        assert contrast(by["ink"], tinted) >= AA_TEXT, name


def test_the_contrast_formula_is_wcags() -> None:
    assert contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21)
    grey = (0x76 / 255,) * 3
    assert contrast(grey, (1, 1, 1)) == pytest.approx(4.54, abs=0.01)
