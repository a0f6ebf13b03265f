"""The program of a tokenizing process: `python -m fsam_trainers.data.worker FD`, started by `workers`.

FD is its end of a pipe. First comes the tokenizer's content, then rows again and again, each list answered by its
`joined` tokens, or by the message of what was raised.
"""

import signal
import sys
from multiprocessing.connection import Connection

from fsam_trainers.data.documents import one_line
from fsam_trainers.data.encoding import encode_rows, joined
from fsam_trainers.data.vocabulary import load_tokenizer


def main() -> None:
    # A run that receives a signal finishes its step and saves; its workers end with their pipe.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with Connection(int(sys.argv[1])) as pipe:
        try:
            tokenizer = load_tokenizer(pipe.recv_bytes(), None, 1 << 31)
            while True:
                rows = pipe.recv()
                try:
                    answer: object = joined(encode_rows(tokenizer, rows))
                except Exception as error:  # the tokenizers library raises bare Exceptions
                    answer = one_line(error)
                pipe.send(answer)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # the run has ended


if __name__ == "__main__":
    main()
