from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gm_mlic.datasets.photo_folder import PhotoFolder, inside


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with photos, and a photo outside."""
    for name in (
        "root/a.jpg",
        "root/sub/b.jpg",
        "root/sub/my cat.jpg",
        "root/100%25.jpg",
        "outside.jpg",
        "root2/x.jpg",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path / "root"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a.jpg", "a.jpg"),
        ("./sub//b.jpg", "sub/b.jpg"),
        ("sub\\b.jpg", "sub/b.jpg"),
        (".\\sub\\b.jpg", "sub/b.jpg"),
        ("sub/my%20cat.jpg", "sub/my cat.jpg"),
        ("100%25.jpg", "100%25.jpg"),  # the exact name is preferred
        ("3b1f2c1d-a.jpg", "a.jpg"),
        ("sub/3b1f2c1d-my%20cat.jpg", "sub/my cat.jpg"),
        ("images/3b1f2c1d-a.jpg", "a.jpg"),
        ("images\\a.jpg", "a.jpg"),
        ("/data/upload/7/3b1f2c1d-a.jpg", "a.jpg"),
        ("/data/upload/3b1f2c1d-a.jpg", "a.jpg"),
        ("../../label-studio/data/upload/1/3b1f2c1d-a.jpg", "a.jpg"),
        ("/data/local-files/?d=sub/my%20cat.jpg", "sub/my cat.jpg"),
        ("none.jpg", "none.jpg"),  # missing: for the caller to report
        ("sub\\none.jpg", "sub/none.jpg"),
    ],
)
def test_spellings(root: Path, name: str, found: str):
    assert PhotoFolder(root).locate(name) == found


@pytest.mark.parametrize(
    "name",
    [
        "../outside.jpg", "sub/../../outside.jpg", "..\\outside.jpg", "sub/..", "..", ".", "", "/", "/etc/passwd",
        "\\etc\\passwd", "C:\\a.jpg", "C:a.jpg", "C:/a.jpg", "\\\\server\\share\\a.jpg", "//server/share/a.jpg",
        "\\\\?\\C:\\a.jpg", "\\\\.\\a.jpg", "a.jpg:stream", "http://host/a.jpg", "%2e%2e/outside.jpg/..", "a\0.jpg",
        "/data/upload/1/..", "/data/local-files/?d=../outside.jpg", "/data/local-files/?d=%2e%2e%2foutside.jpg",
        "/data/local-files/?d=/etc/passwd",
    ],
)  # fmt: skip
def test_names_outside_the_folder(root: Path, name: str):
    assert PhotoFolder(root).locate(name) is None


def test_encoded_parents_are_no_parents(root: Path):
    """Only the name as it is, of a file that does not exist, is left."""
    assert PhotoFolder(root).locate("%2e%2e%2foutside.jpg") == "%2e%2e%2foutside.jpg"
    assert not (root / "%2e%2e%2foutside.jpg").exists()


def test_absolute_names(root: Path, monkeypatch: pytest.MonkeyPatch):
    folder = PhotoFolder(root)
    assert folder.locate(f"{root}/sub/b.jpg") == "sub/b.jpg"
    assert folder.locate(f"{root}/./sub/none.jpg") == "sub/none.jpg"
    for name in (
        f"{root}/../outside.jpg",
        f"{root}2/x.jpg",
        f"{root}",
        f"/{root}/a.jpg",
        f"{root}/sub/../../outside.jpg",
    ):
        assert folder.locate(name) is None
    monkeypatch.chdir(root.parent)
    assert PhotoFolder(Path("root")).locate(f"{root}/sub/b.jpg") == "sub/b.jpg"
    (root.parent / "link").symlink_to(root)
    assert PhotoFolder(Path("link")).locate(f"{root}/a.jpg") == "a.jpg"
    assert PhotoFolder(Path("link")).locate(f"{root.parent}/link/a.jpg") == "a.jpg"


def test_folder_below_the_root(root: Path):
    folder = PhotoFolder(root, "sub")
    assert folder.locate("b.jpg") == "sub/b.jpg"
    assert folder.locate(f"{root}/sub/b.jpg") == "sub/b.jpg"
    assert folder.locate("none.jpg") == "sub/none.jpg"
    assert folder.locate(f"{root}/a.jpg") is None


def test_links_are_followed(root: Path):
    (root / "in.jpg").symlink_to(root / "a.jpg")
    (root / "out.jpg").symlink_to(root.parent / "outside.jpg")
    (root / "folder").symlink_to(root.parent)
    (root / "dangling.jpg").symlink_to(root.parent / "none.jpg")
    for name in ("in.jpg", "out.jpg", "folder/outside.jpg", "folder/root/a.jpg", "dangling.jpg"):
        assert PhotoFolder(root).locate(name) == name


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("listed", ["NFC", "NFD"])
def test_composed_and_decomposed_names(root: Path, on_disk: str, listed: str):
    name = "Müsli/Café é.jpg"
    actual = unicodedata.normalize(on_disk, name)
    (root / actual).parent.mkdir()
    (root / actual).touch()
    assert PhotoFolder(root).locate(unicodedata.normalize(listed, name)) == actual


def test_composed_and_decomposed_names_of_two_files(root: Path):
    """Where the file system keeps both, each name is its own file."""
    names = [unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD")]
    for name in names:
        (root / name).touch()
    if len(list(root.glob("*.jpg"))) == 4:
        assert [PhotoFolder(root).locate(name) for name in names] == names


def test_files(root: Path):
    (root / ".hidden.jpg").touch()
    (root / "loop").symlink_to(root)
    elsewhere = root.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "z.jpg").touch()
    (root / "linked").symlink_to(elsewhere)
    found = PhotoFolder(root).files(PhotoFolder(root).below)
    assert [str(path) for path in found] == ["100%25.jpg", "a.jpg", "linked/z.jpg", "sub/b.jpg", "sub/my cat.jpg"]


@settings(max_examples=300)
@given(name=st.text(st.sampled_from("./\\:%~a2efF5c0?=d- \0C"), max_size=12) | st.text(max_size=6))
def test_no_name_leads_outside(tmp_path_factory: pytest.TempPathFactory, name: str):
    root = tmp_path_factory.getbasetemp() / "fuzz" / "root"
    (root / "a").mkdir(parents=True, exist_ok=True)
    found = PhotoFolder(root).locate(name)
    if found is not None:
        assert (root / found).resolve().is_relative_to(root.resolve())
        assert found not in ("", ".")
        assert inside(found) is not None
