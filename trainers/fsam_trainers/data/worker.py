"""The program of a tokenizing process, started by `workers`.

First it is sent the tokenizer's content, then rows again and again, each list answered by its `joined` tokens, or by
the message of what was raised.
"""

from collections.abc import Callable

from fsam_core.errors import one_line
from fsam_trainers.data.encoding import encode_rows, joined
from fsam_trainers.data.vocabulary import load_tokenizer
from fsam_trainers.data.worker_process import serve


def _tokenizing(content: bytes) -> Callable[[list], object]:
    tokenizer = load_tokenizer(content, None, 1 << 31)

    def answer_of(rows: list) -> object:
        try:
            return joined(encode_rows(tokenizer, rows))
        except Exception as error:  # the tokenizers library raises bare Exceptions
            return one_line(error)

    return answer_of


if __name__ == "__main__":
    serve(_tokenizing)
