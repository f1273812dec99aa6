from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from gm_mlic.datasets import voc
from gm_mlic.embeddings import ALIASES, embed_labels, labels_of, words_of
from gm_mlic.errors import ConfigError, DataError

WORDS = {
    "dog": [1.0, 2.0, 3.0, 4.0],
    "hot": [3.0, 0.0, 1.0, 0.0],
    "tv": [0.5, 0.25, 0.0, -1.0],
    "airplane": [7.0, 7.0, 7.0, 7.0],
    "aeroplane": [8.0, 8.0, 8.0, 8.0],
    "plant": [1.0, 1.0, 0.0, 0.0],
    "potted": [0.0, 0.0, 1.0, 1.0],
}


def text_of(words: dict[str, list[float]]) -> str:
    return "".join(f"{word} {' '.join(map(str, vector))}\n" for word, vector in words.items())


@pytest.fixture
def glove(tmp_path: Path) -> Path:
    path = tmp_path / "vectors.txt"
    path.write_text(text_of(WORDS))
    return path


def refused(*args, error: type[Exception] = DataError, **options) -> str:
    with pytest.raises(error) as caught:
        embed_labels(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- words ----


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("Wine_Glass", ["wine", "glass"]), ("wine-glass", ["wine", "glass"]), ("  teddy  bear ", ["teddy", "bear"]),
        ("tv/monitor", ["tv", "monitor"]), ("café", ["café"]), ("baker's oven", ["baker's", "oven"]), ("...", []),
    ],
)  # fmt: skip
def test_words_of(label: str, words: list[str]) -> None:
    assert words_of(label) == words


@pytest.mark.parametrize(
    ("classes", "labels", "expected"),
    [
        (["bus", "table", "dog"], ["cat", "dog", "bus"], [2, -1, 1]),
        (["Wine glass", "Bus"], ["bus", "wine_glass"], [1, 0]),
        (["car", "boats", "ski"], ["cars", "boat", "skis"], [0, 1, 2]),
        (["tv", "potted plant", "airplane"], ["aeroplane", "pottedplant", "tvmonitor"], [2, 1, 0]),
        # better matches take precedence
        (["plane", "airplane"], ["airplane", "plane"], [1, 0]),
        (["couch", "sofa"], ["sofa"], [-1, 0]),
        (["bird", "Birds"], ["birds"], [-1, 0]),
        # a matched label is not available in later steps
        (["bird", "birds"], ["Bird", "cat"], [0, -1]),
        ([], ["cat"], []),
        (["cat", "...", ""], [], [-1, -1, -1]),
    ],
)  # fmt: skip
def test_labels_of(classes: list[str], labels: list[str], expected: list[int]):
    assert labels_of(classes, labels) == expected


@given(st.lists(st.sampled_from(["cat", "Cat", "cats", "tv", "television", "tvmonitor", "sofa", "-"]), unique=True))
def test_labels_of_equal_names(names: list[str]):
    assert labels_of(names, names) == list(range(len(names)))


def test_voc_labels_are_matched_by_coco_classes():
    categories = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    found = labels_of(categories, voc.LABELS)
    assert set(found) == {-1, *range(20)}
    assert voc.LABELS[found[categories.index("tv")]] == "tvmonitor"


def test_aliases_are_normalized_and_differ_from_their_key() -> None:
    for word, others in ALIASES.items():
        assert words_of(word) == [word]
        assert word not in others
        assert all(" ".join(words_of(other)) == other for other in others)


# ---- GloVe text ----


def test_text_vectors_are_in_label_order(glove: Path) -> None:
    result = embed_labels(("tv", "Dog", "hot dog"), "glove", glove)
    assert result.vectors.dtype == torch.float32
    assert result.vectors.tolist() == [WORDS["tv"], WORDS["dog"], [2.0, 1.0, 2.0, 2.0]]
    assert result.labels == ("tv", "Dog", "hot dog")
    assert result.entries == {"tv": ("tv",), "Dog": ("dog",), "hot dog": ("hot", "dog")}
    assert "vectors.txt" in result.source


def test_aliases_are_used_only_for_missing_words(glove: Path) -> None:
    result = embed_labels(("aeroplane", "tvmonitor", "pottedplant"), "glove", glove)
    assert result.vectors.tolist() == [WORDS["aeroplane"], WORDS["tv"], [0.5, 0.5, 0.5, 0.5]]
    glove.write_text(text_of({word: vector for word, vector in WORDS.items() if word != "aeroplane"}))
    result = embed_labels(("aeroplane",), "glove", glove)
    assert result.vectors.tolist() == [WORDS["airplane"]]
    assert result.entries["aeroplane"] == ("airplane",)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "7 4\n" + text,  # word2vec header
        lambda text: text.replace("\n", " \n"),  # trailing blanks of word2vec
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text + "\n",
        lambda text: "dog days 9 9 9 9\n. . . 1 1 1 1\n" + text,  # words with spaces, as in glove.840B
        lambda text: "Dog 9 9 9 9\n" + text + "DOG 9 9 9 9\n",  # cased, as in glove.840B: lower case is preferred
        lambda text: text + "dog 9 9 9 9\n",
    ],
)
def test_text_format_variants(glove: Path, change: Callable[[str], str]) -> None:
    glove.write_bytes(change(text_of(WORDS)).encode())
    result = embed_labels(("dog", "tv"), "glove", glove)
    assert result.vectors.tolist() == [WORDS["dog"], WORDS["tv"]]


def test_word_in_another_case(glove: Path) -> None:
    glove.write_text(text_of(WORDS).replace("tv", "TV"))
    assert embed_labels(("tv",), "glove", glove).vectors.tolist() == [WORDS["tv"]]


def test_gzip_and_another_dimension(tmp_path: Path) -> None:
    path = tmp_path / "vectors.txt.gz"
    path.write_bytes(gzip.compress(b"dog 1 2\ntv -3e-1 4\n"))
    result = embed_labels(("tv", "dog"), "glove", path)
    np.testing.assert_allclose(result.vectors, [[-0.3, 4], [1, 2]], rtol=1e-6)
    path.write_bytes(gzip.compress(b"dog 1 2\ntv -3e-1 4\n")[:-12])
    assert "cannot be read" in refused(("dog",), "glove", path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("dog 1 2 3\n", "line 3 is malformed"),
        ("dog 1 2 3 x\n", "line 3 is malformed"),
        ("dog 1 2 3 4 5\n", "line 3 is malformed"),
        ("unneeded\n", "line 3 is malformed"),
        ("dog 1 2 nan 4\n", "line 3: the vector of 'dog' contains NaN"),
        ("dog 1 2 inf 4\n", "line 3: the vector of 'dog' contains NaN or inf"),
        ("dog 1 2 1e39 4\n", "line 3: the vector of 'dog' contains NaN or inf"),  # infinite as float32
    ],
)
def test_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "vectors.txt"
    path.write_text("tv 1 2 3 4\nhot 1 2 3 4\n" + line)
    text = refused(("dog",), "glove", path)
    assert message in text
    assert str(path) in text


def test_files_without_vectors(tmp_path: Path) -> None:
    assert "do not exist" in refused(("dog",), "glove", tmp_path / "none.txt")
    assert "cannot be read" in refused(("dog",), "glove", tmp_path)
    (tmp_path / "empty.txt").touch()
    assert "empty" in refused(("dog",), "glove", tmp_path / "empty.txt")
    (tmp_path / "prose.txt").write_text("Once upon a time\n")
    assert "line 1 is malformed" in refused(("dog",), "glove", tmp_path / "prose.txt")


# ---- out of vocabulary ----


def test_out_of_vocabulary_error_lists_labels_and_policies(glove: Path) -> None:
    message = refused(("dog", "unicorn", "hot griffin", "yeti"), "glove", glove)
    assert "3 labels" in message
    assert "'unicorn', 'hot griffin' (no griffin), 'yeti'" in message
    for policy in ("skip_words", "zeros", "hashed"):
        assert policy in message


def test_policies(glove: Path) -> None:
    labels = ("dog", "hot griffin", "yeti")
    zeros = embed_labels(labels, "glove", glove, oov="zeros")
    assert zeros.vectors.tolist() == [WORDS["dog"], [0.0] * 4, [0.0] * 4]
    assert zeros.out_of_vocabulary == ("hot griffin", "yeti")
    skipped = embed_labels(labels[:2], "glove", glove, oov="skip_words")
    assert skipped.vectors.tolist() == [WORDS["dog"], WORDS["hot"]]
    assert skipped.entries["hot griffin"] == ("hot",)
    message = refused(labels, "glove", glove, oov="skip_words")
    assert "1 labels" in message
    assert "'yeti'" in message
    assert "griffin" not in message
    hashed = embed_labels(labels, "glove", glove, oov="hashed")
    np.testing.assert_allclose(hashed.vectors.norm(dim=1), np.linalg.norm(WORDS["dog"]), rtol=1e-6)
    assert hashed.out_of_vocabulary == ("hot griffin", "yeti")
    assert not torch.equal(hashed.vectors[1], hashed.vectors[2])


# ---- tables ----


def save_npz(path: Path, labels: list[str], vectors: object) -> Path:
    np.savez(path, labels=np.array(labels), vectors=np.asarray(vectors))
    return path


def test_tables_are_searched_by_name(tmp_path: Path) -> None:
    names, vectors = ["Hot Dog", "pottedplant", "airplane"], np.arange(6.0).reshape(3, 2)
    files = [
        save_npz(tmp_path / "a.npz", names, vectors),
        save_npz(tmp_path / "b.npz", names[::-1], vectors[::-1]),
    ]
    for file, content in (
        ("c.pt", {"labels": names, "vectors": torch.from_numpy(vectors)}),
        ("d.pt", {name: torch.from_numpy(vector) for name, vector in zip(names, vectors, strict=True)}),
    ):
        torch.save(content, tmp_path / file)
        files.append(tmp_path / file)
    for file in files:
        result = embed_labels(("aeroplane", "hot dog", "potted plant"), "glove", file)
        assert result.vectors.tolist() == [[4, 5], [0, 1], [2, 3]]
        assert result.vectors.dtype == torch.float32


def test_full_name_takes_precedence_over_words(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "t.npz", ["hot", "dog", "hot dog", "wine", "glass"], np.eye(5))
    result = embed_labels(("hot dog", "wine glass"), "glove", path)
    assert result.vectors.tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 0.5, 0.5]]


def test_label_missing_in_table(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "t.npz", ["dog"], [[1, 2]])
    assert "'yeti'" in refused(("dog", "yeti"), "glove", path)


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code of a data file was run')",))


def test_damaged_tables(tmp_path: Path) -> None:
    assert "does not exist" in refused(("dog",), "glove", tmp_path / "none.npz")
    assert "NaN" in refused(("dog",), "glove", save_npz(tmp_path / "a.npz", ["dog"], [[1, np.nan]]))
    assert "NaN" in refused(("cat",), "glove", save_npz(tmp_path / "a2.npz", ["cat", "dog"], [[1, 2], [np.inf, 1]]))
    assert "shape" in refused(("dog",), "glove", save_npz(tmp_path / "b.npz", ["dog", "cat"], [[1, 2]]))
    assert "shape" in refused(("dog",), "glove", save_npz(tmp_path / "c.npz", ["dog"], [1, 2]))
    assert "twice" in refused(("dog",), "glove", save_npz(tmp_path / "d.npz", ["dog", "Dog"], [[1, 2], [3, 4]]))
    np.savez(tmp_path / "e.npz", vectors=np.eye(2))
    assert "labels" in refused(("dog",), "glove", tmp_path / "e.npz")
    for name in ("f.npz", "f.pt"):
        (tmp_path / name).write_bytes(b"not a table")
        assert "cannot be read" in refused(("dog",), "glove", tmp_path / name)
    torch.save([1, 2], tmp_path / "g.pt")
    assert "cannot be read" in refused(("dog",), "glove", tmp_path / "g.pt")
    torch.save({"dog": torch.ones(2), "cat": torch.ones(3)}, tmp_path / "h.pt")
    assert "cannot be read" in refused(("dog",), "glove", tmp_path / "h.pt")
    torch.save({"dog": Harmful()}, tmp_path / "i.pt")
    assert "cannot be read" in refused(("dog",), "glove", tmp_path / "i.pt")
    np.savez(tmp_path / "j.npz", labels=np.array([Harmful()], dtype=object), vectors=np.eye(1))
    assert "cannot be read" in refused(("dog",), "glove", tmp_path / "j.npz")


# ---- hashed ----


def hashed_vectors(labels: list[str], dim: int, seed: int = 0) -> np.ndarray:
    return embed_labels(labels, "hashed", dim=dim, seed=seed).vectors.numpy()


def test_hashed_vectors_are_reproducible() -> None:
    """Fixed values on every platform, Python and numpy, since checkpoints depend on them."""
    np.testing.assert_array_equal(
        hashed_vectors(["dog"], 4), np.array([[-1.87174, 1.11382, -1.76151, -0.29379]], dtype=np.float32)
    )
    longer = hashed_vectors(["cat", "dog", "hot dog"], 300)
    np.testing.assert_array_equal(longer[1], hashed_vectors(["Dog"], 300)[0])
    assert not np.array_equal(longer[1], hashed_vectors(["dog"], 300, seed=1)[0])


def test_hashed_vectors_are_standard_normal_for_any_number_of_words() -> None:
    single = hashed_vectors([f"word{n}" for n in range(400)], 300)
    triple = hashed_vectors([f"word{n} and another{n}" for n in range(400)], 300)
    for vectors in (single, triple):
        assert abs(vectors.mean()) < 0.02
        assert abs(vectors.std() - 1) < 0.02
    fourth = (single.astype(np.float64) ** 4).mean()
    assert abs(fourth - 3) < 0.1  # fourth moment of a normal distribution
    cosines = single @ single.T / 300
    np.fill_diagonal(cosines, 0)
    assert np.abs(cosines).max() < 0.4


@given(st.text(min_size=1), st.integers(1, 9))
def test_arbitrary_labels_can_be_hashed(label: str, dim: int) -> None:
    result = embed_labels((label,), "hashed", dim=dim)
    assert result.vectors.shape == (1, dim)
    assert torch.isfinite(result.vectors).all()
    assert result.out_of_vocabulary == ()


def test_invalid_arguments(glove: Path) -> None:
    assert "Unknown embedding 'word2vec'" in refused(("dog",), "word2vec", error=ConfigError)
    assert "oov" in refused(("dog",), "glove", glove, oov="ignore", error=ConfigError)
    assert "path" in refused(("dog",), "glove", error=ConfigError)
    assert "dim" in refused(("dog",), dim=0, error=ConfigError)
    assert "has no argument 'dim'" in refused(("dog",), "glove", glove, dim=5, error=ConfigError)
    assert "has no argument 'oov'" in refused(("dog",), oov="zeros", error=ConfigError)
    assert "must be unique and not empty" in refused(("dog", "dog"))
    assert "must be unique and not empty" in refused(())


# ---- Real files ----


@pytest.mark.shared
@pytest.mark.parametrize(("name", "count"), [("coco2014", 80), ("voc2007", 20), ("nuswide81", 81)])
def test_published_tables(shared_data: Path, name: str, count: int) -> None:
    path = shared_data / "glove" / f"{name}.npz"
    with np.load(path) as table:
        labels, vectors = table["labels"].tolist(), table["vectors"]
    assert len(labels) == count
    result = embed_labels(labels[::-1], "glove", path)
    np.testing.assert_array_equal(result.vectors.numpy()[::-1], vectors)


@pytest.mark.shared
def test_voc_labels_from_the_coco_table(shared_data: Path) -> None:
    with np.load(shared_data / "glove" / "voc2007.npz") as table:
        labels = table["labels"].tolist()
    result = embed_labels(labels, "glove", shared_data / "glove" / "coco2014.npz")
    assert result.out_of_vocabulary == ()
    assert result.entries["tvmonitor"] == ("tv",)
    assert result.entries["sofa"] == ("couch",)


@pytest.mark.shared
def test_real_text_file_equals_the_tables(shared_data: Path) -> None:
    text = shared_data / "glove" / "glove.6B.300d.subset.txt"
    differing: dict[str, set[str]] = {}
    for name in ("coco2014", "voc2007", "nuswide81"):
        with np.load(shared_data / "glove" / f"{name}.npz") as table:
            labels, vectors = table["labels"].tolist(), table["vectors"]
        result = embed_labels(labels, "glove", text, oov="zeros")
        known = [row for row, label in enumerate(labels) if result.entries[label]]
        close = np.abs(result.vectors.numpy()[known] - vectors[known]).max(axis=1) < 1e-4
        differing[name] = {labels[row] for row, same in zip(known, close, strict=True) if not same}
    # The published vector of "hot dog" is neither of its words nor their mean.
    assert differing == {"coco2014": {"hot dog"}, "voc2007": set(), "nuswide81": set()}


@pytest.mark.shared
def test_real_out_of_vocabulary_labels(shared_data: Path) -> None:
    message = refused(("stop sign", "wine glass", "dog"), "glove", shared_data / "glove" / "glove.6B.300d.subset.txt")
    assert "2 labels" in message
    assert "'stop sign' (no stop), 'wine glass' (no wine)" in message
