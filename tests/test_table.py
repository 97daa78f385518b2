"""The table of metrics says what the metrics say, as Markdown and as LaTeX."""

import pytest

from evaluation.table import describe_counts, format_figure, format_latex, format_markdown

DETECTORS = ("score", "mse", "bright", "dark", "deviation")


def make_metric(value: float) -> dict:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def make_metrics(first: float, lesions: int = 7) -> dict:
    """metrics.json of a test set: each detector's voxel AP one hundredth above that of the one before."""
    figures = {name: {"voxel_ap": make_metric(first + 0.01 * i)} for i, name in enumerate(DETECTORS)}
    figures["score"] |= {"best_dice": make_metric(0.7), "dice": make_metric(0.6), "slice_auroc": make_metric(0.8)}
    figures["score"] |= {"scan_auroc": make_metric(0.9)}
    counts = {"normal": 3, "abnormal": 2, "lesions": lesions, "slices": 40, "subjects": 4}
    return {"figures": figures, "counts": counts}


def test_markdown():
    lines = format_markdown({"one": make_metrics(0.2), "two": make_metrics(0.5)}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:9]]
    assert cells[0] == ["", "voxel AP", "best Dice (threshold by the labels)", "Dice as marked", "slice AUROC",
                        "scan AUROC"]  # fmt: skip
    assert lines[1] == "|---|---|---|---|---|---|"
    assert [(row[0], row[1]) for row in cells[2:]] == [
        ("intensity threshold, bright", "0.220 (0.120–0.320)"),
        ("intensity threshold, dark", "0.230 (0.130–0.330)"),
        ("z-score of intensity", "0.240 (0.140–0.340)"),
        ("one, anomaly map", "0.200 (0.100–0.300)"),
        ("one, plain MSE", "0.210 (0.110–0.310)"),
        ("two, anomaly map", "0.500 (0.400–0.600)"),
        ("two, plain MSE", "0.510 (0.410–0.610)"),
    ]
    assert cells[5][2:] == ["0.700 (0.600–0.800)", "0.600 (0.500–0.700)", "0.800 (0.700–0.900)", "0.900 (0.800–1.000)"]
    assert cells[6][2:] == [""] * 4, "what could not be measured is left empty"
    assert lines[9:] == ["", describe_counts(make_metrics(0.2)) + "."]


def test_latex():
    text = format_latex({"a_b": make_metrics(0.2)})
    lines = text.splitlines()
    assert lines[0] == f"% {describe_counts(make_metrics(0.2))}"
    assert lines[1:3] == [r"\begin{tabular}{lccccc}", r"\toprule"]
    assert lines[4] == r"\midrule"
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    assert lines[5] == r"intensity threshold, bright & 0.220 (0.120--0.320) &  &  &  &  \\"
    assert lines[8].startswith(r"a\_b, anomaly map & 0.200 (0.100--0.300) & 0.700 ")
    assert all(line.count("&") == 5 for line in [lines[3], *lines[5:-2]])
    names = "50 % & #1 {x} $y \\z"
    assert r"50 \% \& \#1 \{x\} \$y \textbackslash " in format_latex({names: make_metrics(0.2)})


def test_counts_in_words():
    words = "3 normal and 2 abnormal scans with 7 lesions, 40 slices, 4 subjects; 95 % intervals over subjects"
    assert describe_counts(make_metrics(0.2)) == words
    assert describe_counts(make_metrics(0.2, lesions=0)) == words.replace(" with 7 lesions", "")


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (None, ""),
        (make_metric(0.25), "0.250 (0.150–0.350)"),
        ({"value": 1.0, "low": 1.0, "high": 1.0}, "1.000"),
        ({"value": 0.5, "low": float("nan"), "high": float("nan")}, "0.500"),
    ],
)
def test_a_metric_in_words(figure, text):
    assert format_figure(figure) == text


def test_a_name_stays_in_its_cell():
    name = "a|b\n![x](http://x) <img src=x> `c` *d* \\e & 50% $f$ #{g} ~^"
    markdown = format_markdown({name: make_metrics(0.2)})
    (line,) = [line for line in markdown.splitlines() if "anomaly map" in line]
    escaped = "| a\\|b !\\[x\\](http://x) \\<img src=x\\> \\`c\\` \\*d\\* \\\\e & 50% $f$ #{g} ~^, anomaly map |"
    assert line.startswith(escaped)
    latex = format_latex({name: make_metrics(0.2)})
    (line,) = [line for line in latex.splitlines() if "anomaly map" in line]
    for raw, wanted in (("50%", r"50\%"), ("$f$", r"\$f\$"), (" & 50", r" \& 50"), ("#{g}", r"\#\{g\}")):
        assert wanted in line
        assert raw not in line.replace(wanted, "")
