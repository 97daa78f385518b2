"""Columns are found by their names or by what stands in them; a table without them is refused."""

import pytest

from common.cli import DataError
from preprocessing.clinical import read_clinical
from tests.tables import OASIS2, OASIS2_EXPECTED, make_scan, read_facts, write


def test_oasis2_without_its_header_and_with_its_columns_in_another_order(tmp_path):
    scans = [make_scan(subject, session) for subject, session, *_ in OASIS2_EXPECTED]
    lines = [line.split(",") for line in OASIS2.splitlines()]
    for text in (OASIS2.split("\n", 1)[1], "\n".join(",".join(reversed(line)) for line in lines)):
        assert read_facts(read_clinical(write(tmp_path, text)), scans) == [facts[2:] for facts in OASIS2_EXPECTED]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "cannot be read as a table .it is empty"),
        ("subject,colour\na,b\n", "needs one of the columns ID"),
        ("name,colour\na,b\n", "needs one of the columns ID.*its first line is name, colour; add a header line"),
        ("OAS1_0001_MR1,R,F,74,2,3,29,0,1344,0.743,1.306,N/A\n", "its first line is OAS1_0001_MR1, R, F, 74"),
        ("OAS1_0001_MR1,F,R,0,74\n", "its first line is OAS1_0001_MR1, F, R, 0, 74; add a header line"),
        ("ID,Age\nOAS1_0001_MR1,7\n", "none of the columns CDR"),
        ("ID,CDR\n", "but no lines"),
        ("ID,CDR\n,0\n", "no line has a name in ID"),
        ("ID,CDR,CDR\na,0,1\n", "two columns called CDR"),
        ("ID,CDR\na,0\nb,0,5\n", "line 3: has 3 cells, and the header 2.*separate it by semicolons"),
        ('ID,CDR\n"a,0\nb,1\n', "line 2: .*quotes are not closed"),
        (b"ID,CDR\na,\0\0\0\n", "is not text"),
        (b"\xff\xfea\0b", "cannot be read as a table.*save it as csv in UTF-8"),
        (b"PK\x03\x04 nothing", "cannot be read as a table.*save it as csv"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(2000), "cannot be read as a table.*save it as csv"),
        (b"<html><table><tr><td>ID</td></tr></table></html>", "one of the columns"),
    ],
)
def test_bad_tables_are_refused_in_one_line(content, words, tmp_path):
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=words) as error:
        read_clinical(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))
