"""The one exception for what a user can mend, and the search for what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    r"""A mistake that the user can mend: one line with what was expected, what came, and the likely cause.

    The command line prints the line and exits with status 2; a traceback is never shown for it.

    Example:
        >>> str(UserError("eps of Linf must be in [0, 1]; got 8. Did you mean 8/255?"))
        'eps of Linf must be in [0, 1]; got 8. Did you mean 8/255?'

    Messages quote names from files. Line breaks and control characters in them, which would forge lines or move the
    cursor of a terminal, are shown as what they are:

        >>> str(UserError("no weights at a\x1b[2Jb\nc"))
        'no weights at a\\x1b[2Jb\\nc'
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    r"""Text on one line: whatever a terminal does not print is written as its escape.

    Example:
        >>> printable("κ = 3\tand\r\n")
        'κ = 3\\tand\\r\\n'
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in text)


LONGEST = 300
"""Characters of a foreign message that fit into a line or two of a screen."""


def first_line(error: BaseException) -> str:
    r"""What somebody else's exception says, in a line; its name where it says nothing.

    Example:
        >>> first_line(ValueError("no such thing\nbecause of that")), first_line(KeyError())
        ('no such thing', 'KeyError')
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(error: BaseException) -> str:
    r"""All that somebody else's exception says, on one line of at most `LONGEST` characters; its name if it is silent.

    Example:
        >>> one_line(ValueError("no such thing\n  because of that"))
        'no such thing because of that'
    """
    return " ".join(str(error).split())[:LONGEST] or type(error).__name__


def unknown(kind: str, name: object, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest names that do.

    Args:
        kind: What the name should have been, for example ``"recipe"``.
        name: The name as given.
        known: Every name that exists.

    Returns:
        The error, to be raised by the caller.

    Example:
        >>> str(unknown("recipe", "gairt", ["gairat", "trades", "pgd_at"]))
        "unknown recipe 'gairt'. Did you mean 'gairat' or 'pgd_at'? Known: gairat, pgd_at, trades"
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return UserError(f"unknown {kind} {str(name)!r}.{hint} Known: {', '.join(names) or 'none'}")
