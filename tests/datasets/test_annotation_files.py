from __future__ import annotations

import contextlib
import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gm_mlic.datasets.annotation_files import Annotations, TableFormat, read_annotations
from gm_mlic.errors import DataError


def read(tmp_path: Path, content: str | bytes, name: str = "labels.csv", **form: Any) -> Annotations:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_annotations(path, TableFormat(**form))


def refused(tmp_path: Path, content: str | bytes, name: str = "labels.csv", **form: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(tmp_path, content, name, **form)
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path / name) in message
    assert message[-1] in ".?"
    return message


def present(annotations: Annotations) -> dict[str, set[str]]:
    return {row.file: set(row.present) for row in annotations.rows}


EXPECTED = {"a.jpg": {"cat", "dog"}, "b.jpg": set(), "sub/c.jpg": {"red bird"}}


# ---- CSV ----


@pytest.mark.parametrize(
    "content",
    [
        "file,labels\na.jpg,cat;dog\nb.jpg,\nsub/c.jpg,red bird\n",
        "\ufefffile,labels\r\na.jpg,cat;dog\r\nb.jpg,\r\nsub/c.jpg,red bird",
        "file,labels\ra.jpg,cat;dog\rb.jpg,\rsub/c.jpg,red bird\r",
        'file;labels\na.jpg;"cat;dog"\nb.jpg;\nsub/c.jpg;red bird\n',
        "labels\tfile\ncat; dog ;\ta.jpg\n\tb.jpg\n red bird\t./sub//c.jpg \n",
        "file|labels\na.jpg|cat;dog;cat\nb.jpg|;\n\n  \nsub/c.jpg|red bird\n|\n",
        ' "file", "labels"\n"a.jpg", "cat;dog"\n"b.jpg", ""\n"sub/c.jpg", "red bird "\n',
        "photographer,file,labels,year\nMe,a.jpg,cat;dog,1\n,b.jpg,,2\nYou,sub/c.jpg,red bird,3\n",
        "file,cat,dog,red bird\na.jpg,1,1,0\nb.jpg,0,0,0\nsub/c.jpg,0,0,1\n",
        "file; cat ;dog;red bird\na.jpg; 1 ;1.0;0\nb.jpg;0;0.0;0\nsub/c.jpg;0;0;1\n",
        "file,cat,dog,red bird\na.jpg,True,true,False\nb.jpg,0,FALSE,0\nsub/c.jpg,false,0,TRUE\n",
    ],
)
def test_table_dialects(tmp_path: Path, content: str):
    assert present(read(tmp_path, content)) == EXPECTED


def test_label_columns_define_label_order(tmp_path: Path):
    found = read(tmp_path, "dog,file,note,cat,split\n1,a.jpg,x,0,train\n0,b.jpg,y,0,test\n", ignore=("note",))
    assert found.labels == ("dog", "cat")
    assert [row.split for row in found.rows] == ["train", "test"]
    assert [row.where.rsplit(" ", 1)[1] for row in found.rows] == ["2", "3"]


def test_custom_column_names_separator_and_suffix(tmp_path: Path):
    form = {"file": "image_name", "labels": "tags", "split": "part", "separator": " ", "suffix": ".jpg"}
    found = read(tmp_path, "image_name,tags,part\ntrain_0,haze primary,val\ntrain_1,,val\n", **form)
    assert present(found) == {"train_0.jpg": {"haze", "primary"}, "train_1.jpg": set()}
    assert [row.split for row in found.rows] == ["val", "val"]


def test_difficult_labels_require_voc_format(tmp_path: Path):
    table = "file,cat,dog\na.jpg,1,-1\nb.jpg,0,1\nc.jpg,-1,-1.0\n"
    rows = read(tmp_path, table, target_format="voc").rows
    assert [row.present for row in rows] == [("cat",), ("dog",), ()]
    assert [row.difficult for row in rows] == [(), ("cat",), ()]
    assert "line 2: column 'dog' has '-1': expected 1 or 0; set `target_format='voc'`" in refused(tmp_path, table)
    binary = "file,cat,dog\na.jpg,1,0\nb.jpg,0,0\n"
    assert "set `target_format='binary'`" in refused(tmp_path, binary, target_format="voc")
    assert "expected 1 (present), 0 (difficult)" in refused(tmp_path, "file,x\na,2\n", target_format="voc")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n\n  \n", "is empty"),
        ("\ufeff", "is empty"),
        ("file,labels\n", "has no rows"),
        ("file,labels\n,\n", "has no rows"),
        ("photo.jpg,cat\n", "has no column 'file' in its first line (photo.jpg, cat)"),
        ("File,labels\na.jpg,cat\n", "did you mean 'File'?"),
        ("file\na.jpg\n", "neither a column 'labels' nor label columns"),
        ("file,split\na.jpg,train\n", "neither a column 'labels' nor label columns"),
        ("file,labels,file\na.jpg,cat,b.jpg\n", "two columns 'file'"),
        ("file,cat,dog,cat\na.jpg,1,0,1\n", "two columns 'cat'"),
        ("file,a;file\na,b\n", "the delimiter is ambiguous (comma or semicolon)"),
        ("file,labels\na.jpg\n", "line 2 has 1 fields"),
        ('file,labels\na.jpg,"cat\n', "is malformed"),
        ('file,labels\na.jpg,"cat"x\n', "line 2 is malformed"),
        ('"file"x,"labels"\n', "line 1 is malformed"),
        ("file,labels\na.jpg," + "x" * 200_000 + "\n", "is malformed (field larger than field limit"),
        ("file,cat,dog\na.jpg,1,2\n", "line 2: column 'dog' has '2'"),
        ("file,cat,dog\na.jpg,1,\n", "line 2: column 'dog' has '': expected 1 or 0; set `missing_value='absent'`"),
        (
            "file,cat,dog\na.jpg,1,nan\n",
            "line 2: column 'dog' has 'nan': expected 1 or 0; set `missing_value='absent'`",
        ),
        ("file,cat,dog\na.jpg,1,yes\n", "line 2: column 'dog' has 'yes'"),
        ("file,label\na.jpg,cat;dog\n", "if it lists the labels, set `columns['labels']='label'`."),
        (",file,cat\n0,a.jpg,1\n", "column 1 has no name: remove it (pandas"),
        ("file;labels;note\na.jpg,b;cat\n", "line 2 has 2 fields"),
        (
            "file,labels\na.jpg,cat,dog\n",
            "line 2 has 3 fields, but the first line has 2: quote fields that contain the",
        ),
        ("file,labels\na.jpg,cat,dog\n", "or set `separator=','` if they are labels."),
        ("file,cat,dog\na.jpg,1,0\na.jpg,0,1\n", "line 3 repeats the image 'a.jpg'"),
        ("file,labels,x1\na.jpg,cat,1\n./a.jpg,cat,2\n", "line 2) with another value of 'x1': keep one row"),
        ("file,labels,split\na.jpg,cat,val\na.jpg,dog,Train\n", "with the split 'train' instead of 'val'"),
        ("sep=:\nfile:labels\na.jpg:cat\n", "'sep=:' is no known delimiter"),
        ("# made today\n", "is empty"),
        ('file,labels\na.jpg,"[1, 2]"\n', "line 2 has labels '[1, 2]': expected label names, such as cat;dog or"),
        ("file,labels\na.jpg,[0 1]\n", "expected label names"),
        ("file,labels\na.jpg,{'cat': 1}\n", "expected label names"),
        ("file,labels\n" + "x" * 5000 + ",cat\n", "expected a file name"),
        ("file,labels\na.jpg,\"['cat', 3]\"\n", "expected label names"),
        ("file,labels\na.jpg,\"['cat', dog]\"\n", "expected label names"),
        ("file,labels\n//server/share/a.jpg,cat\n", "must stay inside"),
        ("file,labels\n\\\\server\\share\\a.jpg,cat\n", "must stay inside"),
        ("file,labels\n\\a.jpg,cat\n", "must stay inside"),
        ("file,labels\nsub\\..\\..\\a.jpg,cat\n", "must stay inside"),
        ("file,labels\nC:a.jpg,cat\n", "must stay inside"),
        ("file,labels\n.,cat\n", "must stay inside"),
        ("file,labels\n,cat\n", "line 2 has file '': expected a file name"),
        ("file,labels\n../a.jpg,cat\n", "must stay inside"),
        ("file,labels\nsub/../../a.jpg,cat\n", "must stay inside"),
        ("file,labels\n/etc/passwd,cat\n", "must stay inside"),
        ("file,labels\nC:\\a.jpg,cat\n", "must stay inside"),
        ("file,labels,split\na.jpg,cat,trial\n", "line 2 has split 'trial': expected train, val or test"),
        ("file,labels,split\na.jpg,cat,\n", "line 2 has split ''"),
        ("file,labels\na.jpg,cat\0\n", "line 2 has a NUL character"),
        ("file,labels\na.jpg,café\n".encode("latin-1"), "line 2 is not UTF-8 (byte 0xe9)"),
        ("file,labels\na.jpg,cat\n".encode("utf-16"), "is UTF-16"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "is not UTF-8"),
    ],
)
def test_malformed_tables_are_refused(tmp_path: Path, content: str | bytes, message: str):
    assert message in refused(tmp_path, content)


def test_unknown_suffix_and_unreadable_file(tmp_path: Path):
    assert "has the suffix '.xlsx': expected one of .csv" in refused(tmp_path, "x", "labels.xlsx")
    with pytest.raises(DataError, match="cannot be read"):
        read_annotations(tmp_path / "none.csv", TableFormat())


def test_ignored_columns_must_exist(tmp_path: Path):
    message = refused(tmp_path, "file,cat,Notes\na.jpg,1,x\n", ignore=("notes",))
    assert "no column 'notes', listed in `ignore_columns`; did you mean 'Notes'?" in message


NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="\0\r\n\\:/;", exclude_categories=["Cs", "Zs", "Cc", "Zl", "Zp"]),
    min_size=1, max_size=8,
).filter(lambda name: name not in (".", "..") and name.strip() == name)  # fmt: skip


#: A text in brackets is a list, so that it is no label.
LABELS = NAMES.filter(lambda name: (name[0], name[-1]) not in (("[", "]"), ("(", ")"), ("{", "}")))


@settings(max_examples=60)
@given(
    rows=st.dictionaries(NAMES, st.sets(NAMES, max_size=4), min_size=1, max_size=6),
    delimiter=st.sampled_from([",", ";", "\t", "|"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    ending=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
)
def test_csv_round_trip(tmp_path_factory, rows, delimiter, quoting, ending, bom):
    """Arbitrary labels and file names with common delimiters, quotes and line ends."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator=ending)
    writer.writerow(["file", "labels"])
    writer.writerows([file, ";".join(sorted(labels))] for file, labels in rows.items())
    content = ("\ufeff" if bom else "") + text.getvalue()
    folder = tmp_path_factory.mktemp("table")
    known = frozenset().union(*rows.values())  # a label may be called NaN
    assert present(read(folder, content, known=known)) == rows

    lines = "".join(json.dumps({"file": file, "labels": sorted(labels)}) + ending for file, labels in rows.items())
    assert present(read(folder, ("\ufeff" if bom else "") + lines, "labels.jsonl", known=known)) == rows


def list_cell(labels: list[str], kind: str) -> str:
    """A list as Python, JSON or NumPy writes it."""
    if kind == "numpy":
        return str(np.array(labels, dtype=object))
    return {"python": repr, "tuple": lambda names: repr(tuple(names)), "json": json.dumps}[kind](labels)


@settings(max_examples=60)
@given(
    rows=st.dictionaries(NAMES, st.sets(LABELS, max_size=4), min_size=1, max_size=5),
    kind=st.sampled_from(["python", "json", "tuple", "numpy"]),
    delimiter=st.sampled_from([",", ";", "\t", "|"]),
)
def test_lists_in_cells_round_trip(tmp_path_factory, rows, kind, delimiter):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(["labels", "file"])
    writer.writerows([list_cell(sorted(labels), kind), file] for file, labels in rows.items())
    known = frozenset().union(*rows.values())
    assert present(read(tmp_path_factory.mktemp("t"), text.getvalue(), known=known)) == rows


@settings(max_examples=60)
@given(rows=st.dictionaries(NAMES, st.sets(LABELS, min_size=1, max_size=4), min_size=1, max_size=5), data=st.data())
def test_one_row_per_label_round_trip(tmp_path_factory, rows, data):
    """Rows of the same photo in any order, also repeated, in a table and in JSON Lines."""
    pairs = [(file, label) for file, labels in rows.items() for label in sorted(labels)]
    pairs = data.draw(st.permutations(pairs + pairs[:1]))
    known = frozenset().union(*rows.values())
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file", "split", "labels"])
    writer.writerows([file, "train", label] for file, label in pairs)
    folder = tmp_path_factory.mktemp("t")
    assert present(read(folder, text.getvalue(), known=known, separator="\x1f")) == rows
    lines = "".join(json.dumps({"file": file, "labels": [label]}) + "\n" for file, label in pairs)
    assert present(read(folder, lines, "labels.jsonl", known=known)) == rows


@settings(max_examples=60)
@given(
    rows=st.dictionaries(NAMES, st.sets(st.sampled_from("abcde")), min_size=1, max_size=5),
    values=st.sampled_from([("1", "0"), ("1.0", "0.0"), ("True", "False"), ("1", ""), ("1.0", "nan"), (" 1", "None")]),
)
def test_label_columns_round_trip(tmp_path_factory, rows, values):
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file", *"abcde"])
    writer.writerows([file, *(values[label not in labels] for label in "abcde")] for file, labels in rows.items())
    assert present(read(tmp_path_factory.mktemp("t"), text.getvalue(), missing_value="absent")) == rows


@settings(max_examples=60)
@given(content=st.binary(max_size=60), suffix=st.sampled_from([".csv", ".jsonl", ".json"]), start=st.booleans())
def test_random_bytes_raise_only_data_errors(tmp_path_factory, content: bytes, suffix: str, start: bool):
    path = tmp_path_factory.getbasetemp() / f"bytes{suffix}"
    beginning = {".csv": b"file,labels\n", ".jsonl": b'{"file":"a","labels":[', ".json": b'{"images":['}[suffix]
    path.write_bytes((beginning if start else b"") + content)
    with contextlib.suppress(DataError):
        assert read_annotations(path, TableFormat()).rows


# ---- Tables of other tools ----


def notes(annotations: Annotations) -> list[str]:
    lines = [note.partition(".csv: ")[2] or note.partition(".jsonl: ")[2] for note in annotations.notes]
    assert all(lines)
    assert not any("\n" in line for line in lines)
    return lines


def test_one_row_per_label(tmp_path: Path):
    found = read(tmp_path, "file,labels,year\na.jpg,cat,1\nb.jpg,,1\n./a.jpg,dog,1\nsub/c.jpg,red bird,2\n")
    assert present(found) == EXPECTED
    assert [row.where.rsplit(" ", 1)[1] for row in found.rows] == ["2", "3", "5"]
    (line,) = notes(found)
    assert line == ("several rows per image (layout=long): labels of 1 rows are added to those of an earlier row")


def test_columns_that_differ_in_a_long_table_can_be_ignored(tmp_path: Path):
    table = "file,labels,x1\na.jpg,cat,1\na.jpg,dog,2\n"
    assert "another value of 'x1'" in refused(tmp_path, table)
    assert present(read(tmp_path, table, ignore=("x1",))) == {"a.jpg": {"cat", "dog"}}


@pytest.mark.parametrize("table", ["file,labels\na.jpg,cat\n./a.jpg,cat\n", "file,cat\na.jpg,1\na.jpg,1.0\n"])
def test_identical_rows_are_one(tmp_path: Path, table: str):
    found = read(tmp_path, table)
    assert present(found) == {"a.jpg": {"cat"}}
    (line,) = notes(found)
    assert line == "1 rows repeat an earlier row and are ignored, the first is line 3"


def test_boxes_of_one_line_per_object(tmp_path: Path):
    lines = line(boxes=[[1, 2, 30, 40, "cat"]]) + line(labels=["dog"], boxes=[[5, 5, 9, 9, "dog"]])
    (row,) = read(tmp_path, lines, "labels.jsonl").rows
    assert row.present == ("cat", "dog")
    assert row.boxes == (((1, 2, 30, 40), "cat"), ((5, 5, 9, 9), "dog"))
    assert "with another value of 'boxes'" in refused(tmp_path, lines + line(), "labels.jsonl")


@pytest.mark.parametrize(
    "cell",
    [
        "['cat', 'dog']", '["cat", "dog"]', "('cat', 'dog')", "{'cat', 'dog'}", "['cat' 'dog']", "['cat'\n 'dog']",
        "[cat, dog]", " [ 'cat', 'dog', ] ", "['cat', 'dog', None, nan]", '["cat", "dog", null]', "['cat ','dog','']",
    ],
)  # fmt: skip
def test_lists_in_cells(tmp_path: Path, cell: str):
    quoted = '"' + cell.replace('"', '""') + '"'
    found = read(tmp_path, f"file,labels\na.jpg,{quoted}\nb.jpg,[]\nc.jpg,()\n")
    assert present(found) == {"a.jpg": {"cat", "dog"}, "b.jpg": set(), "c.jpg": set()}


def test_labels_in_lists_may_contain_anything(tmp_path: Path):
    labels = ["a;b", "it's", 'say "x"', "back\\slash", "caf\u00e9", "[x]", "\U0001f600"]
    for cell in (json.dumps(labels), repr(labels)):
        text = io.StringIO()
        csv.writer(text).writerows([["file", "labels"], ["a.jpg", cell]])
        assert present(read(tmp_path, text.getvalue())) == {"a.jpg": set(labels)}


def test_bracketed_label_that_is_listed(tmp_path: Path):
    table = "file,labels\na.jpg,[sic]\n"
    assert present(read(tmp_path, table)) == {"a.jpg": {"sic"}}
    assert present(read(tmp_path, table, known=frozenset({"[sic]"}))) == {"a.jpg": {"[sic]"}}


@pytest.mark.parametrize("missing", ["nan", "NaN", "None", "NULL", "null", "N/A", "n/a", "<NA>", "#N/A"])
def test_missing_labels(tmp_path: Path, missing: str):
    table = f"file,labels\na.jpg,cat\nb.jpg,{missing}\nc.jpg, {missing} \n"
    found = read(tmp_path, table)
    assert present(found) == {"a.jpg": {"cat"}, "b.jpg": set(), "c.jpg": set()}
    (line,) = notes(found)
    assert line == (
        f"2 missing values are read as no label, the first at line 3 ({missing}); if it is a label, list it in the "
        "dataset's option labels"
    )
    kept = read(tmp_path, table, known=frozenset({"cat", missing}))
    assert present(kept) == {"a.jpg": {"cat"}, "b.jpg": {missing}, "c.jpg": {missing}}
    assert kept.notes == ()


def test_missing_labels_in_json_lines(tmp_path: Path):
    lines = line(labels=None) + '{"file": "b.jpg", "labels": NaN}\n' + line(file="c.jpg", labels=["cat", None])
    found = read(tmp_path, lines, "labels.jsonl")
    assert present(found) == {"a.jpg": set(), "b.jpg": set(), "c.jpg": {"cat"}}
    assert notes(found)[0].startswith("3 missing values are read as no label, the first at line 1 (None)")


@pytest.mark.parametrize("target_format", ["binary", "voc"])
def test_missing_values_in_label_columns(tmp_path: Path, target_format: str):
    table = "file,cat,dog\na.jpg,1,\nb.jpg,nan,1\nc.jpg, ,N/A\n"
    found = read(tmp_path, table, missing_value="absent", target_format=target_format)
    assert present(found) == {"a.jpg": {"cat"}, "b.jpg": {"dog"}, "c.jpg": set()}
    assert not any(row.difficult for row in found.rows)
    assert notes(found) == ["4 empty cells are read as absent, the first at line 2, dog"]


@pytest.mark.parametrize("name", ["id", "index", "is_valid", "fold", "width", "image_id", "Unnamed: 0", "Fold"])
def test_columns_that_may_not_be_labels(tmp_path: Path, name: str):
    table = f"file,cat,{name}\na.jpg,1,0\nb.jpg,0,1\n"
    found = read(tmp_path, table)
    assert found.labels == ("cat", name)
    assert notes(found) == [
        f"each column is read as a label, also {name} (all: cat, {name}); list columns that are not labels in the "
        "option ignore_columns"
    ]
    assert read(tmp_path, table, ignore=(name,)).notes == ()


def test_columns_of_labels_are_not_suspected(tmp_path: Path):
    names = ["cat", "grid", "indexed", "train", "person", "video", "widthwise", "hidden"]
    table = f"file,{','.join(names)}\na.jpg,{','.join('1' for _ in names)}\n"
    assert read(tmp_path, table).notes == ()


@pytest.mark.parametrize(
    ("name", "split"),
    [("Train", "train"), ("TRAINING", "train"), ("valid", "val"), ("validation", "val"), ("Dev", "val"),
     ("testing", "test"), ("TEST", "test"), (" Val ", "val")],
)  # fmt: skip
def test_names_of_splits(tmp_path: Path, name: str, split: str):
    assert read(tmp_path, f"file,labels,split\na.jpg,cat,{name}\n").rows[0].split == split
    assert read(tmp_path, line(split=name), "labels.jsonl").rows[0].split == split
    content = coco()
    for image in content["images"]:
        image["split"] = name
    assert read(tmp_path, json.dumps(content), "instances.json").rows[0].split == split


@pytest.mark.parametrize(
    "content",
    [
        "sep=;\nfile;labels\na.jpg;cat;dog\nb.jpg;\nsub/c.jpg;red bird\n",
        "\ufeffSEP=,\r\nfile,labels\r\na.jpg,cat;dog\r\nb.jpg,\r\nsub/c.jpg,red bird\r\n",
        '# made by a tool\n\n# twice, "today\nfile,labels\na.jpg,cat;dog\nb.jpg,\nsub/c.jpg,red bird\n',
        "sep=\\t\n# x\nlabels\tfile\ncat;dog\ta.jpg\n\tb.jpg\nred bird\tsub/c.jpg\n",
        "file;labels\na.jpg;cat;dog\nb.jpg;\nsub/c.jpg;red bird\n",
        "file;labels;year\na.jpg;cat;dog;1\nb.jpg;;1\nsub/c.jpg;red bird;1\n",
        "file;labels;year\na.jpg;'cat';1\nb.jpg;;1\nsub/c.jpg;red bird;1\n".replace("'cat'", '"cat;dog"'),
        "labels;file\ncat;dog;a.jpg\n;b.jpg\nred bird;sub\\c.jpg\n",
    ],
)
def test_first_lines_and_delimiters(tmp_path: Path, content: str):
    assert present(read(tmp_path, content)) == EXPECTED


def test_lines_before_the_header_count(tmp_path: Path):
    message = refused(tmp_path, "sep=;\n# x\n\nfile;labels;split\na.jpg;cat;\n")
    assert "line 5 has split ''" in message


def test_table_without_column_names(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jpg").touch()
    message = refused(tmp_path, "sub/a.jpg,cat\nsub/b.jpg,dog\n")
    assert message.endswith(
        "has no column names: its first line lists the photo 'sub/a.jpg'. Add a first line, such as file,labels."
    )
    assert message.count("\n") == 0
    assert "such as file;labels" in refused(tmp_path, "cat;sub\\a.jpg\n")
    for other in ("sub", "x" * 300):  # a folder, and a name that no file can have
        assert "has no column 'file' in its first line" in refused(tmp_path, f"{other},cat\n")


def test_hostile_sizes(tmp_path: Path):
    """Very long lines and labels are refused with a short message."""
    long = "x" * 1_000_000
    for content, name in (
        (f"file,labels\na.jpg,{long}\n", "labels.csv"),
        (f"file,labels\n{long}", "labels.csv"),
        (long, "labels.csv"),
        (f'{{"file": "a.jpg", "labels": "{long}"}}', "labels.jsonl"),
        (f'{{"file": "../{long}", "labels": []}}', "labels.jsonl"),
        (f'{{"file": "a.jpg", "labels": [], "boxes": [[1, 2, 3, 4, "{long}"]]}}', "labels.jsonl"),
        (json.dumps(coco(categories=[{"id": long, "name": "x"}])), "instances.json"),
        (json.dumps(coco(images=[{"id": 1, "width": 1, "height": 1, "file_name": "../" + long}])), "instances.json"),
    ):
        assert len(refused(tmp_path, content, name)) < 600


# ---- JSON Lines ----


def line(**entry: object) -> str:
    return json.dumps({"file": "a.jpg", "labels": ["cat"]} | entry) + "\n"


def test_json_lines(tmp_path: Path):
    content = (
        line(labels=["cat", "dog"], boxes=[[1, 2, 30.5, 40, "dog"], [0, 0, 5, 5, "dog"]], split="train", note=1)
        + "\r\n  \n"
        + line(file="b.jpg", labels=[], split="test")
        + '{"file": "c.jpg", "boxes": [[0, 0, 9, 9, "red bird"]], "split": "val"}'
    )
    found = read(tmp_path, content, "labels.jsonl")
    assert found.labels is None
    assert present(found) == {"a.jpg": {"cat", "dog"}, "b.jpg": set(), "c.jpg": {"red bird"}}
    assert found.rows[0].boxes == (((1, 2, 30.5, 40), "dog"), ((0, 0, 5, 5), "dog"))
    assert [row.boxes is None for row in found.rows] == [False, True, False]
    assert [row.split for row in found.rows] == ["train", "test", "val"]
    assert [row.where.rsplit(" ", 1)[1] for row in found.rows] == ["1", "4", "5"]


def test_json_lines_with_unicode_line_separators_in_strings(tmp_path: Path):
    found = read(tmp_path, '{"file": "a\u2028.jpg", "labels": ["x\u0085y"]}\n', "labels.ndjson")
    assert present(found) == {"a\u2028.jpg": {"x\u0085y"}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ('{"file": "a.jpg"', "line 1 is not valid JSON"),
        ("[" * 100_000, "line 1 is not valid JSON"),
        ("[1]\n", "line 1 is not a JSON object with 'file' and 'labels'"),
        ('{"name": "a.jpg", "labels": []}', "line 1 has no key 'file'"),
        (
            '{"file": "a.jpg", "label": []}',
            "has no key 'labels' (use an empty list for an image without labels); did you",
        ),
        (line(labels="cat"), "has labels 'cat': expected a list of strings"),
        (line(labels=[1]), "has labels [1]: expected a list of strings"),
        (line(file=3), "has file 3: expected a file name"),
        (line(file="a\0.jpg"), "expected a file name"),
        (line(file="a\ud800.jpg"), "has file 'a\\ud800.jpg': expected a file name"),
        (line(boxes=[[1, 2, 10**400, 4, "cat"]]), "expected [x1, y1, x2, y2, label], in pixels"),
        (line(file="../a.jpg"), "must stay inside"),
        (line(split="trial"), "has split 'trial'"),
        (line(split=None), "has split None"),
        (line(split=["train"]), "has split ['train']"),
        (line(split="train") + line(file="b.jpg"), "line 2 has no 'split', but other images do"),
        (line(boxes={}), "has boxes {}"),
        (line(boxes=[[1, 2, 3, 4]]), "has the box [1, 2, 3, 4]: expected [x1, y1, x2, y2, label]"),
        (line(boxes=[[]]), "has the box []"),
        (line(boxes=[3]), "has the box 3"),
        (line(boxes=[[1, 2, 3, 4, 5]]), "has the box [1, 2, 3, 4, 5]"),
        (line(boxes=[[1, 2, True, 4, "cat"]]), "has the box [1, 2, True, 4, 'cat']"),
        (line(boxes=[[1, 2, float("nan"), 4, "cat"]]), "has the box [1, 2, nan, 4, 'cat']"),
        (line(boxes=[[5, 2, 3, 4, "cat"]]), "x2 and y2 must not be less"),
        (line(boxes=[[0.1, 0.1, 0.8, 0.9, "cat"]]), "expected pixels, not relative coordinates"),
        (line(boxes=[[1, 2, 3, 4, "cats"]]), "a box with label 'cats', not in its labels; did you mean 'cat'?"),
    ],
)
def test_malformed_json_lines_are_refused(tmp_path: Path, content: str, message: str):
    assert message in refused(tmp_path, content, "labels.jsonl")


# ---- COCO JSON ----


def coco(**change: Any) -> dict[str, Any]:
    content: dict[str, Any] = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 40, "height": 30} for n in (9, 4)],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 7, "bbox": [1, 2, 10, 20], "iscrowd": 0},
            {"id": 2, "image_id": 9, "category_id": 3, "bbox": [0, 0, 41, 30], "iscrowd": 1},
        ],
        "categories": [{"id": 3, "name": "zebra"}, {"id": 7, "name": "ant"}],
    }
    return content | change


def test_coco(tmp_path: Path):
    found = read(tmp_path, json.dumps(coco()), "instances.json")
    assert found.labels == ("ant", "zebra")
    assert [row.file for row in found.rows] == ["4.jpg", "9.jpg"]
    assert [row.present for row in found.rows] == [(), ("ant", "zebra")]
    assert [row.boxes for row in found.rows] == [(), (((1, 2, 11, 22), "ant"),)]
    assert {row.size for row in found.rows} == {(40, 30)}
    assert {row.split for row in found.rows} == {None}


def test_coco_with_splits(tmp_path: Path):
    content = coco()
    content["images"][0]["split"], content["images"][1]["split"] = "test", "train"
    found = read(tmp_path, json.dumps(content), "instances.json")
    assert [(row.file, row.split) for row in found.rows] == [("4.jpg", "train"), ("9.jpg", "test")]
    content["images"][0]["split"] = "restval"
    assert "image id 9 has split 'restval'" in refused(tmp_path, json.dumps(content), "instances.json")
    del content["images"][0]["split"]
    assert "image id 9 has no 'split'" in refused(tmp_path, json.dumps(content), "instances.json")


def test_coco_json_is_validated(tmp_path: Path):
    content = coco()
    content["annotations"][0]["bbox"] = [30, 2, 20, 20]
    assert "outside the image of 40 x 30" in refused(tmp_path, json.dumps(content), "instances.json")
    assert "no list 'images'" in refused(tmp_path, json.dumps([1]), "instances.json")
    content = coco()
    content["images"][0]["file_name"] = "./4.jpg"
    assert "image id 4 (4.jpg) occurs twice" in refused(tmp_path, json.dumps(content), "instances.json")
