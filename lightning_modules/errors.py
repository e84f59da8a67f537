"""The one exception for mistakes of the user, and text that is safe to show."""


class InputError(ValueError):
    """A mistake in what the user gave: a file, an option, an image, a folder.

    The message is one line: the rule, what was found instead, and the remedy. The command prints
    it to stderr and exits with code 2, without a traceback.
    """


def said_by(error: BaseException) -> str:
    """Return in one line what the first of several errors said, each raised from the one before."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


def printable(text: str) -> str:
    r"""Return text as one line without anything that would steer a terminal, or is not UTF-8.

    Example:
        >>> printable("a\n\x1b[31mb")
        'a ?[31mb'
    """
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
