"""The card of a scan holds what belongs to that scan."""

from types import SimpleNamespace

from evaluation.cards import describe_scans
from tests.test_report import make_row, write_picture


def test_a_picture_belongs_to_its_scan(tmp_path):
    rows = [make_row(scan, score) for scan, score in (("a", 3.0), ("b", 2.0), ("c", 1.0))]
    for row in rows:
        write_picture(tmp_path / f"montages/normal/{row['scan']}.png", (9, 9, 9))
    slices = [{"label": "normal", "scan": row["scan"], "slice": 8, "score": 1.0} for row in rows]
    results = SimpleNamespace(regions=[], slices=slices, worst_slices={}, warnings={})
    found = [(scan["name"], scan["pictures"][0]["file"]) for scan in describe_scans(tmp_path, rows, results)]
    assert found == [(name, f"montages/normal/{name}.png") for name in "abc"]
