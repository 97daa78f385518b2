"""From a scan's file to a verdict: score, p-value, regions, maps and a picture."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from common.cli import DataError, explain, log
from common.files import replace_when_whole, write_atomically, write_figure
from evaluation.input_check import explain_misfit, find_mismatches, is_seen
from evaluation.nifti import name_owner, read_owner, write_maps
from evaluation.panels import draw_panels
from evaluation.places import format_mm
from evaluation.predictor import Prediction, Predictor
from evaluation.regions import COMMON
from evaluation.report import write_scan_report
from evaluation.words import count_regions, explain_no_flag
from preprocessing.dicom import open_scan
from preprocessing.scans import spell
from preprocessing.store import LoadedScan
from preprocessing.strip import save_brain_mask
from preprocessing.worker import FORMAT, MOST_NAME_BYTES, CutSettings, cut_scan

SHOWN_APART_MM = 10  # between the slices of a picture of the worst ones
REGIONS_LISTED = 10
FILES = {  # what is left of a scan: endings
    "map": "_anomaly.nii.gz",
    "mask": "_mask.nii.gz",
    "brain": "_brain.nii.gz",
    "picture": ".png",
    "page": ".html",
    "record": ".json",
}
SEEN = "the model was trained or calibrated on this scan, so its score means nothing"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # other scans would fail too


@dataclass(frozen=True)
class ScanFiles:
    """Scans to predict, each with its brain mask or None, and how they are read.

    axes    where the stored axes point, for a header that does not say
    volume  which volume of a file with several, from 0
    bar     whether a progress bar is shown
    strip   whose brains are extracted, one of `scans.STRIP`; none where the model knows heads
    series  the number of the DICOM series, for a folder with several
    """

    files: list[tuple[Path, Path | None]]
    out: Path
    axes: str | None
    volume: int | None
    bar: bool
    strip: str = "auto"
    series: int | None = None


def predict_files(scans: ScanFiles, predictor: Predictor) -> tuple[int, dict]:
    """Take scans from their files to a verdict; returns (exit code, all that was found, as plain values)."""
    if predictor.slices["format"] != FORMAT:
        raise DataError(
            f"the model was trained on slices of version {predictor.slices['format']}, and scans are now cut as "
            f"version {FORMAT}; preprocess and train again"
        )
    scans.out.mkdir(parents=True, exist_ok=True)
    found, skipped, names = [], [], set()
    for path, mask in tqdm(scans.files, desc="predicting", unit="scan", disable=None if scans.bar else True):
        try:
            found.append(predict_file(path, mask, scans, predictor, names))
        except (DataError, OSError) as error:
            if len(scans.files) == 1 or getattr(error, "errno", None) in FULL:
                raise
            if isinstance(error, OSError):
                error = f"{error.filename or path}: {explain(error)}"
            log.warning("skipped %s", error)
            skipped.append({"file": str(path), "why": str(error)})
    if not found:
        raise DataError(f"{scans.files[0][0]}: not one of the {len(scans.files)} scans could be used; see above")
    asked = {"false_positive_rate": predictor.false_positive_rate, "normal_scans": predictor.calibration.normal_scans}
    return 3 if skipped else 0, asked | {"scans": found, "skipped": skipped}


def predict_file(path: Path, mask: Path | None, scans: ScanFiles, predictor: Predictor, names: set[str]) -> dict:
    """One scan's verdict, logged and returned; leaves its maps and a picture of its worst slices in `out`.

    names  names already used by this command; this scan's is added
    """
    for file in (path, mask):
        if file and not (file.is_file() or (file is path and file.is_dir())):
            why = "is not a regular file" if file.exists() else "no such file"
            raise DataError(f"{file}: {why}; give existing files with --scan and --brain-mask")
    slices = predictor.slices
    strip = scans.strip if slices["skull_off"] else "never"
    fov_mm = slices["size"] * slices["pixel_mm"]
    cut = CutSettings(slices["keep"], slices["size"], fov_mm, scans.volume, strip=strip)
    with open_scan(path, scans.series) as file:
        scan = replace(cut_scan(file, mask, cut, scans.axes), source=str(path))
    scan = replace(scan, name=choose_name(scan, scans.out, names))
    names.add(scan.name)
    seen = is_seen(scan, predictor)
    mismatches = [*scan.warnings, *find_mismatches(scan, predictor)]
    prediction = predictor.predict(scan, baselines=False)
    if prediction.misfit:
        mismatches.append(explain_misfit(prediction.misfit))
    write_maps(scans.out / scan.name, prediction)
    shown = choose_apart(prediction)
    row = prediction.scan_row
    title = f"{scan.name}: score {row['score']:.1f}, p {row['p_value']:.3f}; its worst slices"
    write_figure(scans.out / f"{scan.name}.png", draw_panels(prediction, shown, title))
    if scan.stripped:
        with replace_when_whole(scans.out / f"{scan.name}{FILES['brain']}") as partial:
            save_brain_mask(partial, scan.stripped.mask, scan.geometry.affine)
    files = {what: f"{scan.name}{end}" for what, end in FILES.items() if what != "brain" or scan.stripped}
    warnings = [SEEN] * seen + mismatches
    reason = explain_no_flag(predictor.false_positive_rate, predictor.calibration.normal_scans)
    verdict = "no verdict" if reason or seen else "unusual" if row["flagged"] else "not unusual"
    write_scan_report(scans.out, prediction, predictor, verdict, warnings, files)
    log_verdict(prediction, verdict, warnings, predictor)
    log.info("  %s in %s", ", ".join(files.values()), scans.out)
    record = {
        "file": str(path),
        "verdict": verdict,
        "score": row["score"],
        "p_value": row["p_value"],
        "threshold": prediction.threshold,
        "unlike_training": warnings,
        "regions": prediction.regions,
        "slices": [{key: prediction.slice_rows[i][key] for key in ("slice", "score")} for i in shown],
        "files": {what: str(scans.out / name) for what, name in files.items()},
    }
    write_atomically(scans.out / files["record"], json.dumps(record, indent=1).encode())
    return record


def log_verdict(prediction: Prediction, verdict: str, mismatches: list[str], predictor: Predictor) -> None:
    """Log one scan's verdict for a reader. Its mismatches come first, and are printed even with --quiet and --json."""
    row, regions, known = prediction.scan_row, prediction.regions, predictor.calibration.normal_scans
    log.info(prediction.scan.source)
    level = logging.INFO if log.isEnabledFor(logging.INFO) else logging.WARNING
    for mismatch in mismatches:
        log.log(level, "  %s%s", "" if mismatch == SEEN else "unlike what the model was trained on: ", mismatch)
    rate = predictor.false_positive_rate
    p_value = f"score {row['score']:.2f}, p = {row['p_value']:.3f} ({known} healthy validation scans)"
    log.info("  %s at a false-positive rate of %g: %s", verdict, rate, p_value)
    if reason := explain_no_flag(rate, known):
        log.info("  %s", reason)
    rare = [region for region in regions if region["p_value"] <= COMMON]
    common = f"{len(regions) - len(rare)} that healthy scans commonly show" if len(regions) > len(rare) else ""
    limit = f"of at least {predictor.smallest_ml:g} ml, at {prediction.threshold:.1f} times the scan's median or more"
    log.info("  %s %s%s", count_regions(rare), limit, common and f"; beside {common}")
    for region in rare[:REGIONS_LISTED]:
        place = ", ".join(format_mm(region[f"{axis}_mm"]) for axis in "xyz")
        size = f"{region['volume_ml']:6.2f} ml, {region['side']:6s} ({place}) mm, peak {region['peak']:.1f}"
        as_strong = round(region["p_value"] * (known + 1)) - 1
        log.info("    %s, as large and strong in %d of %d healthy scans", size, as_strong, known)
    if len(rare) > REGIONS_LISTED:
        log.info("    and %d smaller ones", len(rare) - REGIONS_LISTED)


def choose_name(scan: LoadedScan, out: Path, names: set[str]) -> str:
    """The name of a scan's files in `out`: the scan's, preceded by its folder's where another scan has such files.

    names  those of other scans of this command
    """
    for name in _list_names(scan):
        if len(name.encode()) > MOST_NAME_BYTES:
            raise DataError(f"{scan.source}: its name takes more than {MOST_NAME_BYTES} bytes; give it a shorter one")
        files = [out / f"{name}{ending}" for ending in FILES.values()]
        owner = name_owner(scan)
        if name not in names and (not any(map(os.path.lexists, files)) or (owner and read_owner(files[0]) == owner)):
            return name
    raise AssertionError("names never end")


def _list_names(scan: LoadedScan) -> Iterator[str]:
    """T1, anna_T1, site_anna_T1 ... for /data/site/anna/T1.nii.gz, and then T1_2, T1_3 ..."""
    name = scan.name
    yield name
    for folder in list(Path(os.path.abspath(scan.source)).parents)[:2]:
        if folder.name:
            name = f"{spell(folder.name)}_{name}"
            yield name
    yield from (f"{scan.name}_{number}" for number in itertools.count(2))


def choose_apart(prediction: Prediction, count: int = 4) -> list[int]:
    """The places of the worst slices, the worst of all first, with SHOWN_APART_MM between any two."""
    chosen, spacing_mm = [], prediction.scan.geometry.slice_spacing_mm
    for i in prediction.rank_slices():
        if all(abs(i - other) * spacing_mm >= SHOWN_APART_MM for other in chosen):
            chosen.append(i)
    return chosen[:count]
