"""What each document cost, as a picture for notebooks: documents as bars, their chunks shaded by ratio."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_HEAD = ("document", "ratio (dark: all of it)", "tokens", "share", "rank")


@dataclass(frozen=True, slots=True, repr=False)
class BudgetTable:
    """Accounts of documents as a table with a bar for each; shown as HTML in notebooks.

    Args:
        accounts: a name and an account (`CompressedDocument.account`) for each document.
        details: shown after the sums.

    Example:
        >>> account = {"tokens_before": 80, "tokens_after": 10, "share": 1.0, "rank": 1, "chunks": []}
        >>> BudgetTable([("page", account)])
        80 tokens -> 10 (8.0x)
          page: 80 -> 10
    """

    accounts: Sequence[tuple[str, Mapping[str, Any]]]
    details: str = ""

    def __repr__(self) -> str:
        rows = [
            f"  {name}: {account['tokens_before']:,} -> {account['tokens_after']:,}"
            for name, account in self.accounts
        ]
        return "\n".join([self._sums().replace("&rarr;", "->") + self.details, *rows])

    def _repr_html_(self) -> str:
        longest = max((account["tokens_before"] for _, account in self.accounts), default=1) or 1
        rows = "".join(_row(name, account, longest) for name, account in self.accounts)
        head = "".join(f"<th>{name}</th>" for name in _HEAD)
        caption = f"<caption>{self._sums()}{html.escape(self.details)}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"

    def _sums(self) -> str:
        before, after = (
            sum(account[name] for _, account in self.accounts) for name in ("tokens_before", "tokens_after")
        )
        ratio = f"{before / after:.1f}x" if after else "nothing left"
        return f"{before:,} tokens &rarr; {after:,} ({ratio})"


def _row(name: str, account: Mapping[str, Any], longest: int) -> str:
    share = "" if account["share"] is None else f"{account['share']:.1%}"
    rank = "" if account["rank"] is None else str(account["rank"])
    tokens = f"{account['tokens_before']:,} &rarr; {account['tokens_after']:,}"
    cells = (html.escape(name), _bar(account, longest), tokens, share, rank)
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _bar(account: Mapping[str, Any], longest: int) -> str:
    """The document as a bar, as long as its original, each chunk the darker the more of it is left."""
    pieces = "".join(
        f'<div title="{piece["tokens_before"]:,} &rarr; {piece["tokens_after"]:,} tokens" '
        f'style="height:12px;border:1px solid #888;width:{240 * piece["tokens_before"] / longest:.1f}px;'
        f'background:{_shade(piece["tokens_before"], piece["tokens_after"])}"></div>'
        for piece in account["chunks"] or [account]
    )
    return f'<div style="display:flex">{pieces}</div>'


def _shade(before: int, after: int) -> str:
    if not after:
        return "repeating-linear-gradient(45deg,#fff,#fff 3px,#ccc 3px,#ccc 5px)"
    return f"hsl(210 70% {min(28 + 12 * math.log2(before / after), 92):.0f}%)"
