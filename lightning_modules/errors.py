"""The one exception for mistakes of the user."""


class InputError(ValueError):
    """A mistake in what the user gave: a file, an option, an image, a folder.

    The message is one line: the rule, what was found instead, and the remedy. The command prints
    it to stderr and exits with code 2, without a traceback.
    """
