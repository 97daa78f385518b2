"""report.html: an evaluation as one page that opens from disk with no network.

report.html.jinja is the page, report.css its style, report.js its script. The page holds its pictures and its viewers;
only the files listed at its end lie beside it.
"""

from __future__ import annotations

import base64
import html
import io
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import nibabel as nib
import numpy as np
from PIL import Image

from common.files import write_atomically
from evaluation.metrics import VOLUME_BINS
from evaluation.predictor import DETECTORS, Prediction
from evaluation.table import COLUMNS, describe_counts, format_figure
from preprocessing.scans import LABELS

if TYPE_CHECKING:
    from evaluation.results import Results

VIEWERS = 4  # of the scans with the highest scores; one takes up to 1 MB
PICTURED = 60  # scans with pictures in the page, the highest scores first, so that it stays under 30 MB
NAMES_LISTED = 12
REGIONS = 8  # listed for a scan; regions.csv has them all
HEADS = {  # column of the table of scans: (what it sorts by first, its classes: numbers, dropped on narrow screens)
    "scan": ("ascending", ""),
    "label": ("ascending", ""),
    "score": ("descending", "number"),
    "p": ("ascending", "number"),
    "flagged": ("descending", ""),
    "worst slice": ("ascending", "number less"),
    "regions": ("descending", "number less"),
    "largest, ml": ("descending", "number less"),
    "age": ("ascending", "number less"),
    "sex": ("ascending", "less"),
}
FILES = {
    "scores.csv": "a row a slice",
    "scans.csv": "a row a scan",
    "regions.csv": "connected regions above the calibrated threshold",
    "lesions.csv": f"a row a known lesion: found or not; volumes from {VOLUME_BINS[0]} to {VOLUME_BINS[-1]}",
    "metrics.json": "all figures with intervals and counts",
    "table.md": "the table of figures as Markdown",
    "table.tex": "the same for LaTeX",
    "montages": "a picture a scan",
    "error_maps": "panels of slices",
    "maps": "anomaly maps and masks as NIfTI",
    "bids": "the same as a BIDS derivative",
}


def write_report(
    out: Path, content: dict, results: Results, pictures: dict[str, str], viewers: dict[tuple[str, str], str]
) -> None:
    """Write `out`/report.html from metrics.json's content, the results and the pictures that lie in `out`.

    pictures: {file name: what it shows}; viewers: {(label, scan): page of `make_viewer`}.
    """
    ranked = sorted(results.scans, key=lambda row: -row["score"])
    places = {(row["label"], row["scan"]): place for place, row in enumerate(ranked)}
    # columns of age and sex only where some are known
    columns = [name for name in HEADS if name not in ("age", "sex") or any(row[name] is not None for row in ranked)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.jinja").render(
        title=f"Evaluation of {Path(content['run']).name}",
        about=f"{describe_counts(content)}. Data: {content['data']}. Run: {content['run']}.",
        notices=list_notices(results),
        results=list_results(content),
        labels=[label for label in LABELS if content["counts"][label]],
        columns=[{"name": name, "first": HEADS[name][0], "kind": HEADS[name][1]} for name in columns],
        scans=describe_scans(out, ranked, results, viewers),
        figures=[{"words": words, "source": embed(out / name)} for name, words in pictures.items()],
        files={name: words for name, words in FILES.items() if (out / name).exists() or name == "metrics.json"},
        viewers={places[key]: page for key, page in viewers.items()},
    )
    write_atomically(out / "report.html", page.encode(errors="backslashreplace"))


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


def embed(path: Path) -> str:
    """A picture as a data URL, as WebP: a quarter of the PNG, and no difference to see."""
    packed = io.BytesIO()
    Image.open(path).convert("RGB").save(packed, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(packed.getvalue()).decode()}"


def make_viewer(prediction: Prediction) -> str:
    """A page of its own: the anomaly map over the scan in three planes that follow the mouse (nilearn's `view_img`).

    Starts at the highest anomaly; what is below half the threshold is not drawn.
    """
    from nilearn.plotting import view_img  # here, because it is slow to import

    scan, threshold = prediction.scan, prediction.threshold
    affine = scan.geometry.stack_affine
    anomaly = np.nan_to_num(prediction.anomaly).transpose(2, 1, 0)
    peak = nib.affines.apply_affine(affine, np.unravel_index(anomaly.argmax(), anomaly.shape))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a map without anything above the threshold
        page = view_img(
            nib.Nifti1Image(anomaly, affine),
            bg_img=nib.Nifti1Image(scan.stack.astype(np.float32).transpose(2, 1, 0), affine),
            cut_coords=[float(place) for place in peak],
            threshold=threshold / 2,
            vmin=0,
            vmax=2 * threshold,
            cmap="inferno",
            symmetric_cmap=False,
            black_bg=True,
            title=html.escape(scan.name),  # nilearn does not escape it
        ).get_standalone()
    page = re.sub(r"<link[^>]*>", "", page)  # an icon from the network
    return re.sub(r"-[0-9a-f]{32}", "-1", page)  # a random name for its parts; the same scan gives the same page


def list_results(content: dict) -> list[dict]:
    """The tables of figures, of scans flagged, and of lesions by volume and kind: {"heads", "rows"} each."""
    names = [name for name in COLUMNS if name in content["figures"]["score"]]
    tables = []
    if names:
        rows = [
            [title, *(format_figure(content["figures"][detector].get(name)) for name in names)]
            for detector, title in DETECTORS.items()
        ]
        tables.append({"heads": ["", *(COLUMNS[name] for name in names)], "rows": rows})
    flagged = {f"{label} scans": content["flagged"].get(label) for label in LABELS}
    for what in ("sex", "age"):
        for group, count in content["flagged"].get(f"normal_by_{what}", {}).items():
            flagged[f"normal scans, {what} {group}"] = count
    heads = [f"flagged at a false-positive rate of {content['settings']['false_positive_rate']:g}",
             "share (exact 95 % interval)"]  # fmt: skip
    tables.append({"heads": heads, "rows": [[name, format_rate(count)] for name, count in flagged.items() if count]})
    for what, groups in content["detectability"].items():
        rows = [
            [group["group"], group["lesions"], *(format_figure(group[name]) for name in ("recall", "dice"))]
            for group in groups
        ]
        tables.append({"heads": [f"lesions by {what}", "how many", "share found", "mean Dice"], "rows": rows})
    return tables


def format_rate(count: dict) -> str:
    """`1 of 4: 0.25 (0.01–0.81)`."""
    share = count["flagged"] / count["scans"]
    return f"{count['flagged']} of {count['scans']}: {share:.2f} ({count['low']:.2f}–{count['high']:.2f})"


def describe_scans(out: Path, ranked: list[dict], results: Results, viewers: dict) -> list[dict]:
    """What the page's table shows of each scan: its row and, hidden until its name is chosen, pictures and regions."""
    worst = {(row["label"], row["scan"]): row["slice"] for row in sorted(results.slices, key=lambda row: row["score"])}
    regions = {}
    for region in results.regions:
        regions.setdefault((region["label"], region["scan"]), []).append(region)
    scans = []
    for place, row in enumerate(ranked):
        key = row["label"], row["scan"]
        found = regions.get(key, [])
        scans.append(
            {
                "place": place,
                "name": row["scan"],
                "subject": row["subject"],
                "label": row["label"],
                "flagged": int(row["flagged"]),
                "cells": _list_cells(row, worst[key], found),
                "viewer": key in viewers,
                "warnings": results.warnings.get(key, ()),
                "pictures": _list_pictures(out, row, worst[key], embedded=place < PICTURED),
                "regions": _list_regions(found[:REGIONS]),
                "smaller_regions": len(found) - REGIONS,
            }
        )
    return scans


def _list_cells(row: dict, worst: int, regions: list[dict]) -> dict[str, dict]:
    """{column of HEADS: what is shown, what it sorts by}."""
    largest = regions[0]["volume_ml"] if regions else 0.0
    cells = {
        "scan": (row["scan"], row["scan"]),
        "label": (row["label"], row["label"]),
        "score": (f"{row['score']:.2f}", f"{row['score']:.6g}"),
        "p": (f"{row['p_value']:.3f}", f"{row['p_value']:.6g}"),
        "flagged": ("yes" if row["flagged"] else "no", int(row["flagged"])),
        "worst slice": (worst, worst),
        "regions": (len(regions), len(regions)),
        "largest, ml": (f"{largest:.2f}", f"{largest:.6g}"),
        "age": ("", "") if row["age"] is None else (f"{row['age']:g}", row["age"]),
        "sex": (row["sex"] or "", row["sex"] or ""),
    }
    marked = {"flagged"} if row["flagged"] else set()
    return {name: {"text": text, "sort": sort, "marked": name in marked} for name, (text, sort) in cells.items()}


def _list_pictures(out: Path, row: dict, worst: int, embedded: bool) -> list[dict]:
    """The panel of the worst slice and the montage, as far as they lie in `out`."""
    name, label = row["scan"], row["label"]
    words = f"{name} ({label}), its worst slice {worst}: slice, reconstruction, signed residual and anomaly map"
    pictures = [
        {"file": f"error_maps/{label}/{name}_slice_{worst:03d}.png", "alt": words, "kind": "worst"},
        {"file": f"montages/{label}/{name}.png", "alt": f"{name} ({label}), anomaly map over all slices", "kind": ""},
    ]
    return [
        picture | {"source": embed(out / picture["file"]) if embedded else None}
        for picture in pictures
        if (out / picture["file"]).exists()
    ]


def _list_regions(regions: list[dict]) -> dict:
    rows = [
        [
            f"{region['volume_ml']:.2f} ml",
            region["side"],
            ", ".join(f"{region[f'{axis}_mm']:.0f}" for axis in "xyz"),
            f"{region['peak']:.1f}",
            f"{region['mean']:.1f}",
        ]
        for region in regions
    ]
    return {"heads": ["region", "side", "centre, mm", "peak", "mean"], "rows": rows}
