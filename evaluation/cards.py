"""What a report shows of each scan: its row in the table and, unfolded, its pictures, regions and warnings."""

from __future__ import annotations

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from evaluation.pictures import embed_picture
from evaluation.places import format_mm
from evaluation.regions import COMMON
from evaluation.results import Results
from evaluation.table import format_p

PICTURED = 60  # scans with pictures in the page, the selected ones first, so that it stays under 30 MB
SELECTED = 2  # of each outcome, shown above the table
OUTCOMES = {  # (label, flagged): what that is
    ("abnormal", True): "hit",
    ("abnormal", False): "miss",
    ("normal", True): "false positive",
    ("unlabelled", True): "flagged",
    ("", True): "flagged",
}
HEADS = {  # column of the table of scans: (what it sorts by first, its classes: numbers, dropped on narrow screens)
    "scan": ("ascending", ""),
    "label": ("ascending", ""),
    "score": ("descending", "number"),
    "p": ("ascending", "number"),
    "flagged": ("descending", ""),
    "worst slice": ("ascending", "less"),
    "regions": ("descending", "number less"),
    "largest, ml": ("descending", "number less"),
    "age": ("ascending", "number less"),
    "sex": ("ascending", "less"),
}


def list_columns(rows: list[dict]) -> list[dict]:
    """The columns of the table of scans; those of age and sex only where some are known."""
    names = [name for name in HEADS if name not in ("age", "sex") or any(row[name] is not None for row in rows)]
    return [{"name": name, "first": HEADS[name][0], "kind": HEADS[name][1]} for name in names]


def select_scans(rows: list[dict]) -> list[dict]:
    """A few scans of each outcome: hits of the highest scores, misses of the lowest, false positives of the highest.

    Where there are none of these, the scans of the highest scores.
    """
    falling = sorted(rows, key=lambda row: -row["score"])
    chosen = []
    for outcome in dict.fromkeys(OUTCOMES.values()):
        alike = [row for row in falling if name_outcome(row) == outcome]
        chosen += (alike[::-1] if outcome == "miss" else alike)[:SELECTED]
    return chosen or falling[:SELECTED]


def name_outcome(row: dict) -> str:
    """hit, miss, false positive, flagged, or not flagged."""
    return OUTCOMES.get((row["label"], bool(row["flagged"])), "not flagged")


def name_anchors(rows: list[dict]) -> list[str]:
    """`scan-abnormal-sub-01_T1w` of each row: a fragment for links, no two alike."""
    anchors, seen = [], Counter()
    for row in rows:
        anchor = re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(filter(None, ("scan", row["label"], row["scan"]))))
        seen[anchor] += 1
        anchors.append(f"{anchor}~{seen[anchor]}" if seen[anchor] > 1 else anchor)
    return anchors


def describe_scans(out: Path, rows: list[dict], results: Results, pictured: list[dict] | None = None) -> list[dict]:
    """What the page shows of each scan, in the order of the rows; pictures are those that lie in `out`.

    pictured  of a page of one scan: its pictures, {"alt", "kind", "source"}
    """
    regions = {}
    for region in results.regions:
        regions.setdefault((region["label"], region["scan"]), []).append(region)
    worst = {(row["label"], row["scan"]): row["slice"] for row in sorted(results.slices, key=lambda row: row["score"])}
    pictures = _find_pictures(out, rows, worst) if pictured is None else [pictured]
    scans = []
    for row, anchor, shown in zip(rows, name_anchors(rows), pictures, strict=True):
        key = row["label"], row["scan"]
        found, named = regions.get(key, []), results.worst_slices.get(key, f"slice {worst[key]}")
        scans.append(
            {
                "anchor": anchor,
                "key": key,
                "name": row["scan"],
                "subject": row["subject"],
                "label": row["label"],
                "flagged": int(row["flagged"]),
                "outcome": name_outcome(row),
                "score": f"{row['score']:.1f}",
                "p": format_p(row["p_value"]),
                "worst": named,
                "cells": _list_cells(row, worst[key], named, found),
                "warnings": results.warnings.get(key, ()),
                "pictures": shown,
                **_list_regions(found),
            }
        )
    return scans


def _list_cells(row: dict, worst: int, named: str, regions: list[dict]) -> dict[str, dict]:
    """{column of HEADS: what is shown, what it sorts by}; named: the worst slice in words."""
    largest = regions[0]["volume_ml"] if regions else 0.0
    cells = {
        "scan": (row["scan"], row["scan"]),
        "label": (row["label"], row["label"]),
        "score": (f"{row['score']:.2f}", f"{row['score']:.6g}"),
        "p": (format_p(row["p_value"]), f"{row['p_value']:.6g}"),
        "flagged": ("yes" if row["flagged"] else "no", int(row["flagged"])),
        "worst slice": (named, worst),
        "regions": (len(regions), len(regions)),
        "largest, ml": (f"{largest:.2f}", f"{largest:.6g}"),
        "age": ("", "") if row["age"] is None else (f"{row['age']:g}", row["age"]),
        "sex": (row["sex"] or "", row["sex"] or ""),
    }
    marked = {"flagged"} if row["flagged"] else set()
    return {name: {"text": text, "sort": sort, "marked": name in marked} for name, (text, sort) in cells.items()}


def _find_pictures(out: Path, rows: list[dict], worst: dict[tuple[str, str], int]) -> list[list[dict]]:
    """`_list_pictures` of each row, by all cores: they take most of a page's time."""
    first = [id(row) for row in select_scans(rows)]
    embedded = {id(row) for row in sorted(rows, key=lambda row: id(row) not in first)[:PICTURED]}
    with ThreadPoolExecutor() as pool:
        return list(
            pool.map(lambda row: _list_pictures(out, row, worst[row["label"], row["scan"]], id(row) in embedded), rows)
        )


def _list_pictures(out: Path, row: dict, worst: int, embedded: bool) -> list[dict]:
    """The panel of the worst slice and the montage, as far as they lie in `out`."""
    name, label = row["scan"], row["label"]
    words = f"{name} ({label}), its worst slice {worst}: slice, reconstruction, signed residual and anomaly map"
    pictures = [
        {"file": f"error_maps/{label}/{name}_slice_{worst:03d}.png", "alt": words, "kind": "worst"},
        {"file": f"montages/{label}/{name}.png", "alt": f"{name} ({label}), anomaly map over all slices", "kind": ""},
    ]
    return [
        picture | {"source": embed_picture(out / picture["file"]) if embedded else None}
        for picture in pictures
        if (out / picture["file"]).exists()
    ]


def _list_regions(regions: list[dict]) -> dict:
    """{"regions": the table of those that healthy scans hardly show, "ordinary": of the others}."""
    heads = ["no.", "volume, ml", "side", "centre x, y, z, mm", "highest at", "peak", "mean", "p"]
    heads += ["on a known lesion"] * any(region["on_lesion"] is not None for region in regions)
    tables = {"regions": [], "ordinary": []}
    for region in regions:
        place = f"z {format_mm(region['peak_z_mm'])} mm"
        if region["file_axis"]:
            place += f", {region['file_axis']} = {region['file_index']}"
        row = [
            region["number"],
            f"{region['volume_ml']:.2f}",
            region["side"],
            ", ".join(format_mm(region[f"{axis}_mm"]) for axis in "xyz"),
            place,
            f"{region['peak']:.1f}",
            f"{region['mean']:.1f}",
            format_p(region["p_value"]),
        ]
        row += [] if heads[-1] != "on a known lesion" else [{True: "yes", False: "no", None: ""}[region["on_lesion"]]]
        tables["ordinary" if region["p_value"] > COMMON else "regions"].append(row)
    return {name: {"heads": heads, "rows": rows} for name, rows in tables.items()}
