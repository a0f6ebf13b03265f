"""The program of a tokenizing process, started by `workers`.

First it is sent the tokenizer's content, then rows again and again, each list answered by its `joined` tokens, or by
the message of what was raised.
"""

import sys
from multiprocessing.connection import Connection

from fsam_trainers.data.documents import one_line
from fsam_trainers.data.encoding import encode_rows, joined
from fsam_trainers.data.vocabulary import load_tokenizer
from fsam_trainers.data.worker_process import ignore_signals, serve


def main() -> None:
    ignore_signals()
    with Connection(int(sys.argv[1])) as pipe:
        try:
            tokenizer = load_tokenizer(pipe.recv(), None, 1 << 31)
        except (EOFError, ConnectionResetError):
            return

        def answer_of(rows: object) -> object:
            try:
                return joined(encode_rows(tokenizer, rows))  # type: ignore[arg-type]
            except Exception as error:  # the tokenizers library raises bare Exceptions
                return one_line(error)

        serve(pipe, answer_of)


if __name__ == "__main__":
    main()
