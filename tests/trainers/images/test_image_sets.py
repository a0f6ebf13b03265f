"""Sets of images: every kind is read, and a bad one is named in a sentence."""

from __future__ import annotations

import gzip
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fsam_core import UserError
from fsam_trainers.data.images import Augmentation, HeldOut, load
from fsam_trainers.data.images import arrays as array_sets
from fsam_trainers.data.images.decoding import Form, as_array, decode, opened

RANDOM = np.random.default_rng(0)


def pixels_of(images) -> np.ndarray:
    return np.concatenate([batch["pixels"] for batch in HeldOut(images.validation, 7)])


def saved(path: Path, array: np.ndarray, mode: str | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def random_image(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


# --- kinds ------------------------------------------------------------------------------------------------------------


def test_digits_are_split_by_a_seed_of_their_own():
    images, again = load("digits"), load("digits")
    assert (images.height, images.width, images.channels, len(images.classes)) == (8, 8, 1, 10)
    assert len(images.train.labels) + len(images.validation.labels) == 1797
    assert len(images.validation.labels) == 179
    assert images.fingerprint == again.fingerprint
    assert images.fingerprint != load("digits", augmentation=Augmentation(flip=True)).fingerprint
    assert pixels_of(images).max() == 255


def idx_folder(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    path.mkdir()
    for split in ("train", "t10k"):
        head = bytes((0, 0, 8, 3)) + b"".join(int(n).to_bytes(4, "big") for n in images.shape)
        (path / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images.tobytes()))
        head = bytes((0, 0, 8, 1)) + len(labels).to_bytes(4, "big")
        (path / f"{split}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    return path


def test_idx_files_gzipped_or_not(tmp_path, monkeypatch):
    images, labels = random_image(6, 5, 4), np.array([0, 1, 2, 0, 1, 2], np.uint8)
    root = idx_folder(tmp_path / "idx", images, labels)
    found = load(str(root))
    np.testing.assert_array_equal(pixels_of(found)[..., 0], images)
    np.testing.assert_array_equal(found.validation.labels, labels)
    monkeypatch.setattr(array_sets, "FASHION", root)
    assert load("fashion").classes[0] == "t-shirt"
    monkeypatch.setattr(array_sets, "FASHION", tmp_path / "nowhere")
    with pytest.raises(UserError, match="apt install dataset-fashion-mnist"):
        load("fashion")
    path = root / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    with pytest.raises(UserError, match=r"train-images.* is truncated: 135 bytes, its header says \(6, 5, 4\)"):
        load(str(root))
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(UserError, match=r"cannot be read: EOFError"):
        load(str(root))


@pytest.mark.parametrize(("names", "bytes_of_labels"), [(("data_batch_1", "test_batch"), 1), (("train", "test"), 2)])
def test_binary_cifar(tmp_path, names, bytes_of_labels):
    image = random_image(32, 32, 3)
    record = bytes([7] * (bytes_of_labels - 1) + [3]) + image.transpose(2, 0, 1).tobytes()
    for name in names:
        (tmp_path / f"{name}.bin").write_bytes(record + bytes([0] * bytes_of_labels) + bytes(3072))
    found = load(str(tmp_path))
    np.testing.assert_array_equal(pixels_of(found)[0], image)
    assert found.validation.labels.tolist() == [3, 0]
    (tmp_path / f"{names[0]}.bin").write_bytes(record[:-5])
    with pytest.raises(UserError, match=r"is truncated: 3,06\d bytes, no multiple of 3,07\d an image"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (np.uint8, lambda x: x),
        (np.uint16, lambda x: x),
        (np.float32, lambda x: np.rint(np.float32(x / 255) * 255)),
    ],
)
def test_npz_of_bytes_16_bits_and_floats(tmp_path, kind, expected):
    image, labels = random_image(5, 6, 4, 3), np.arange(5) % 2
    values = image.astype(np.uint16) << 8 if kind is np.uint16 else image / 255 if kind is np.float32 else image
    first = values.astype(kind).transpose(0, 3, 1, 2)  # channels first
    np.savez(tmp_path / "a.npz", x_train=first, y_train=labels[:, None], x_test=first, y_test=labels)
    np.testing.assert_array_equal(pixels_of(load(str(tmp_path / "a.npz"))), expected(image))


def test_a_folder_of_classes(folder):
    found = load(str(folder), workers=0)
    assert found.classes == ("dark", "light")
    assert (found.height, found.width, found.channels) == (8, 12, 3)
    bright = pixels_of(found).mean((1, 2, 3)) > 128
    np.testing.assert_array_equal(bright, found.validation.labels)


def test_a_folder_with_given_splits(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "train")
    shutil.copytree(folder / "light", tmp_path / "test" / "light")
    found = load(str(tmp_path), workers=0)
    assert len(found.train.labels) == 20
    assert found.validation.labels.tolist() == [1] * 10
    shutil.copytree(folder / "dark", tmp_path / "test" / "other")
    with pytest.raises(UserError, match=r"other is a class that .*train does not have"):
        load(str(tmp_path))


def test_worker_processes_decode_what_one_process_does(folder):
    numbers = np.arange(15)
    (alone, _), (found, usable) = (load(str(folder), workers=n).train.pixels(numbers) for n in (0, 2))
    np.testing.assert_array_equal(alone, found)
    assert usable.all()


def test_a_dead_worker_is_named(folder):
    source = load(str(folder), workers=1).train
    source.pixels(np.arange(2))
    source.decoders._workers[0].process.kill()
    with pytest.raises(UserError, match=r"the decoding process .* was killed by signal 9"):
        source.pixels(np.arange(2))


@pytest.fixture
def quiet_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    return datasets


@pytest.mark.parametrize("typed", [False, True])
def test_parquet_of_image_bytes(folder, tmp_path, quiet_hub, typed):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    files = sorted(folder.rglob("*.png"))
    content = [{"bytes": path.read_bytes(), "path": path.name} if typed else path.read_bytes() for path in files]
    table = pyarrow.table({"image": content, "label": [int(path.parent.name == "light") for path in files]})
    parquet.write_table(table, tmp_path / "train-0.parquet")
    parquet.write_table(table, tmp_path / "validation-0.parquet")
    found = load(str(tmp_path), workers=0)
    assert len(found.train.labels) == len(found.validation.labels) == len(files)
    np.testing.assert_array_equal(pixels_of(found)[3], np.asarray(Image.open(files[3])))
    parquet.write_table(table.rename_columns(["image", "kind"]), tmp_path / "train-0.parquet")
    with pytest.raises(UserError, match=r"has no column of labels \(label, .*only: image, kind"):
        load(str(tmp_path / "train-0.parquet"))


def test_a_local_folder_of_the_hub(folder, quiet_hub):
    found = load(f"hf:{folder}", workers=0)
    assert found.classes == ("dark", "light")
    assert len(found.train.labels) == 18
    with pytest.raises(UserError, match="no data set named"):
        load("hf:")


# --- single images ----------------------------------------------------------------------------------------------------

GREY = Form(4, 4, 1, resize=False)
COLOUR = Form(4, 4, 3, resize=False)


def test_16_bits_become_their_upper_8(tmp_path):
    values = RANDOM.integers(0, 1 << 16, (4, 4)).astype(np.uint16)
    path = saved(tmp_path / "a.png", values)
    np.testing.assert_array_equal(as_array(opened(str(path)), GREY)[..., 0], values >> 8)


def test_cmyk_is_seen_as_colour(tmp_path):
    path = saved(tmp_path / "a.jpg", np.full((4, 4, 3), (200, 30, 60), np.uint8), "CMYK", quality=100)
    assert Image.open(path).mode == "CMYK"
    np.testing.assert_allclose(as_array(opened(str(path)), COLOUR), np.full((4, 4, 3), (200, 30, 60)), atol=4)


def test_transparent_pixels_of_a_palette_are_seen_on_white(tmp_path):
    path = saved(tmp_path / "a.png", np.array([[0, 255], [255, 0]], np.uint8).repeat(2, 0).repeat(2, 1), "P")
    with Image.open(path) as image:
        image.save(path, transparency=image.getpixel((0, 0)))
    assert (as_array(opened(str(path)), COLOUR) == 255).all()


def test_files_are_scaled_and_cropped_to_one_size(tmp_path):
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 10:30] = 255  # what the crop leaves
    path = saved(tmp_path / "a.png", wide)
    assert (as_array(opened(str(path)), Form(10, 10, 1, resize=True)) > 200).all()


@pytest.mark.parametrize(
    ("content", "why"), [(b"", "cannot be decoded: UnidentifiedImageError"), (b"GIF89a", "cannot be decoded")]
)
def test_what_is_no_image_is_left_out(content, why):
    found = decode([content], COLOUR)
    assert why in found.reasons[0]
    assert not found.pixels.any()


def test_a_truncated_file_is_left_out_and_counted(folder, tmp_path, caplog):
    for split in ("train", "val"):
        root = shutil.copytree(folder, tmp_path / "set" / split)
    path = tmp_path / "set" / "train" / "dark" / "3.png"
    path.write_bytes(path.read_bytes()[:-60])
    (root / "dark" / "5.png").write_bytes(b"")
    found = load(str(tmp_path / "set"), workers=0)
    assert "1 empty files left out" in found.description
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            _, usable = found.train.pixels(np.arange(len(found.train.labels)))
    assert (~usable).sum() == 1
    (message,) = caplog.messages
    assert "train/dark/3.png cannot be decoded" in message
    assert message.endswith("left out, 1 so far")


def test_too_many_bad_files_are_an_error(folder, tmp_path):
    for i in range(40):
        target = tmp_path / "set" / f"class-{i % 2}" / f"{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        content = (folder / "dark" / "1.png").read_bytes()
        target.write_bytes(content[:-40] if i < 30 else content)
    found = load(str(tmp_path / "set"), workers=0)
    with pytest.raises(UserError, match=r"class-./\d+.png cannot be decoded.*11 of the first 36 images cannot be used"):
        found.train.pixels(np.arange(36))


# --- whole sets -------------------------------------------------------------------------------------------------------


def made(root: Path, **sizes: tuple[int, ...]) -> str:
    for name, shape in sizes.items():
        for i in range(4):
            saved(root / name / f"{i}.png", random_image(*shape))
    return str(root)


def npz(path: Path, images, labels) -> str:
    np.savez(path / "set.npz", images=images, labels=labels)
    return str(path / "set.npz")


IMAGES = np.zeros((4, 8, 8), np.uint8)
BAD = {
    "one class": (lambda p: npz(p, IMAGES, [1] * 4), "all images of set.npz are of one class, 1"),
    "one class in a folder": (lambda p: made(p, a=(4, 4)), "are of one class, a"),
    "negative label": (lambda p: npz(p, IMAGES, [0, 1, -1, 0]), "whole numbers from 0 on, and set.npz has -1"),
    "label of a fraction": (lambda p: npz(p, IMAGES, [0.5, 1, 1, 0]), "whole numbers from 0 on, and set.npz has 0.5"),
    "huge label": (lambda p: npz(p, IMAGES, [0, 1, 9999, 0]), "a label 9,999 among"),
    "too few labels": (lambda p: npz(p, IMAGES, [0, 1]), r"has 4 images and labels of shape \[2\]"),
    "shape": (lambda p: npz(p, IMAGES[0], [0, 1]), r"must be \[N, H, W\]"),
    "range": (lambda p: npz(p, IMAGES - 1.0, [0, 1, 1, 0]), "uint8, uint16 or floats in 0 … 1, got float64 -1 … 0"),
    "no images": (lambda p: npz(p, IMAGES[:0], np.zeros(0, int)), "has a split without images"),
    "mixed sizes": (lambda p: made(p, a=(4, 4), b=(4, 6)), "differ in size, a/0.png 4 x 4 and b/0.png 4 x 6"),
    "no folders": (lambda p: str(saved(p / "a.png", IMAGES[0]).parent), "no folders of images but images of its own"),
    "empty folder": (lambda p: str(p), r"holds no folders of images: it must have one a class, class/\*.png"),
    "text": (lambda p: str(Path(__file__)), "holds no images that are known; with --task images it may be digits"),
    "nothing": (lambda p: str(p / "none"), "is not there; with --task images it may be digits"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_set_is_named_in_a_sentence(name, tmp_path):
    make, says = BAD[name]
    with pytest.raises(UserError, match=says) as raised:
        load(make(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_damaged_npz_and_one_of_something_else(tmp_path):
    path = Path(npz(tmp_path, IMAGES, [0, 1, 0, 1]))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"set.npz cannot be read: BadZipFile"):
        load(str(path))
    np.savez(path, a=IMAGES)
    with pytest.raises(UserError, match=r"must hold x_train/y_train or .*, got a"):
        load(str(path))


def test_a_set_of_truncated_files_says_why(tmp_path):
    root = made(tmp_path / "set", a=(4, 4), b=(4, 4))
    for path in Path(root).rglob("*.png"):
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"none of the images of set .* can be decoded; ./\d.png: "):
        load(root)


def test_options_are_checked():
    for options, says in (
        ({"image_size": 0}, "--image-size: got 0"),
        ({"image_size": 9}, "--image-size scales encoded images; those of digits are arrays of 8 x 8"),
        ({"workers": -1}, "--data-workers: got -1"),
    ):
        with pytest.raises(UserError, match=says):
            load("digits", **options)
    for options, says in (({"crop_padding": -1}, "--crop-padding"), ({"mixup": -0.5}, "--mixup .* got -0.5")):
        with pytest.raises(UserError, match=says):
            Augmentation(**options)
