"""The exception for wrong input, as opposed to an error in the program."""


class UserError(ValueError):
    """Wrong input, in one sentence: the argument, the value it got, and a value that would work.

    The `fsam` command prints only the sentence and exits with code 2; a library user sees a `ValueError`.
    """
