"""Figures in words: numbers for people, and what a report says in a paragraph. Pure."""

from trimtab.report.values import (
    CONTROLS,
    Figures,
    HostResult,
    differences,
    worse_rows,
)

ROW_WORDS = {
    "host": "the large model alone",
    "reference": "the small model alone, before tuning",
    "expert": "the small model alone, after tuning",
    "proxy": "proxy tuning: host + expert − reference",
    "proxy-0.5": "proxy tuning at half weight",
    "mixture": "host and expert, half each",
    "temperature": "the host, made more or less sure",
    "bias": "a fixed shift of word frequencies",
    "bytes": "the memory, found by bytes alone",
    "state": "the memory, found by state alone",
    "head": "the adapter’s low-rank layer",
    "memory": "the adapter’s nearest neighbours",
    "head+memory": "both, no small model needed",
    "head-shuffled": "the head through a wrong map",
    "memory-shuffled": "state, through a wrong map",
    "live": "host, expert and reference blended",
    "live+head": "live, with the head",
    "live+memory": "live, with the memory",
    "all": "live, with head and memory",
}
"""What each row is, in a few words."""

_ALONE = ("head+memory", "memory", "head")
_BESIDE = ("all", "live+memory", "live+head", "live")


ROUNDING = 1e-9
"""Errors that are smaller, as a share of the figure, are none."""


def signed(value: float, decimals: int) -> str:
    """Write a number with its sign; what rounds to zero has none."""
    text = f"{value:+.{decimals}f}".replace("-", "−")
    return text[1:] if float(f"{value:.{decimals}f}") == 0 else text


def change_percent(figures: Figures, paired: Figures, row: str) -> str:
    """Write a row's change against the host, as "−5.5 %"; "" for the host itself.

    The standard error follows ("−5.5 ± 0.4 %") where the difference was measured pairwise.
    """
    found = differences(figures, paired).get(row)
    if found is None or figures["host"].mean <= 0:
        return ""
    scale = 100 / figures["host"].mean
    error = f" ± {found.stderr * scale:.1f}" if row in paired else ""
    return f"{signed(found.mean * scale, 1)}{error} %"


def data_size(count: float) -> str:
    """Write a number of bytes with three digits: "812 B", "1.25 MB"; units of 1000."""
    if count < 1000:
        return f"{count:.0f} B"
    power = 3 if count >= 999.5e6 else 2 if count >= 999.5e3 else 1
    scaled = count / 1000**power
    decimals = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:.{decimals}f} {('kB', 'MB', 'GB')[power - 1]}"


def duration(seconds: float) -> str:
    """Write a duration: "0.4 s", "58 s", "2 min 05 s", "3 h 12 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def visible(text: str) -> str:
    """Show spaces, tabs and line breaks of a token as signs."""
    return text.translate({32: "␣", 9: "⇥", 10: "↵", 13: "␍"})


def printable(text: str) -> str:
    """Replace what neither HTML nor a terminal can show by signs; keep line breaks and tabs.

    Control characters become their pictures, half surrogates the replacement character.
    """
    whole = text.encode(errors="surrogatepass").decode(errors="replace")
    controls = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
    return whole.translate(controls | {127: 0x2421} | dict.fromkeys(range(128, 160), "\ufffd"))


def summary(result: HostResult, domain: str) -> str:
    """Say in sentences what the adapter did to a host on domain text."""
    return f"{_main_sentence(result, domain)} {_beside_sentence(result)}".strip()


def comparison(result: HostResult) -> str:
    """Say how that compares: other methods, general text, controls; "" if none was measured."""
    parts = (_others_sentence(result), _general_sentence(result), _controls_sentence(result))
    return " ".join(part for part in parts if part)


def headlines(result: HostResult, domain: str) -> list[tuple[str, str]]:
    """Choose up to four changes to show large, each with what it is."""
    alone, beside = _first(result, _ALONE), _first(result, _BESIDE)
    on_general = f"{alone} on general text, which should stay as it was"
    chosen = (
        (_plain(result.domain, alone), f"{alone} on {domain} text: no second model"),
        (_plain(result.domain, beside), f"{beside} on {domain} text: small model beside the host"),
        (_plain(result.domain, "proxy"), f"proxy tuning on {domain} text, for comparison"),
        (_plain(result.general, alone), on_general),
    )
    return [(change, words) for change, words in chosen if change]


def warnings(result: HostResult, domain: str) -> list[str]:
    """Say what makes figures doubtful, and which steered rows are worse than the host."""
    texts = (
        (f"{domain} text", result.domain, result.domain_change),
        ("general text", result.general, result.general_change),
    )
    return [*without_errors(result, domain)] + [
        f"Worse than {result.host} alone on {text} by more than one standard error: "
        + ", ".join(f"{row} ({change_percent(figures, paired, row)})" for row in rows)
        + "."
        for text, figures, paired in texts
        if (rows := worse_rows(figures, paired))
    ]


def without_errors(result: HostResult, domain: str) -> list[str]:
    """Say so where errors of 0 say nothing: one document, resampled, is always itself."""
    texts = {f"{domain} text": result.domain}
    texts |= {f"general text ({kind})": found for kind, found in result.general_kinds.items()}
    return [
        one_document(name)
        for name, figures in texts.items()
        # Resampling sums in another order, so that rounding may be left.
        if (host := figures.get("host")) and host.stderr < ROUNDING * host.mean
    ]


def one_document(text: str) -> str:
    """Say what errors are worth where one document of a text was scored."""
    return f"Of {text} one document alone was scored: an error of 0 means that none can be told."


def _first(result: HostResult, rows: tuple[str, ...]) -> str:
    return next((row for row in rows if row in result.domain), "")


def _main_sentence(result: HostResult, domain: str) -> str:
    row, host = _first(result, _ALONE), result.domain.get("host")
    if not row or host is None:
        return f"{result.small} is the small model, {result.host} the host."
    after = result.domain[row]
    verb = "lowers" if after.mean < host.mean else "raises" if after.mean > host.mean else "keeps"
    return (
        f"The adapter, made with {result.small}, {verb} what held-out {domain} text costs "
        f"{result.host}: from {host.mean:.3f} to {after.mean:.3f} bits per byte "
        f"({_change(result, row)}), with no training of the host and no second model beside it "
        f"({row})."
    )


def _beside_sentence(result: HostResult) -> str:
    row = _first(result, _BESIDE)
    if not row or not _change(result, row):
        return ""
    return (
        f"With the tuned small model running beside the host it is "
        f"{result.domain[row].mean:.3f} ({_change(result, row)}; {row})."
    )


def _others_sentence(result: HostResult) -> str:
    named = {"proxy": "proxy tuning", "expert": "the tuned small model alone, without the host,"}
    parts = [
        f"{words} {change}" for row, words in named.items() if (change := _change(result, row))
    ]
    return f"For comparison: {' and '.join(parts)}." if parts else ""


def _general_sentence(result: HostResult) -> str:
    rows = (_first(result, _ALONE), _first(result, _BESIDE), "proxy", "expert")
    parts = [f"{row} {change}" for row in rows if (change := _plain(result.general, row))]
    return f"On general text, which should stay as it was: {', '.join(parts)}." if parts else ""


def _controls_sentence(result: HostResult) -> str:
    parts = [f"{row} {change}" for row in CONTROLS if (change := _plain(result.domain, row))]
    return f"Controls, which need no adapter or no map: {', '.join(parts)}." if parts else ""


def _change(result: HostResult, row: str) -> str:
    return change_percent(result.domain, result.domain_change, row)


def _plain(figures: Figures, row: str) -> str:
    return change_percent(figures, {}, row)
