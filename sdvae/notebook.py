"""Objects as a notebook shows them: a title, and a row for each thing that is told of them."""

from collections.abc import Mapping
from html import escape


def card(title: str, rows: Mapping[str, object]) -> str:
    """A small HTML table; every text in it is escaped."""
    told = "".join(
        f'<tr><td style="text-align: left">{escape(name)}</td>'
        f'<td style="text-align: left">{escape(str(value))}</td></tr>'
        for name, value in rows.items()
    )
    return f"<strong>{escape(title)}</strong><table>{told}</table>"
