"""Files as people have them: packed, in other encodings, behind an address, beside others."""

import bz2
import gzip
import json
import lzma
import time

import datasets
import pyarrow as pa
import pytest
from conftest import write_jsonl
from datasets import Dataset, DatasetDict
from pyarrow import feather

from scripts.base import local_path
from scripts.pairs.files import DataError, read_file
from scripts.pairs.sources import Source, looks_like_a_path, read_source

ROW = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
LINE = (json.dumps(ROW) + "\n").encode()


def read(name, **more) -> dict[str, list]:
    train, test = read_source(Source(str(name), **more))
    splits = {"train": train} | ({"test": test} if test is not None else {})
    return {split: [row for _, row, _ in rows] for split, rows in splits.items()}


def put(path, content: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Downloads go here; and the hub must never be asked."""
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "cache"))

    def asked(name, *args, **kwargs):
        raise AssertionError(f"the hub was asked for {name}")

    monkeypatch.setattr("scripts.pairs.sources.load_dataset", asked)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(LINE, mtime=0)),
        ("a.JSONL", LINE),
        ("A.Json.GZ", gzip.compress(LINE, mtime=0)),
        ("a.ndjson.bz2", bz2.compress(LINE)),
        ("a.jsonl.xz", lzma.compress(LINE)),
        ("packed all the same.jsonl", gzip.compress(LINE, mtime=0)),
        ("a.CSV", b"prompt,chosen,rejected\nWhy?,So.,No.\n"),
        ("semicolons.csv", b"prompt;chosen;rejected\r\nWhy?;So.;No.\r\n"),
        ("excel.csv", b"sep=;\r\nprompt;chosen;rejected\r\nWhy?;So.;No.\r\n"),
        ("tabs.csv", b"prompt\tchosen\trejected\nWhy?\tSo.\tNo.\n"),
        ("a.TSV.gz", gzip.compress(b"prompt\tchosen\trejected\nWhy?\tSo.\tNo.\n", mtime=0)),
        ("classic Mac.csv", b"prompt,chosen,rejected\rWhy?,So.,No.\r"),
        ("array.jsonl", json.dumps([ROW], indent=1).encode()),
        ("array of a line.jsonl", json.dumps([ROW]).encode()),
        ("pandas.json", json.dumps({k: {"0": v} for k, v in ROW.items()}).encode()),
        ("columns.json", json.dumps({k: [v] for k, v in ROW.items()}).encode()),
        ("utf16.csv", "prompt,chosen,rejected\nWhy?,So.,No.\n".encode("utf-16")),
        ("utf16.jsonl", LINE.decode().encode("utf-16")),
    ],
)
def test_a_file_is_read_whatever_it_is_packed_or_written_in(name, content, tmp_path):
    assert read(put(tmp_path / name, content)) == {"train": [ROW]}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_objects_of_several_lines_one_after_another_are_rows(name, tmp_path):
    rows = [ROW | {"n": n} for n in range(3)]
    path = put(tmp_path / name, b"\n".join(json.dumps(row, indent=2).encode() for row in rows))
    assert list(read_file(path)) == [(f"{name}:{n + 1}", row, "") for n, row in enumerate(rows)]


def test_one_row_of_messages_in_json_is_one_row_and_not_columns(tmp_path):
    row = {side: [{"role": "user", "content": "Why?"}] for side in ROW}
    for name in ("a.json", "a.jsonl"):
        assert read(put(tmp_path / name, json.dumps(row).encode())) == {"train": [row]}


def test_an_empty_cell_that_python_wrote_as_nan_is_a_null(tmp_path):
    row = ROW | {"system": float("nan")}
    for name, content in (("a.jsonl", row), ("a.json", [row])):
        path = put(tmp_path / name, json.dumps(content).encode())
        assert read(path)["train"] == [ROW | {"system": None}]


def test_the_file_format_of_arrow_is_read_as_its_stream_is(tmp_path):
    feather.write_feather(pa.Table.from_pylist([ROW]), tmp_path / "a.arrow")
    assert read(tmp_path / "a.arrow") == {"train": [ROW]}


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for language in ("de", "en"):
        put(tmp_path / language / "pairs.jsonl", LINE)
    rows, _ = read_source(Source(str(tmp_path)))
    assert [where for where, *_ in rows] == ["de/pairs.jsonl:1", "en/pairs.jsonl:1"]


def test_a_split_that_is_not_used_is_told(tmp_path, capsys):
    for name in ("train", "test", "validation"):
        put(tmp_path / f"{name}.jsonl", LINE)
    read(tmp_path)
    assert "Splits that are not used: validation" in capsys.readouterr().out


def test_windows_1252_is_read_and_said(tmp_path, capsys):
    text = "prompt;chosen;rejected\nWie heißt „Müller“?;Größe für Käse – 5 €.;Café, naïve.\n"
    rows = read(put(tmp_path / "a.csv", text.encode("cp1252")))["train"]
    assert rows[0]["prompt"] == "Wie heißt „Müller“?"
    assert rows[0]["chosen"] == "Größe für Käse – 5 €."
    assert "a.csv is not UTF-8 and is read as Windows-1252" in capsys.readouterr().out


@pytest.mark.parametrize(
    "raw",
    [
        "prompt,chosen,rejected\nПочему?,Так надо.,Нет.\n".encode("cp1251"),
        "prompt,chosen,rejected\nZażółć gęślą?,Tak są.,Nie.\n".encode("cp1250"),
        "prompt,chosen,rejected\n为什么?,因为.,不.\n".encode("gb18030"),
        "prompt,chosen,rejected\nKäse?,So.,".encode() + b"Na\xefve.\n",  # one bad byte in UTF-8
    ],
)
def test_what_is_neither_is_left_for_the_checks_to_find(raw, tmp_path):
    (row,) = read(put(tmp_path / "a.csv", raw))["train"] or [{}]
    assert "\ufffd" in "".join(map(str, row.values()))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.xlsx", b"PK\x03\x04", r"a.xlsx is .xlsx by its name.*save the sheet as CSV"),
        ("a.zip", b"PK\x03\x04", "unpack it"),
        ("a.txt", b"Why? So.", r"write it as one of .jsonl, .json"),
        ("pairs", LINE, "of no format by its name"),
        (
            "cut.jsonl.gz",
            gzip.compress(LINE * 99, mtime=0)[:-20],
            "damaged or cannot be read.*copy it anew",
        ),
        ("a.parquet", b"PAR1 not at all", "damaged, or no .parquet file"),
        ("a.json", b"{", "a.json is not valid JSON"),
        ("a.csv", b"prompt,chosen,rejected,chosen\nWhy?,So.,No.,\n", "two columns 'chosen'"),
        ("a.json", b'{"train": [{}], "test": [{}]}', r"several lists \(train, test\); write each"),
        ("a.json", b"3", "not a list of rows but int"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_with_the_way_out(name, content, told, tmp_path):
    with pytest.raises(DataError, match=told):
        read(put(tmp_path / name, content))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv"])
def test_a_git_lfs_pointer_is_told_as_one(name, tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    put(tmp_path / "folder" / name, pointer)
    for path in (tmp_path / "folder", tmp_path / "folder" / name):
        with pytest.raises(DataError, match=r"a Git-LFS pointer, not the data.*git lfs pull"):
            read(path)


def test_the_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    put(tmp_path / "mine" / "a.jsonl", LINE)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~/mine/a.jsonl") == {"train": [ROW]}


def test_what_has_the_form_of_a_path_never_becomes_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "org" / "name", b"a file without a suffix")
    begun = time.monotonic()
    put(tmp_path / "pairs.gz", gzip.compress(LINE))
    names = ("org/name", "pairs.gz", "no.jsonl", "./no", "~/no", "~nobody/no", "/no/such", "a/b/c")
    for name in (*names, "no.csv.gz", "C:\\no"):
        with pytest.raises(DataError, match=r"there is no file or folder|by its name"):
            read(name)
    assert time.monotonic() - begun < 2
    assert local_path("org/name") is not None
    assert not looks_like_a_path("Intel/orca_dpo_pairs") and not looks_like_a_path("imdb")


def test_a_folder_saved_by_datasets_is_read_of_one_split_or_several(tmp_path):
    one = Dataset.from_list([ROW])
    one.save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == {"train": [ROW]}
    DatasetDict({"train": one, "validation": one}).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "two") == {"train": [ROW], "test": [ROW]}
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"not arrow")
    with pytest.raises(DataError, match="cannot load dataset"):
        read(tmp_path / "one")


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_a_validation_split_is_held_out_and_said(name, tmp_path, capsys):
    put(tmp_path / "train.jsonl", LINE)
    put(tmp_path / f"{name}.JSONL.gz", gzip.compress(LINE * 2))
    assert read(tmp_path) == {"train": [ROW], "test": [ROW] * 2}
    assert "is held out, as there is no 'test'" in capsys.readouterr().out
    put(tmp_path / "eval.jsonl", LINE)
    assert len(read(tmp_path)["test"]) == 1  # one by that name comes first


def test_the_other_files_of_a_folder_are_told(tmp_path, capsys):
    for name in ("train.jsonl", "more.jsonl", "old.csv", "sheet.xlsx", "notes.md", ".hidden.jsonl"):
        put(tmp_path / name, LINE)
    assert read(tmp_path) == {"train": [ROW]}
    told = capsys.readouterr().out
    assert "read train.jsonl; NOT read: more.jsonl, old.csv, sheet.xlsx (" in told
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "old.csv").write_bytes(b"prompt,chosen,rejected\nWhy?,So.,No.\n")
    assert read(tmp_path) == {"train": [ROW, ROW]}  # without split names, all are for training
    assert "NOT read: sheet.xlsx (" in capsys.readouterr().out


def test_a_folder_of_one_kind_of_file_says_nothing(tmp_path, capsys):
    put(tmp_path / "data" / "train-00000.jsonl", LINE)
    put(tmp_path / "data" / "train-00001.jsonl", LINE)
    assert read(tmp_path) == {"train": [ROW, ROW]}
    assert capsys.readouterr().out == ""


def test_a_name_that_tells_two_splits_is_refused_and_the_files_own_name_comes_first(tmp_path):
    put(tmp_path / "test set" / "train.jsonl", LINE)
    put(tmp_path / "test set" / "dev.jsonl", LINE * 2)
    assert read(tmp_path) == {"train": [ROW], "test": [ROW] * 2}
    put(tmp_path / "train_and_test.jsonl", LINE)
    with pytest.raises(DataError, match=r"train_and_test.jsonl has test and train in its name"):
        read(tmp_path)


def test_a_folder_without_data_is_told(tmp_path):
    with pytest.raises(DataError, match=r"has nothing, and no file of .jsonl"):
        read(tmp_path)
    put(tmp_path / "a.xlsx", b"PK")
    with pytest.raises(DataError, match=r"has a.xlsx, and no file of .jsonl"):
        read(tmp_path)


def test_an_address_is_downloaded_each_time(loopback):
    served = {
        "/d/a%20b.jsonl": LINE,
        "/d/c.csv.gz": gzip.compress(b"prompt,chosen,rejected\n1,2,3\n"),
    }
    url = loopback(lambda path, body: (200, {}, served[path.partition("?")[0]]))
    assert read(f"{url}/d/a%20b.jsonl?raw=true") == {"train": [ROW]}
    served["/d/a%20b.jsonl"] = LINE * 2
    assert read(f"{url}/d/a%20b.jsonl?raw=true") == {"train": [ROW] * 2}
    assert read(f"{url}/d/c.csv.gz")["train"] == [{"prompt": "1", "chosen": "2", "rejected": "3"}]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((404, {}, b"no"), "the server said 404"),
        ((500, {}, b"no"), "the server said 500"),
        ((200, {"Content-Length": "999"}, LINE), "cannot download .*try again, or copy it here"),
        ((200, {}, b"\n<!DOCTYPE html><html>Sign in</html>"), "is a web page, not a data file"),
    ],
)
def test_a_download_that_fails_leaves_nothing_that_could_be_taken_for_data(
    answer, told, loopback, tmp_path
):
    url = loopback(lambda path, body: answer)
    with pytest.raises(DataError, match=told):
        read(f"{url}/a.jsonl")
    assert [f for f in (tmp_path / "cache").rglob("*") if f.is_file()] == []


def test_addresses_that_cannot_be_a_file_are_refused_before_they_are_asked():
    with pytest.raises(DataError, match="a page of the hub; set dataset_name=org/name"):
        read("https://huggingface.co/datasets/org/name/tree/main")
    with pytest.raises(DataError, match="of no format by its name"):
        read("http://127.0.0.1:9/download?id=7")
    with pytest.raises(DataError, match="names no file"):
        read("http://127.0.0.1:9/")
    with pytest.raises(DataError, match="dataset_name is not set"):
        read("")
    for name in ("http://127.0.0.1:9/a.jsonl", "http://127.0.0.1:9/" + 300 * "a" + ".jsonl"):
        with pytest.raises(DataError, match="cannot download"):
            read(name)
    with pytest.raises(DataError, match="is no address"):
        read("http://[::1/a.jsonl")


def test_a_download_that_finds_no_room_in_the_cache_is_told(loopback, tmp_path, monkeypatch):
    url = loopback(lambda path, body: (200, {}, LINE))
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(put(tmp_path / "file", b"")))
    with pytest.raises(DataError, match=r"cannot download.*Not a directory"):
        read(f"{url}/a.jsonl")


def test_rows_of_a_table_have_their_file_and_number(tmp_path):
    Dataset.from_list([ROW, ROW]).to_parquet(tmp_path / "a.parquet")
    assert [where for where, *_ in read_file(tmp_path / "a.parquet")] == [
        "a.parquet:1",
        "a.parquet:2",
    ]


def test_the_configs_of_a_data_card_are_named_where_one_must_be_chosen(tmp_path):
    card = "---\nconfigs:\n" + "".join(
        f"- {{config_name: {name}, data_files: {name}.jsonl}}\n" for name in ("one", "two")
    )
    put(tmp_path / "README.md", f"{card}---\n".encode())
    for name in ("one", "two"):
        put(tmp_path / f"{name}.jsonl", LINE)
    with pytest.raises(DataError, match=r"set dataset_config to one of \['one', 'two'\]"):
        read(tmp_path)
    assert read(tmp_path, config="two") == {"train": [ROW]}


def test_a_data_card_decides_which_files_are_read(tmp_path, capsys):
    write_jsonl(tmp_path / "mine.jsonl", [ROW])
    write_jsonl(tmp_path / "train.jsonl", [ROW] * 3)
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    (tmp_path / "README.md").write_text(card + "  - {split: train, path: mine.jsonl}\n---\n")
    assert read(tmp_path) == {"train": [ROW]}
    assert capsys.readouterr().out == ""
