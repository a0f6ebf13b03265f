import errno
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from data_helpers import prose

from fsam_core.errors import UserError
from fsam_trainers.data import cache as store
from fsam_trainers.data import prepare

DAY = 86400


@pytest.fixture
def data(tmp_path: Path) -> str:
    (tmp_path / "a.txt").write_text(prose(5000))
    return str(tmp_path / "a.txt")


def build(data: str, **more):
    return prepare(data, vocab_size=300, seq_len=8, **more)


def test_the_cache_folder_is_argument_variable_or_the_users(data, tmp_path, cache, monkeypatch):
    assert build(data, cache=tmp_path / "mine").folder.parent == tmp_path / "mine"
    assert build(data).folder.parent == cache
    monkeypatch.setenv("FSAM_CACHE", "")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "user" / name))
    assert build(data).folder.parent == tmp_path / "user" / "fsam"


def test_an_entry_holds_four_files_and_its_tokens_are_mapped(data):
    corpus = build(data)
    assert sorted(path.name for path in corpus.folder.iterdir()) == [
        "meta.json",
        "tokenizer.json",
        "train.bin",
        "validation.bin",
    ]
    assert isinstance(corpus.train, np.memmap)
    assert json.loads((corpus.folder / "meta.json").read_text())["train_tokens"] == corpus.train.size


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(key: str, value: object):
    def change(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return change


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train.bin", truncate),
        ("train.bin", flip),
        ("train.bin", Path.unlink),
        ("validation.bin", truncate),
        ("validation.bin", flip),
        ("meta.json", lambda path: path.write_text('{"dtype"')),
        ("meta.json", lambda path: path.write_text("[]")),
        ("meta.json", lambda path: path.write_text("{}")),
        ("meta.json", lambda path: path.write_bytes(b"\xff")),
        ("meta.json", Path.unlink),
        ("meta.json", edit("dtype", "float32")),
        ("meta.json", edit("vocab_size", 301)),
        ("meta.json", edit("train_blake2b", "0")),
        ("tokenizer.json", truncate),
        ("tokenizer.json", Path.unlink),
    ],
)
def test_a_damaged_entry_says_what_to_delete(data, name, damage):
    folder = build(data).folder
    damage(folder / name)
    with pytest.raises(UserError) as error:
        build(data)
    for part in ("--cache", f"{folder / name} is damaged", f"delete the folder {folder} "):
        assert part in str(error.value)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert build(data).folder == folder


STALLED = """if True:
    import sys, time
    from fsam_trainers.data import cache, prepare

    def stall(*_):
        print("stalled", flush=True)
        time.sleep(120)

    setattr(cache, sys.argv[2], stall)
    prepare(sys.argv[1], vocab_size=300, seq_len=8)
    """


@pytest.mark.parametrize("place", ["write_meta", "sync"])  # before meta.json is written, and just before the renaming
def test_a_killed_build_leaves_no_entry_and_is_swept_after_a_day(data, tmp_path, cache, child, place):
    process = child(STALLED, data, place)
    assert process.stdout.readline() == "stalled\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    (left,) = cache.iterdir()
    assert (left / "train.bin").stat().st_size > 0
    corpus = build(data)
    assert corpus.fingerprint == build(data, cache=tmp_path / "other").fingerprint
    assert sorted(cache.iterdir()) == sorted([left, corpus.folder])  # it might still be another process's
    for path in [*left.iterdir(), left]:
        os.utime(path, (time.time() - 2 * DAY,) * 2)
    os.utime(left / "train.bin")  # a build of days that still writes
    prepare(data, vocab_size=301, seq_len=8)
    assert left.exists()
    os.utime(left / "train.bin", (time.time() - 2 * DAY,) * 2)
    prepare(data, vocab_size=302, seq_len=8)
    assert not left.exists()


MEET = """if True:
    import pathlib, sys, time
    from fsam_trainers.data import cache, prepare
    data, mine, other = sys.argv[1], *map(pathlib.Path, sys.argv[2:])
    write = cache.write_meta
    def wait_for_the_other(*arguments):
        mine.touch()
        end = time.monotonic() + 60
        while not other.exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        write(*arguments)
    cache.write_meta = wait_for_the_other
    corpus = prepare(data, vocab_size=300, seq_len=8)
    print(corpus.fingerprint, corpus.folder, int(corpus.train.astype(int).sum()))
"""


def test_two_builds_at_once_both_end_with_the_one_entry(data, cache, child, tmp_path):
    marks = [tmp_path / "first", tmp_path / "second"]
    workers = [child(MEET, data, *pair) for pair in (marks, marks[::-1])]
    found = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], found
    assert found[0][0] == found[1][0]
    assert [path.name for path in cache.iterdir()] == [Path(found[0][0].split()[1]).name]


def test_a_full_disk_is_a_user_error_and_leaves_nothing(data, cache, child):
    code = """if True:
        import resource, sys
        from fsam_core.errors import UserError
        from fsam_trainers.data import prepare
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            prepare(sys.argv[1], vocab_size=300, seq_len=8)
        except UserError as error:
            print(error)
        """
    out, err = child(code, data).communicate(timeout=60)
    assert out.startswith(f"--cache: cannot write in {cache}: no space left"), (out, err)
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("a mistake"), RuntimeError),
    ],
)
def test_nothing_stays_whatever_ends_a_build(data, cache, monkeypatch, raised, seen):
    def fail(*_):
        raise raised

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_meta", fail)
        with pytest.raises(seen) as error:
            build(data)
    if seen is UserError:
        assert str(error.value).startswith(f"--cache: cannot write in {cache}: no space left")
    assert not list(cache.iterdir())
    assert build(data).train.size > 0


def test_a_cache_that_cannot_be_a_folder_is_named(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--cache: cannot write in .*file/sub: Not a directory"):
        build(data, cache=tmp_path / "file" / "sub")


def test_progress_is_shown_on_a_terminal_only(data, capsys, monkeypatch):
    build(data)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    prepare(data, vocab_size=301, seq_len=8)
    out, err = capsys.readouterr()
    assert out == ""
    assert "learning a vocabulary" in err or "tokenizing" in err or "reading" in err
