import sysconfig
from pathlib import Path

import numpy as np
import pytest
from data_helpers import documents, prose

from fsam_core.errors import UserError
from fsam_trainers.data import documents as pieces
from fsam_trainers.data import prepare, specs, text


def build(path: Path, **more):
    return prepare(str(path), **{"vocab_size": 300, "seq_len": 8, **more})


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.mark.parametrize("piece", [text.PIECE, 50])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_one_file_comes_back_exactly_and_is_cut_at_a_line(tmp_path, monkeypatch, end, piece):
    monkeypatch.setattr(text, "PIECE", piece)
    monkeypatch.setattr(text, "REACH", piece // 2)
    content = end.join(prose(12, seed) for seed in range(100)) + end + "<|endoftext|> written out"
    corpus = build(write(tmp_path, {"a.txt": content}) / "a.txt")
    (train,), (validation,) = documents(corpus.train, corpus), documents(corpus.validation, corpus)
    assert train + validation == content
    assert train.endswith("\n") or end == "\r"
    assert 0.03 < len(validation) / len(content) < 0.07
    assert corpus.description.startswith("a.txt: ")


@pytest.mark.parametrize("end", ["", "\n"])  # a line end that ends the text is no place to cut
def test_one_line_is_cut_at_the_mark(tmp_path, end):
    content = prose(2000).replace("\n", " ") + end
    corpus = build(write(tmp_path, {"a.txt": content}) / "a.txt")
    (validation,) = documents(corpus.validation, corpus)
    in_bytes = content.encode()
    assert validation == in_bytes[-(len(in_bytes) // 20) :].decode("utf-8", "ignore")  # from the next character on


def test_a_folder_is_split_by_file_and_skips_binary_files(tmp_path):
    files = {f"{'deep/' * (n % 3)}{n:02}.txt": prose(40, n) for n in range(60)}
    folder = write(
        tmp_path / "texts",
        {**files, "bad.txt": b"caf\xe9 latin-1", "nul.dat": b"a\0b", "empty.txt": "", ".git/HEAD": "ref"},
    )
    corpus = build(folder)
    train, validation = documents(corpus.train, corpus), documents(corpus.validation, corpus)
    order = [files[name] for name in sorted(files)]
    assert sorted(text for text in train + validation if text) == sorted(order)
    assert [text for text in order if text in set(train)] == [text for text in train if text]
    assert 1 <= len(validation) <= 10
    assert "(2 other files left out, the first: bad.txt is not UTF-8 text): 60 files," in corpus.description


def test_the_split_of_a_file_does_not_depend_on_the_others(tmp_path):
    files = {f"{n}.txt": prose(40, n) for n in range(60)}
    first = build(write(tmp_path / "a", files))
    held = set(documents(first.validation, first))
    fewer = build(write(tmp_path / "b", {name: content for name, content in files.items() if name != "0.txt"}))
    assert held - {files["0.txt"]} == set(documents(fewer.validation, fewer))


@pytest.mark.parametrize("count", [2, 3])
def test_a_few_files_fill_both_splits(tmp_path, count):
    files = {f"{n}.txt": prose(60, n) for n in range(count)}
    corpus = build(write(tmp_path / "few", files))
    train, validation = documents(corpus.train, corpus), documents(corpus.validation, corpus)
    assert len(validation) == 1
    assert sorted(train + validation) == sorted(files.values())


def test_one_file_is_always_left_to_train_on(tmp_path):
    names = [name for n in range(400) if pieces.held_out(name := f"{n}.txt")][:3]
    corpus = build(write(tmp_path / "held", {name: prose(60, n) for n, name in enumerate(names)}))
    assert len(documents(corpus.train, corpus)) == 1
    assert len(documents(corpus.validation, corpus)) == 2


def test_a_folder_with_one_usable_file_is_cut_like_that_file(tmp_path):
    content = prose(2000)
    folder = write(tmp_path / "one", {"a.txt": content, "b.dat": b"\xff\xfe\x00", "empty": ""})
    corpus = build(folder)
    assert "".join(documents(corpus.train, corpus) + documents(corpus.validation, corpus)) == content


@pytest.mark.usefixtures("few_held_out")
def test_max_tokens_bounds_both_splits_and_keeps_the_start(tmp_path):
    path = write(tmp_path, {"a.txt": prose(20000)}) / "a.txt"
    some = build(path, max_tokens=1000)
    assert some.train.size == 1000
    assert some.validation.size == 50
    assert build(path, max_tokens=40).validation.size == 9  # seq_len + 1 where that is more than a twentieth


def test_few_training_tokens_leave_enough_held_out_to_measure_by(tmp_path):
    path = write(tmp_path, {"a.txt": prose(20000)}) / "a.txt"
    tokenizer = build(path).folder / "tokenizer.json"
    sizes = {build(path, tokenizer=tokenizer, max_tokens=most).validation.size for most in (1000, None)}
    assert len(sizes) == 1
    assert min(sizes) > 1000


def test_the_content_and_each_setting_make_another_corpus(tmp_path):
    path = write(tmp_path, {"a.txt": prose(3000)}) / "a.txt"
    first = build(path)
    copy = write(tmp_path / "elsewhere", {"a.txt": prose(3000)}) / "a.txt"
    assert build(copy).fingerprint == first.fingerprint
    assert build(copy).folder == first.folder
    others = [build(path, vocab_size=301), build(path, max_tokens=500)]
    path.write_text(prose(3000, seed=1))
    others.append(build(path))
    assert len({corpus.fingerprint for corpus in [first, *others]}) == 4
    assert len({corpus.folder for corpus in [first, *others]}) == 4


def test_a_small_text_learns_fewer_tokens_than_the_vocabulary(tmp_path):
    corpus = build(write(tmp_path, {"a.txt": "ab " * 200}) / "a.txt", vocab_size=70000)
    assert corpus.vocab_size == 70000
    assert corpus.train.dtype == np.uint32
    assert "vocabulary 70000 (2" in corpus.description
    assert int(corpus.train.max()) < 300


def test_the_python_corpus_is_equal_in_every_process(child, cache):
    code = """if True:
        from fsam_trainers.data import prepare
        corpus = prepare("python", vocab_size=512, seq_len=64, max_tokens=300_000)
        print(corpus.fingerprint, corpus.folder)
        """
    runs = [
        child(code, PYTHONHASHSEED="1", FSAM_CACHE=str(cache / "a")),
        child(code, PYTHONHASHSEED="2", FSAM_CACHE=str(cache / "b"), RAYON_NUM_THREADS="1"),
    ]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    (first, _), (second, folder) = (out.split() for out, _ in outputs)
    assert first == second
    meta = Path(folder) / "meta.json"
    built = meta.stat().st_mtime_ns
    again = prepare("python", vocab_size=512, seq_len=64, max_tokens=300_000, cache=cache / "b")
    assert again.fingerprint == first
    assert meta.stat().st_mtime_ns == built
    for name in ("train.bin", "tokenizer.json"):
        assert (Path(folder) / name).read_bytes() == (cache / "a" / Path(folder).name / name).read_bytes()


def test_the_python_corpus_omits_what_distributions_change(tmp_path, monkeypatch):
    wanted = ["ast.py", "json/decoder.py", "testing.py"]
    other = [
        "test/a.py",
        "json/tests/b.py",
        "site-packages/c.py",
        "config-3.11-x86_64/d.py",
        "_sysconfigdata__linux.py",
    ]
    other += ["sitecustomize.py", "idlelib/e.py", "__pycache__/f.py", "LICENSE", "ast.pyc"]
    folder = write(tmp_path / "lib", {name: prose(60, n) for n, name in enumerate(wanted + other)})
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(folder)})
    corpus = prepare("python", vocab_size=300, seq_len=8)
    found = documents(corpus.train, corpus) + documents(corpus.validation, corpus)
    assert sorted(found) == sorted((folder / name).read_text() for name in wanted)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(folder / "json" / "tests")})
    monkeypatch.setattr(specs, "_portable", lambda part: False)
    with pytest.raises(UserError, match=r"--data python: .*tests holds no Python sources"):
        prepare("python", vocab_size=300, seq_len=8)


@pytest.mark.parametrize(
    ("files", "spec", "parts"),
    [
        ({"a.txt": ""}, "a.txt", ["--data", "a.txt", "empty"]),
        ({"a.txt": b"caf\xe9"}, "a.txt", ["--data", "a.txt", "UTF-8"]),
        ({"a.txt": b"a\0b"}, "a.txt", ["--data", "a.txt is not text", "byte 1 is NUL"]),
        ({"a.txt": "word"}, "a.txt", ["--data", "training", "9"]),
        ({"a.txt": "word " * 30}, "a.txt", ["--data", "validation", "9"]),
        ({"d/a": b"\xff", "d/b": ""}, "d", ["--data", "/d ", "no text"]),
        ({"d/train.bin": b"\0\0"}, "d", ["--data", "training", "1", "9"]),
        ({}, "missing.txt", ["--data", "missing.txt", "python", ".jsonl", ".bin", "hf:NAME"]),
        ({}, "x" * 5000, ["--data", "xxx", "hf:NAME"]),
        ({}, "~nobody-of-this-name/x", ["--data", "~nobody-of-this-name", "hf:NAME"]),
    ],
)
def test_a_bad_text_is_named(tmp_path, monkeypatch, files, spec, parts):
    monkeypatch.chdir(write(tmp_path, files))
    spec = spec if spec.startswith(("x", "~")) else str(tmp_path / spec)
    with pytest.raises(UserError) as error:
        prepare(spec, vocab_size=300, seq_len=8)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_an_empty_spec_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path, {"a.txt": prose(1000)}))
    with pytest.raises(UserError, match=r"--data: '' is neither"):
        prepare("", vocab_size=300, seq_len=8)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"vocab_size": 256}, ["--vocab-size", "256", "257"]),
        ({"vocab_size": 0}, ["--vocab-size", "0"]),
        ({"vocab_size": 1 << 32}, ["--vocab-size", "4294967296"]),
        ({"seq_len": 0}, ["--seq-len", "0"]),
        ({"max_tokens": 8}, ["--max-tokens", "8", "9"]),
    ],
)
def test_bad_settings_are_named(tmp_path, settings, parts):
    with pytest.raises(UserError) as error:
        build(write(tmp_path, {"a.txt": prose(1000)}) / "a.txt", **settings)
    assert all(part in str(error.value) for part in parts), str(error.value)
