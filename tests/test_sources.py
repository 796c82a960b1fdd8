"""Files as people have them: packed, in other encodings, behind an address, beside others."""

import gzip
import json
import lzma

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
    splits = read_source(Source(str(name), **more))
    return {split: [row for _, row, _ in rows] for split, rows in splits.items()}


def put(path, content: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """The hub must never be asked."""

    def asked(name, *args, **kwargs):
        raise AssertionError(f"the hub was asked for {name}")

    monkeypatch.setattr("scripts.pairs.sources.load_dataset", asked)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(LINE, mtime=0)),
        ("A.Json.GZ", gzip.compress(LINE, mtime=0)),
        ("a.jsonl.xz", lzma.compress(LINE)),
        ("utf16.jsonl", LINE.decode().encode("utf-16")),
        ("array.jsonl", json.dumps([ROW], indent=1).encode()),
        ("lines.json", LINE),
        ("data.json", json.dumps({"data": [ROW]}, indent=1).encode()),
        ("pandas.json", json.dumps({k: {"0": v} for k, v in ROW.items()}).encode()),
        ("columns.json", json.dumps({k: [v] for k, v in ROW.items()}).encode()),
        ("excel.csv", "\ufeffprompt;chosen;rejected\r\nWhy?;So.;No.\r\n".encode()),
        ("a.TSV.gz", gzip.compress(b"prompt\tchosen\trejected\nWhy?\tSo.\tNo.\n", mtime=0)),
    ],
)
def test_a_file_is_read_whatever_it_is_packed_or_written_in(name, content, tmp_path):
    assert read(put(tmp_path / name, content)) == {"train": [ROW]}


def test_tables_are_read_from_parquet_and_arrow(tmp_path):
    table = Dataset.from_list([ROW])
    table.to_parquet(tmp_path / "a.parquet")
    feather.write_feather(table.data.table, tmp_path / "a.arrow")
    for name in ("a.parquet", "a.arrow"):
        assert list(read_file(tmp_path / name)) == [(f"{name}:1", ROW, "")]


def test_a_bad_line_is_named_and_the_others_are_read(tmp_path):
    path = put(tmp_path / "a.jsonl", LINE + b"\n{'no': 1}\n\xff\n[1]\n" + LINE)
    told = [(where, row is None, problem[:8]) for where, row, problem in read_file(path)]
    assert told == [
        ("a.jsonl:1", False, ""), ("a.jsonl:3", True, "not JSON"), ("a.jsonl:4", True, "not UTF-"),
        ("a.jsonl:5", True, "not an o"), ("a.jsonl:6", False, ""),
    ]  # fmt: skip


def test_a_bad_row_of_a_csv_is_named_and_shifts_no_other(tmp_path):
    path = put(
        tmp_path / "a.csv",
        b"prompt,chosen,rejected\nOh, so?,Yes.,No.\nWhy?,So.,No.,\n\nShort?,So.\n",
    )
    assert list(read_file(path)) == [
        ("a.csv:2", None, "4 cells in 3 columns"),
        ("a.csv:3", ROW, ""),
        ("a.csv:5", {"prompt": "Short?", "chosen": "So.", "rejected": None}, ""),
    ]


def test_one_row_of_messages_in_json_is_one_row_and_not_columns(tmp_path):
    row = {side: [{"role": "user", "content": "Why?"}] for side in ROW}
    for name in ("a.json", "a.jsonl"):
        assert read(put(tmp_path / name, json.dumps(row).encode())) == {"train": [row]}


def test_cells_of_a_csv_stay_text_and_an_empty_json_cell_is_null(tmp_path):
    path = put(tmp_path / "a.csv", b'prompt,chosen,rejected\n"1,\n2",NA,\n')
    assert list(read_file(path)) == [
        ("a.csv:3", {"prompt": "1,\n2", "chosen": "NA", "rejected": ""}, "")
    ]
    path = put(tmp_path / "a.jsonl", json.dumps(ROW | {"system": float("nan")}).encode())
    assert read(path)["train"] == [ROW | {"system": None}]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.xlsx", b"PK\x03\x04", r"a.xlsx is not one of .*save a spreadsheet as CSV"),
        ("a.zip", b"PK\x03\x04", "unpack an archive"),
        ("cut.jsonl.gz", gzip.compress(LINE * 99, mtime=0)[:-20], "damaged or cannot be read"),
        ("a.parquet", b"PAR1 not at all", "damaged or cannot be read"),
        ("a.json", b"{", "a.json is not valid JSON"),
        ("a.csv", b"prompt,chosen,prompt\nWhy?,So.,No.\n", "two columns 'prompt'"),
        ("a.csv", b'prompt,chosen\nWhy?,"So.\n', "a.csv:2 is not CSV: unexpected end"),
        (
            "a.csv",
            "prompt,chosen\nKäse?,So.\n".encode("cp1252"),
            "not UTF-8.*Excel: CSV UTF-8",
        ),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid 1\n", "git lfs pull"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_with_the_way_out(name, content, told, tmp_path):
    with pytest.raises(DataError, match=told):
        read(put(tmp_path / name, content))


def test_what_has_the_form_of_a_path_never_becomes_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "org" / "name", b"a file without a suffix")
    for name in ("org/name", "pairs.gz", "no.jsonl", "./no", "~nobody/no", "/no/such", "C:\\no"):
        with pytest.raises(DataError, match=r"there is no file or folder|is not one of"):
            read(name)
    assert local_path("org/name") is not None
    assert not looks_like_a_path("Intel/orca_dpo_pairs") and not looks_like_a_path("imdb")
    put(tmp_path / "mine" / "a.jsonl", LINE)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~/mine/a.jsonl") == {"train": [ROW]}


def test_a_folder_saved_by_datasets_is_read_of_one_split_or_several(tmp_path):
    one = Dataset.from_list([ROW])
    one.save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == {"train": [ROW]}
    DatasetDict({"train": one, "validation": one}).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "two") == {"train": [ROW], "test": [ROW]}
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"not arrow")
    with pytest.raises(DataError, match="cannot load dataset"):
        read(tmp_path / "one")


@pytest.mark.parametrize("name", ["validation", "dev"])
def test_a_validation_split_is_held_out_and_said(name, tmp_path, capsys):
    put(tmp_path / "train.jsonl", LINE)
    put(tmp_path / f"{name}.jsonl", LINE * 2)
    assert read(tmp_path) == {"train": [ROW], "test": [ROW] * 2}
    assert "is held out, as there is no 'test'" in capsys.readouterr().out
    put(tmp_path / "eval.jsonl", LINE)
    assert len(read(tmp_path)["test"]) == 1  # one by that name comes first
    assert "Splits not used: validation" in capsys.readouterr().out


def test_files_without_a_split_in_their_names_are_for_training(tmp_path, capsys):
    for language in ("de", "en"):
        put(tmp_path / language / "pairs.jsonl", LINE)
    splits = read_source(Source(str(tmp_path)))
    assert [where for where, *_ in splits.pop("train")] == ["de/pairs.jsonl:1", "en/pairs.jsonl:1"]
    assert splits == {} and capsys.readouterr().out == ""


def test_an_address_is_downloaded_each_time(loopback):
    served = {"/d/a%20b.jsonl": LINE, "/d/c.csv.gz": gzip.compress(b"prompt,chosen\n1,2\n")}
    url = loopback(lambda path, body: (200, {}, served[path.partition("?")[0]]))
    assert read(f"{url}/d/a%20b.jsonl?raw=true") == {"train": [ROW]}
    served["/d/a%20b.jsonl"] = LINE * 2
    assert read(f"{url}/d/a%20b.jsonl?raw=true") == {"train": [ROW] * 2}
    assert read(f"{url}/d/c.csv.gz")["train"] == [{"prompt": "1", "chosen": "2"}]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((404, {}, b"no"), "cannot download"),
        ((200, {"Content-Length": "999"}, LINE), "cannot download"),
        ((200, {}, b"\n<!DOCTYPE html><html>Sign in</html>"), "is a web page, not a data file"),
    ],
)
def test_a_download_that_fails_is_one_line(answer, told, loopback):
    url = loopback(lambda path, body: answer)
    with pytest.raises(DataError, match=told):
        read(f"{url}/a.jsonl")


def test_addresses_that_cannot_be_a_file_are_refused_before_they_are_asked():
    with pytest.raises(DataError, match="a page of the hub; set dataset_name=org/name"):
        read("https://huggingface.co/datasets/org/name/tree/main")
    with pytest.raises(DataError, match="is not one of"):
        read("http://127.0.0.1:9/download?id=7")
    with pytest.raises(DataError, match="dataset_name is not set"):
        read("")


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
    assert "NOT read: train.jsonl (" in capsys.readouterr().out
