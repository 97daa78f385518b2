"""What a page says in one line."""

from dataclasses import replace

from evaluation.words import summarise_scan
from tests.predictions import make_prediction


def summarise(*regions, verdict="unusual") -> str:
    """The summary of a scan with regions of (ml, p-value)."""
    regions = [{"volume_ml": volume, "p_value": p_value, "side": "left"} for volume, p_value in regions]
    made = make_prediction()
    row = made.scan_row | {"score": 12.34, "p_value": 0.04}
    return summarise_scan(replace(made, regions=regions, scan_row=row), verdict, 0.05)


def test_a_scan_in_one_line():
    assert summarise((9, 0.1)) == (
        "Unusual at a false-positive rate of 0.05: score 12.3, p 0.040; 1 region above the threshold, 9.00 ml, left."
    )
    assert summarise((9, 0.1), (2, 0.2), verdict="no verdict").startswith("No verdict at")
    assert summarise((9, 0.1), (2, 0.2)).endswith("; 2 regions above the threshold, the largest 9.00 ml, left.")
    assert summarise().endswith("; 0 regions above the threshold.")
    assert summarise((9, 0.3), (2, 0.1)).endswith(
        "; 1 region above the threshold, 2.00 ml, left; beside 1 that healthy scans commonly show."
    )
