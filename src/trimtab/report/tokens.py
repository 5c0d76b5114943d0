"""The part of the page that shows, token by token, where an adapter changed a host's mind."""

from bisect import bisect_right
from collections.abc import Sequence
from html import escape

from trimtab.report.html import text_html
from trimtab.report.values import TokenChange
from trimtab.report.words import printable, visible

_EDGES_NATS = (0.1, 0.5, 1.0, 2.0, 4.0)
_MOST = 6


def tokens_section(tokens: Sequence[TokenChange], name: str, row: str) -> str:
    """Render a held-out file, each token coloured by the nats that steering saved or cost.

    Blue with strength for saved, orange with a dotted underline for cost: told apart also without
    colour vision. Empty without tokens.
    """
    if not tokens:
        return ""
    spans = "".join(_span(token) for token in tokens)
    return (
        "<section><h2>Where the adapter changed the host’s mind</h2>"
        f"<p>{_totals(tokens, name, row)}</p>{_scale()}"
        '<pre class="tokens" tabindex="0" role="region" aria-label="The file, token by token">'
        f'{spans}</pre><div class="inspector">Point at a token, or tap it, to see what it cost '
        "before and after, and what the host would have written.</div>"
        f"{_largest(tokens)}</section>"
    )


def level(saved_nats: float) -> int:
    """Strength of a token's colour: 0 below 0.1 nats, then 1 to 5, negative for a cost."""
    strength = bisect_right(_EDGES_NATS, abs(saved_nats))
    return strength if saved_nats > 0 else -strength


def _saved(token: TokenChange) -> float:
    return token.nats_host - token.nats_steered


def _class(strength: int) -> str:
    return f"{'h' if strength > 0 else 'w'}{abs(strength)}" if strength else ""


def _quoted(text: str) -> str:
    return printable(f"“{visible(text)}”")


def _span(token: TokenChange) -> str:
    names = [_class(level(_saved(token))), "nl" if "\n" in token.text else ""]
    words = escape(_words(token)).replace("\n", "&#10;")
    name = " ".join(filter(None, names))
    marked = f' class="{name}"' if name else ""
    return f'<span{marked} title="{words}">{text_html(token.text)}</span>'


def _words(token: TokenChange) -> str:
    saved = _saved(token)
    verdict = "no change"
    if abs(saved) >= 0.005:
        verdict = f"{'saved' if saved > 0 else 'cost'} {abs(saved):.2f}"
    return (
        f"{_quoted(token.text)}: {token.nats_host:.2f} → {token.nats_steered:.2f} nats, {verdict}\n"
        f"most likely before {_quoted(token.host_top)}, with the adapter "
        f"{_quoted(token.steered_top)}"
    )


def _totals(tokens: Sequence[TokenChange], name: str, row: str) -> str:
    count = len(tokens)
    saved = sum(_saved(token) for token in tokens)
    cheaper = sum(level(_saved(token)) > 0 for token in tokens) / count
    dearer = sum(level(_saved(token)) < 0 for token in tokens) / count
    changed = sum(token.host_top != token.steered_top for token in tokens) / count
    named = f" of <code>{text_html(name)}</code>" if name else ""
    verb = "saves" if saved >= 0 else "costs"
    by = f" ({text_html(row)})" if row else ""
    return (
        f"Over {count:,} tokens{named}, the first held-out file, the adapter{by} {verb} "
        f"{abs(saved):.1f} nats (1 nat is 1.44 bits), {abs(saved) / count:.3f} a token. "
        f"{cheaper:.0%} of the tokens became cheaper and {dearer:.0%} dearer by {_EDGES_NATS[0]} "
        f"nats or more; the most likely token is another "
        f"one at {changed:.0%}."
    )


def _scale() -> str:
    edges = [f"{edge:g}" for edge in _EDGES_NATS]
    steps = [(-number, edges[number - 1]) for number in range(len(edges), 0, -1)]
    steps += [(0, "0"), *((number, edges[number - 1]) for number in range(1, len(edges) + 1))]
    items = "".join(
        f"<li{f' class={_class(strength)}' if strength else ''}>{words}</li>"
        for strength, words in steps
    )
    return (
        f'<div class="scale"><span>worse by at least</span><ol aria-label="Colour scale, nats">'
        f"{items}</ol><span>nats better</span></div>"
    )


def _largest(tokens: Sequence[TokenChange]) -> str:
    places = sorted(range(len(tokens)), key=lambda place: _saved(tokens[place]))
    worst = [place for place in places[:_MOST] if level(_saved(tokens[place])) < 0]
    best = [place for place in places[::-1][:_MOST] if level(_saved(tokens[place])) > 0]
    parts = (("Helped most", best), ("Hurt most", worst))
    tables = "".join(_changes(tokens, words, chosen) for words, chosen in parts if chosen)
    return f'<div class="pair">{tables}</div>' if tables else ""


def _changes(tokens: Sequence[TokenChange], words: str, places: Sequence[int]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in ("token", "before", "after"))
    body = "".join(_change_row(tokens, place) for place in places)
    return (
        f'<div><h3>{words}</h3><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{words}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div></div>"
    )


def _change_row(tokens: Sequence[TokenChange], place: int) -> str:
    token = tokens[place]
    before = "".join(earlier.text for earlier in tokens[max(0, place - 6) : place])[-16:]
    context = f"<small>{text_html(visible(before))}</small>" if before else ""
    return (
        f'<tr><td class="wrap">{context}{_code(token.text)}</td>'
        f"<td>{token.nats_host:.2f} <small>{_code(token.host_top)}</small></td>"
        f"<td>{token.nats_steered:.2f} <small>{_code(token.steered_top)}</small></td></tr>"
    )


def _code(text: str) -> str:
    return f"<code>{text_html(visible(text))}</code>"
