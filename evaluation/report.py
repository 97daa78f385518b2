"""report.html: an evaluation as one page that opens from disk with no network.

The page holds its pictures, its script (page.html) and the viewers; only the files listed at its end lie beside it.
"""

from __future__ import annotations

import base64
import io
import json
import re
import warnings
from html import escape
from pathlib import Path
from urllib.parse import quote

import nibabel as nib
import numpy as np
from PIL import Image

from common.files import write_atomically
from evaluation.examiner import DETECTORS, Examined
from evaluation.maps import locate_stack
from evaluation.metrics import VOLUME_BINS
from evaluation.table import COLUMNS, describe_counts, format_figure
from preprocessing.scans import LABELS

VIEWERS = 4  # of the scans with the highest scores; one takes up to 1 MB
LARGE = 6  # worst slices shown large at the top
PICTURED = 60  # scans with pictures in the page, the highest scores first, so that it stays under 30 MB
REGIONS = 8  # listed for a scan; regions.csv has them all
SORTED = ' aria-sort="descending"'  # the column that the rows come sorted by
TEMPLATE = Path(__file__).with_name("page.html")
READING = (
    "Each row shows a slice, what the model makes of it, how much brighter or darker the slice is, and the anomaly map "
    "laid over the slice: how many times stronger the smoothed residual is than what healthy scans show at that place. "
    "Nose up, the subject's left on the left; grey was not scored; where a lesion is known, it is outlined in blue. "
    "The mark on the colour bar is the threshold calibrated on healthy scans."
)
HEADS = {  # column of the table: (what it sorts by first, whether narrow screens do without)
    "scan": ("ascending", False),
    "label": ("ascending", False),
    "score": ("descending", False),
    "p": ("ascending", False),
    "flagged": ("descending", False),
    "worst slice": ("ascending", True),
    "regions": ("descending", True),
    "largest, ml": ("descending", True),
    "age": ("ascending", True),
    "sex": ("ascending", True),
}


def write_report(
    out: Path,
    content: dict,
    scans: list[dict],
    slices: list[dict],
    regions: list[dict],
    pictures: dict[str, str],
    viewers: dict[tuple[str, str], str],
) -> None:
    """Write `out`/report.html from what metrics.json and the tables hold and from the pictures that lie in `out`.

    pictures: {file name: what it shows}; viewers: {(label, scan): page} of `make_viewer`.
    """
    worst = {}
    for row in sorted(slices, key=lambda row: row["score"]):
        worst[row["label"], row["scan"]] = row["slice"]
    found = {}
    for region in regions:
        found.setdefault((region["label"], region["scan"]), []).append(region)
    ranked = sorted(scans, key=lambda row: -row["score"])
    keys = [(row["label"], row["scan"]) for row in ranked]
    # age and sex have a column where somebody's is known
    columns = [name for name in HEADS if name not in ("age", "sex") or any(row[name] is not None for row in scans)]
    rows = [
        _make_row(columns, out, place, row, worst[key], found.get(key, []), key in viewers)
        for place, (key, row) in enumerate(zip(keys, ranked, strict=True))
    ]
    parts = {
        "title": escape(f"Evaluation of {Path(content['run']).name}"),
        "about": escape(f"{describe_counts(content)}. Data: {content['data']}. Run: {content['run']}."),
        "results": _make_results(content),
        "reading": escape(READING),
        "labels": "".join(f"<option>{label}</option>" for label in LABELS if content["counts"][label]),
        "heads": "".join(
            f'<th scope="col" data-first="{first}"{_class(name)}{SORTED if name == "score" else ""}>'
            f'<button type="button">{name}</button></th>'
            for name, (first, _) in HEADS.items()
            if name in columns
        ),
        "rows": "\n".join(rows),
        "figures": "\n".join(
            f'<figure><img loading="lazy" alt="{escape(words)}" src="{embed(out / name)}">'
            f"<figcaption>{escape(words)}</figcaption></figure>"
            for name, words in pictures.items()
        ),
        "files": "\n".join(_list_files(out)),
        "viewers": "\n".join(
            f'<script type="application/json" id="viewer-{keys.index(key)}">{_make_json(page)}</script>'
            for key, page in viewers.items()
        ),
        "large": str(LARGE),
    }
    pieces = re.split(r"\{\{(\w+)\}\}", TEMPLATE.read_text(encoding="utf-8"))
    page = "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))
    write_atomically(out / "report.html", page.encode())


def embed(path: Path) -> str:
    """A picture as a data URL, as WebP: a quarter of the PNG, and no difference to see."""
    packed = io.BytesIO()
    Image.open(path).convert("RGB").save(packed, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(packed.getvalue()).decode()}"


def make_viewer(examined: Examined, threshold: float) -> str:
    """A page of its own: the anomaly map over the scan in three planes that follow the mouse (nilearn's `view_img`).

    Starts at the highest anomaly; what is below half the threshold is not drawn.
    """
    from nilearn.plotting import view_img  # here, because it is slow to import

    scan = examined.scan
    affine = locate_stack(scan.record)
    anomaly = np.nan_to_num(examined.maps["score"]).transpose(2, 1, 0)
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
            title=scan.name,
        ).get_standalone()
    page = re.sub(r"<link[^>]*>", "", page)  # an icon from the network
    return re.sub(r"-[0-9a-f]{32}", "-1", page)  # a random name for its parts; the same scan gives the same page


def _make_results(content: dict) -> str:
    """The table of figures, how many scans were flagged, and lesions by volume and kind."""
    names = [name for name in COLUMNS if name in content["figures"]["score"]]
    parts = []
    if names:
        rows = [
            [title, *(format_figure(content["figures"][detector].get(name)) for name in names)]
            for detector, title in DETECTORS.items()
        ]
        parts.append(_make_table(["", *(COLUMNS[name] for name in names)], rows))
    asked, flagged = content["settings"]["false_alarms"], []
    for label in LABELS:
        if count := content["flagged"].get(label):
            flagged.append([f"{label} scans", _format_rate(count)])
    for what in ("sex", "age"):
        for group, count in content["flagged"].get(f"normal_by_{what}", {}).items():
            flagged.append([f"normal scans, {what} {group}", _format_rate(count)])
    parts.append(_make_table([f"flagged at a false-alarm rate of {asked:g}", "share (exact 95 % interval)"], flagged))
    for what, groups in content["detectability"].items():
        rows = [
            [group["group"], str(group["lesions"]), *(format_figure(group[name]) for name in ("recall", "dice"))]
            for group in groups
        ]
        parts.append(_make_table([f"lesions by {what}", "how many", "share found", "mean Dice"], rows))
    return "\n".join(parts)


def _format_rate(count: dict) -> str:
    share = count["flagged"] / count["scans"]
    return f"{count['flagged']} of {count['scans']}: {share:.2f} ({count['low']:.2f}–{count['high']:.2f})"


def _make_table(heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for first, *cells in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _make_row(
    columns: list[str], out: Path, place: int, row: dict, worst: int, regions: list[dict], viewer: bool
) -> str:
    """A scan in the table: its row and, hidden until its name is chosen, the row with its pictures and regions."""
    name, label = row["scan"], row["label"]
    largest = regions[0]["volume_ml"] if regions else 0.0
    cells = {  # what is shown, what it sorts by
        "scan": (escape(name), name),
        "label": (label, label),
        "score": (f"{row['score']:.2f}", row["score"]),
        "p": (f"{row['p_value']:.3f}", row["p_value"]),
        "flagged": ('<span class="flag">yes</span>' if row["flagged"] else "no", int(row["flagged"])),
        "worst slice": (str(worst), worst),
        "regions": (str(len(regions)), len(regions)),
        "largest, ml": (f"{largest:.2f}", largest),
        "age": ("", "") if row["age"] is None else (f"{row['age']:g}", row["age"]),
        "sex": (row["sex"] or "", row["sex"] or ""),
    }
    shown, sorts = cells["scan"]
    head = (
        f'<th scope="row" data-value="{escape(sorts)}"><button type="button" class="name" aria-expanded="false" '
        f'aria-controls="detail-{place}">{shown}</button></th>'
    )
    line = "".join(
        f'<td{_class(column)} data-value="{_plain(value)}">{text}</td>'
        for column, (text, value) in cells.items()
        if column in columns[1:]
    )
    return (
        f'<tbody data-find="{escape(name)} {escape(row["subject"])}" data-label="{label}" '
        f'data-flagged="{int(row["flagged"])}"><tr>{head}{line}</tr>'
        f'<tr class="detail" id="detail-{place}" hidden><td colspan="{len(columns)}">'
        f"{_make_detail(out, place, row, worst, regions, viewer)}</td></tr></tbody>"
    )


def _make_detail(out: Path, place: int, row: dict, worst: int, regions: list[dict], viewer: bool) -> str:
    name, label = row["scan"], row["label"]
    parts = []
    if viewer:
        parts.append(
            f'<button type="button" class="viewer" data-viewer="viewer-{place}" data-title="{escape(name)}: anomaly '
            'map over the scan in three planes">Open the three-plane viewer</button>'
        )
    panel = f"error_maps/{label}/{name}_slice_{worst:03d}.png"
    montage = f"montages/{label}/{name}.png"
    words = f"{name} ({label}), its worst slice {worst}: slice, reconstruction, signed residual and anomaly map"
    for file, alt, kind in ((panel, words, "worst"), (montage, f"{name} ({label}), anomaly map over all slices", "")):
        if not (out / file).exists():
            continue
        if place < PICTURED:
            picture = f'<img loading="lazy" class="{kind}" alt="{escape(alt)}" src="{embed(out / file)}">'
            parts.append(f'<div class="wide">{picture}</div>')
        else:
            parts.append(f'<p><a href="{_link(file)}">{escape(alt)}</a></p>')
    if regions:
        rows = [
            [
                f"{region['volume_ml']:.2f} ml",
                region["side"],
                ", ".join(f"{region[f'{axis}_mm']:.0f}" for axis in "xyz"),
                f"{region['peak']:.1f}",
                f"{region['mean']:.1f}",
            ]
            for region in regions[:REGIONS]
        ]
        parts.append(_make_table(["region", "side", "centre, mm", "peak", "mean"], rows))
        if len(regions) > REGIONS:
            parts.append(f'<p class="soft">and {len(regions) - REGIONS} smaller ones, in regions.csv</p>')
    return f'<div class="held">{"".join(parts)}</div>'


def _list_files(out: Path) -> list[str]:
    about = {
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
    there = [name for name in about if (out / name).exists() or name == "metrics.json"]  # written last
    return [f'<li><a href="{name}">{name}</a>: {escape(about[name])}</li>' for name in there]


def _class(column: str) -> str:
    kinds = ["number"] * (column not in ("scan", "label", "flagged", "sex")) + ["less"] * HEADS[column][1]
    return f' class="{" ".join(kinds)}"' if kinds else ""


def _link(file: str) -> str:
    return escape(quote(file))


def _plain(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else escape(str(value))


def _make_json(text: str) -> str:
    """As JSON that may stand within a script element: no `<` can end it."""
    return json.dumps(text).replace("<", "\\u003c")
