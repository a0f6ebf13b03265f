"""The exception for wrong input, as opposed to an error in the program."""


class UserError(ValueError):
    """Wrong input, in one sentence: the argument, the value it got, and a value that would work.

    The `fsam` command prints only the sentence and exits with code 2; a library user sees a `ValueError`.
    """


def one_line(error: BaseException) -> str:
    """An exception's message in one line of bounded length, for use inside another message."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
