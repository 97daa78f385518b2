"""A table is the same as text of any kind and as Excel, and one that would eat the memory is refused."""

import datetime
import struct
import zipfile

import openpyxl
import pytest

from common.cli import DataError
from preprocessing import spreadsheet
from preprocessing.clinical import read_clinical
from tests.tables import OASIS1, OASIS1_EXPECTED, make_scan, read_facts, read_labels, write

SEMICOLONS = OASIS1.replace(",", ";").replace(".", ",")
UMLAUT = OASIS1.replace("Hand", "Händigkeit")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("table.csv", SEMICOLONS),
        ("table.csv", SEMICOLONS.replace("\n", "\r\n")),
        ("table.csv", OASIS1.replace("\n", "\r")),
        ("table.csv", OASIS1.replace(",", "\t")),
        ("table.tsv", OASIS1),
        ("table.txt", OASIS1.replace(",", "|")),
        ("table.csv", "sep=;\n" + SEMICOLONS),
        ("table.csv", OASIS1.replace(",0.5,", ',"0,5",')),
        ("table.csv", UMLAUT.encode("latin-1")),
        ("table.csv", UMLAUT.encode("utf-8-sig")),
        ("table.csv", UMLAUT.encode("utf-16")),
        ("table.csv", UMLAUT.encode("utf-16-le")),
        ("table.csv", UMLAUT.encode("utf-16-be")),
        ("table.csv", b"\xfe\xff" + UMLAUT.encode("utf-16-be")),
        ("table.csv", UMLAUT.replace(",", "\t").encode("utf-32")),
        ("no header.csv", OASIS1.split("\n", 1)[1]),
        ("title.csv", "OASIS: cross-sectional, 2007\n\n" + OASIS1),
        ("trailing.csv", OASIS1.replace("\n", ",,\n")),
        ("index.csv", "".join(f"{n},{line}\n" for n, line in enumerate(OASIS1.splitlines())).replace("0,", ",", 1)),
        ("other names.csv", OASIS1.replace("ID,M/F", "MRI.ID,Gender").replace("OAS1_0001", "oas1-0001")),
        ("clinica.csv", OASIS1.replace("OAS1_0002_MR1", "sub-OASIS10002").replace("OAS1_0001_MR1", "OAS1_0001")),
        ("upper.csv", OASIS1.upper()),
        ("zeros.csv", OASIS1.replace("OAS1_0001_MR1", "OAS1_1_MR1")),
        ("neurite.csv", OASIS1.replace("OAS1_0", "OASIS_OAS1_0")),
        ("numbers.csv", OASIS1.replace("_MR1", "").replace("OAS1_000", "")),
    ],
)
def test_the_same_table_however_it_is_written(name, content, tmp_path):
    clinical = read_clinical(write(tmp_path, content, name))
    expected = [facts for facts in OASIS1_EXPECTED if facts[1] == "MR1"]
    scans = [make_scan(subject, session) for subject, session, *_ in expected]
    assert read_facts(clinical, scans) == [facts[2:] for facts in expected]


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"b\.csv: no such file"):
        read_clinical(tmp_path / "b.csv")
    with pytest.raises(DataError, match="is not a file"):
        read_clinical(tmp_path)


def test_excel_with_titles_merged_headers_numbers_and_dates(tmp_path):
    book = openpyxl.Workbook()
    book.active.append(["read me first"])
    sheet = book.create_sheet("visits")
    sheet.append(["The cohort of 2006"])
    sheet.append(["Subject", "Demographics", None, "Clinical"])
    sheet.append([None, "Age", "Sex", "CDR", "Visit date"])
    sheet.merge_cells("A2:A3")
    sheet.merge_cells("B2:C2")
    sheet.append([7, 70.5, "F", 0, datetime.datetime(2006, 5, 19)])
    sheet.append([7, 73, "F", 0.5, datetime.datetime(2008, 11, 19)])
    sheet.append([8.0, 61, "M", 1, None, None, "came late"])
    hidden = book.create_sheet("old")
    hidden.append(["Subject", "Age", "Sex", "CDR", "Session", "Visit date", "MMSE"])
    hidden.append([7, 1, "M", 3, "x", None, 1])
    hidden.sheet_state = "hidden"
    book.save(tmp_path / "table.xlsx")
    clinical = read_clinical(tmp_path / "table.xlsx")
    scans = [make_scan("p07", "20060601"), make_scan("p07", "2008-12-01"), make_scan("p8"), make_scan("p9")]
    assert read_facts(clinical, scans) == [
        ("normal", 70.5, "F"),
        ("abnormal", 73, "F"),
        ("abnormal", 61, "M"),
        (None, None, None),
    ]
    assert [row.name for row in clinical.rows["8"]] == ["8"]
    csv = write(tmp_path, (tmp_path / "table.xlsx").read_bytes(), "table.csv")  # the content counts, not the ending
    assert read_clinical(csv).rows == clinical.rows


def test_old_excel_files_are_read(tmp_path):
    def record(kind, content):
        return struct.pack("<HH", kind, len(content)) + content

    cells = [["IXI_ID", "SEX_ID (1=m, 2=f)", "AGE"], [2, 2, 35.8], [12, 1, 38.78]]
    stream = record(0x0009, struct.pack("<HH", 2, 0x10))  # BIFF2, as Excel 2 wrote it and today's reads it
    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            place = struct.pack("<HH3x", row, column)
            if isinstance(value, str):
                stream += record(0x0004, place + bytes([len(value)]) + value.encode())
            else:
                stream += record(0x0003, place + struct.pack("<d", value))
    clinical = read_clinical(write(tmp_path, stream + record(0x000A, b""), "IXI.xls"), needs_labels=False)
    assert read_facts(clinical, [make_scan("IXI002"), make_scan("IXI012")]) == [(None, 35.8, "F"), (None, 38.78, "M")]
    assert clinical.find(make_scan("IXI002")).name == "IXI002"


@pytest.mark.parametrize(
    ("limit", "value", "part", "words"),
    [
        ("MOST_BYTES", 100, b"<a/>", "MB"),
        ("MOST_UNPACKED_BYTES", 1e6, bytes(1_000_001), "1 MB unpacked"),
        ("MOST_MARKUP", 1000, b"<c/>" * 1001, "tags and attributes"),
        ("MOST_MARKUP", 1000, b"<c " + b'a="1" ' * 1001 + b"/>", "tags and attributes"),
        ("MOST_ROWS", 500_000, b"<c>" + b"x" * 600_000 + b"</c>", "one tag or cell"),
    ],
)
def test_a_spreadsheet_that_would_eat_the_memory_is_refused(limit, value, part, words, tmp_path, monkeypatch):
    monkeypatch.setattr(spreadsheet, limit, value)
    with zipfile.ZipFile(tmp_path / "table.xlsx", "w", zipfile.ZIP_DEFLATED) as parts:
        parts.writestr("xl/worksheets/sheet1.xml", part)
    with pytest.raises(DataError, match=rf"too large for a clinical table.*{words}.*keep only the columns ID"):
        read_clinical(tmp_path / "table.xlsx")


def test_text_that_would_eat_the_memory_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path, "ID,CDR\n" + "a,0\n" * 100)
    assert read_clinical(path)
    for limit in ("MOST_BYTES", "MOST_ROWS", "MOST_CELLS"):
        with monkeypatch.context() as patch:
            patch.setattr(spreadsheet, limit, 99)
            with pytest.raises(DataError, match="too large for a clinical table"):
                read_clinical(path)


def test_a_cell_far_out_does_not_fill_the_sheet_with_nothing(tmp_path):
    book = openpyxl.Workbook()
    for place, value in {(1, 1): "ID", (1, 2): "CDR", (2, 1): "a", (2, 2): 0, (2, 16384): "x", (3000, 1): "b"}.items():
        book.active.cell(*place).value = value
    book.save(tmp_path / "table.xlsx")
    assert read_labels(read_clinical(tmp_path / "table.xlsx")) == {"a": "normal", "b": None}
