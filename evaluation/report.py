"""report.html: an evaluation, or one scan, as one page that opens from disk with no network.

report.html.jinja is the page, report.css its style, report.js and viewer.js its scripts; without them pictures and
tables are there all the same. The page holds its pictures and viewers; only the files listed at its end lie beside it.
"""

from __future__ import annotations

from pathlib import Path

import jinja2

from common.files import write_atomically
from evaluation.cards import describe_scans, list_columns, select_scans
from evaluation.metrics import VOLUME_BINS
from evaluation.panels import draw_montage
from evaluation.pictures import embed_figure, embed_picture
from evaluation.predictor import Prediction, Predictor
from evaluation.results import Results, ScanResult
from evaluation.table import describe_counts
from evaluation.viewer import describe_palette, pack_scan
from evaluation.words import describe_run, explain_terms, list_results, name_run, summarise, summarise_scan
from preprocessing.scans import LABELS

NAMES_LISTED = 12
MOST_SCANS = 1000  # in the page's table; a browser is slow with more
FILES = {
    "scores.csv": "a row a slice",
    "scans.csv": "a row a scan",
    "regions.csv": "the marked regions",
    "lesions.csv": f"a row a known lesion: found or not; volumes from {VOLUME_BINS[0]} to {VOLUME_BINS[-1]}",
    "metrics.json": "all figures with intervals and counts",
    "table.md": "the table of figures as Markdown",
    "table.tex": "the same for LaTeX",
    "montages": "a picture a scan",
    "error_maps": "panels of slices",
    "maps": "anomaly maps and masks as NIfTI",
    "bids": "the same as a BIDS derivative",
}
SCAN_FILES = {
    "map": "the anomaly map on the scan's own grid",
    "mask": "the voxels that are marked",
    "brain": "the brain that was extracted",
    "picture": "the worst slices",
    "record": "verdict, score, p-value and regions, for programs",
}


def write_report(
    out: Path,
    content: dict,
    results: Results,
    figures: dict[str, tuple[str, str]],
    viewers: dict[tuple[str, str], dict],
) -> None:
    """Write `out`/report.html from metrics.json's content, the results, and the pictures that lie in `out`.

    figures  {what it shows: (its PDF in `out`, SVG as a data URL)}
    viewers  {(label, scan): what `viewer.pack_scan` gives}
    """
    rows = sorted(results.scans, key=lambda row: -row["score"])
    selected = {id(row): place for place, row in enumerate(select_scans(rows))}
    left_out = sum(id(row) not in selected for row in rows[MOST_SCANS:])
    rows = rows[:MOST_SCANS] + [row for row in rows[MOST_SCANS:] if id(row) in selected]
    scans = describe_scans(out, rows, results)
    chosen = sorted((selected[id(row)], scan) for row, scan in zip(rows, scans, strict=True) if id(row) in selected)
    page = {
        "title": f"Evaluation of {name_run(content)}",
        "summary": summarise(content),
        "about": [f"{describe_counts(content)}.", *describe_run(content)],
        "notices": list_notices(results),
        "results": list_results(content),
        "terms": explain_terms(content),
        "labels": [label for label in LABELS if content["counts"].get(label)],
        "columns": list_columns(rows),
        "scans": scans,
        "left_out": left_out,
        "selected": [scan for _, scan in chosen],
        "figures": figures,
        "files": {name: words for name, words in FILES.items() if (out / name).exists() or name == "metrics.json"},
        "viewers": {scan["anchor"]: viewers[scan["key"]] for scan in scans if scan["key"] in viewers},
    }
    write_page(out / "report.html", page)


def write_scan_report(
    out: Path, prediction: Prediction, predictor: Predictor, verdict: str, warnings: list[str], files: dict[str, str]
) -> None:
    """Write the same page of one scan, without the figures of a test set.

    verdict   as it is printed
    warnings  what to know before trusting the scan
    files     {"map", "mask", "brain", "picture", "page", "record": names in `out`}; all but page and record are there
    """
    row, results = prediction.scan_row, Results({})
    results.add(ScanResult.of(prediction))
    results.warnings = {(row["label"], row["scan"]): warnings}
    calibration = {"normal_scans": predictor.calibration.normal_scans, "voxel_threshold": prediction.threshold}
    content = {
        "settings": {"false_positive_rate": predictor.false_positive_rate},
        "calibration": calibration,
        "coverage": {"keep": predictor.slices["keep"]} | results.describe_coverage(),
        "figures": {"score": {}},
        "detectability": {},
    }
    words = f"{prediction.scan.name}: slice, reconstruction, signed residual and anomaly map of its worst slices"
    pictures = [
        {"file": "", "alt": words, "kind": "worst", "source": embed_picture(out / files["picture"])},
        {"file": "", "alt": "anomaly map over all slices", "kind": "",
         "source": embed_figure(draw_montage(prediction, "all slices, from the lowest to the highest"))},
    ]  # fmt: skip
    scans = describe_scans(out, [row], results, pictures)
    page = {
        "title": prediction.scan.name,
        "summary": summarise_scan(prediction, verdict, predictor.false_positive_rate),
        "about": [f"Scan: {prediction.scan.source}."],
        "terms": explain_terms(content),
        "scans": scans,
        "files": {files[what]: words for what, words in SCAN_FILES.items() if what in files},
        "viewers": {scans[0]["anchor"]: pack_scan(prediction)},
    }
    nothing = {"notices": [], "results": [], "labels": [], "columns": [], "selected": [], "figures": {}, "left_out": 0}
    write_page(out / files["page"], nothing | page)


def write_page(path: Path, content: dict) -> None:
    """Write a page, whole or not at all, from what report.html.jinja asks for."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.jinja").render(palette=describe_palette(), **content)
    write_atomically(path, page.encode(errors="backslashreplace"))


def list_notices(results: Results) -> list[str]:
    """Notes that come before the figures."""
    unknown = results.name_unknown()
    if not unknown:
        return []
    more = f" and {len(unknown) - NAMES_LISTED} more" if len(unknown) > NAMES_LISTED else ""
    return [
        f"{len(unknown)} abnormal scans have no lesion mask and count for scan figures only, not slices and voxels: "
        f"{', '.join(unknown[:NAMES_LISTED])}{more}."
    ]
