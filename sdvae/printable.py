"""A stranger's text, as a terminal may show it."""


def printable(text: str, most: int | None = None) -> str:
    """The text with every character that could move a cursor or hide spelled out, cut after `most` characters."""
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[:most])
    return shown if most is None or len(text) <= most else f"{shown}... ({len(text):,} characters)"
