"""What comes from messages, for a terminal: it can neither steer the terminal nor pass for something else."""

from __future__ import annotations

from rich.cells import cell_len, set_cell_size


def printable(content: str | bytes) -> str:
    r"""Text on one line; bytes that are not UTF-8 stand as `\xff`, what cannot be seen as `\n`, `\x1b`, `\u202e`."""
    text = content.decode(errors="backslashreplace") if isinstance(content, bytes) else content
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def cut(text: str, width: int) -> str:
    """Printable text in at most so many columns of a terminal, with "…" where something is left out."""
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"


def pad(text: str, width: int, *, right: bool = False) -> str:
    """Printable text filled up to so many columns, with blanks after it or, to stand at the right, before it."""
    blanks = " " * (width - cell_len(text))
    return blanks + text if right else text + blanks
