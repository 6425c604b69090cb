"""Text that somebody else wrote, before it is shown to people.

A node chooses its version and its error texts, an app its metrics' names, a model its
exceptions. Whoever shows such a text (a log, `umbel status`, a terminal, the report) passes it
through `plain`: escape sequences, line ends that fake a line of the log, marks that turn the
direction of writing and a megabyte of words end there.
"""

import unicodedata

LONGEST = 2000
"""Characters that a text of a peer may take where it is shown."""
_HIDDEN = frozenset(("Cc", "Cf", "Co", "Cs", "Zl", "Zp"))


def plain(text: object, longest: int = LONGEST) -> str:
    """One line of visible characters, cut at `longest`.

    Runs of white space become one space. What is not visible (control characters, marks of
    direction, half characters) becomes its escape sequence in Python's form, so that nothing
    is lost that could be evidence.

    >>> plain("a\\nb\\x1b[31m")
    'a b\\\\x1b[31m'
    """
    words = str(text)[: 4 * longest]
    if not words.isascii() or not words.isprintable():
        words = " ".join(words.split())
        words = "".join(map(_visible, words))
    return words if len(words) <= longest else words[: longest - 1] + "\u2026"


def _visible(letter: str) -> str:
    if unicodedata.category(letter) not in _HIDDEN:
        return letter
    return letter.encode("unicode_escape", "surrogatepass").decode()
