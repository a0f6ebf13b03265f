"""The program of a decoding process, started by `sources.Decoders`.

First it is sent the `Form` of the set, then lists of files or their contents, each answered by a `Decoded`.
"""

import sys
from multiprocessing.connection import Connection

from fsam_trainers.data.images.decoding import decode
from fsam_trainers.data.worker_process import ignore_signals, serve


def main() -> None:
    ignore_signals()
    with Connection(int(sys.argv[1])) as pipe:
        try:
            form = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        serve(pipe, lambda items: decode(items, form))


if __name__ == "__main__":
    main()
