"""The program of a decoding process, started by `sources.Decoders`.

First it is sent the `Form` of the set, then lists of files or their contents, each answered by a `Decoded`.
"""

from fsam_trainers.data.images.decoding import decode
from fsam_trainers.data.worker_process import serve

if __name__ == "__main__":
    serve(lambda form: lambda items: decode(items, form))
