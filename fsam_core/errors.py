"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class UserError(ValueError):
    """Bad input, said in one sentence: which argument, what it got, what would work.

    The `fsam` command prints the sentence alone and exits with code 2; a library user sees a `ValueError`.
    """
