"""What a report says in words and in tables: its summary, its terms, its figures."""

from __future__ import annotations

from pathlib import Path

from evaluation.metrics import FOUND_SHARE
from evaluation.predictor import DETECTORS, Prediction
from evaluation.regions import COMMON, EXTENT
from evaluation.table import COLUMNS, format_figure, format_p
from models.calibration import VOXELS_FLAGGED, count_needed_scans
from preprocessing.scans import LABELS

UNRECORDED = "its training set is not recorded: there is no config.json beside model.pt"


def summarise(content: dict) -> str:
    """What was tested, how many were flagged and how good it is, in one line; content is that of metrics.json."""
    flagged, figures = content["flagged"], content["figures"]["score"]
    known = {label: flagged[label] for label in LABELS if label in flagged}
    counts = [f"{count['flagged']} of {count['scans']} {label}" for label, count in known.items()]
    rate = content["settings"]["false_positive_rate"]
    asked = f"where at most {100 * rate:g} % of healthy ones should be"
    parts = [f"{' and '.join(reversed(counts))} scans are flagged, {asked}"]
    if groups := content["detectability"].get("volume"):
        found = sum(round(group["recall"]["value"] * group["lesions"]) for group in groups if group["lesions"])
        lesions = sum(group["lesions"] + group["not_scored"] for group in groups)
        parts.append(f"{found} of {lesions} known lesions are found")
    if "voxel_ap" in figures:
        chance = f", chance {figures['prevalence']:.3f}" if "prevalence" in figures else ""
        parts.append(f"voxel average precision is {figures['voxel_ap']['value']:.3f}{chance}")
    return "; ".join(parts) + "."


def describe_run(content: dict) -> list[str]:
    """What was evaluated, when and with what, a line each; lines whose facts are not in metrics.json are left out."""
    lines = [f"Data: {content['data']}. Run: {content['run']}."]
    if origin := content.get("origin"):
        training = origin["training"]
        trained = UNRECORDED
        if training:
            trained = (
                f"trained on {training['train_subjects']} subjects and validated on {training['val_subjects']} of "
                f"{', '.join(training['data'])}, {training['steps']} steps"
            )
        versions = ", ".join(f"{name} {number}" for name, number in origin["versions"].items())
        calibrated = f"calibrated on {content['calibration']['normal_scans']} healthy scans"
        lines.append(f"Model: {trained}; {calibrated}.")
        lines.append(f"Made {origin['date']}, commit {origin['commit'] or 'unknown'}, {versions}.")
    return lines


def explain_terms(content: dict) -> dict[str, str]:
    """{term: what it is in this report, in a line}."""
    calibration, figures = content["calibration"], content["figures"]["score"]
    rate, known = content["settings"]["false_positive_rate"], calibration["normal_scans"]
    terms = {
        "anomaly": "how many times stronger the smoothed residual is than expected of healthy scans at that place and "
        "for that texture, in units of the scan's median",
        "threshold": f"an anomaly of {calibration['voxel_threshold']:.3g}: {100 * VOXELS_FLAGGED:g} % of the brains of "
        f"{known} healthy validation scans lie above it; no label of this test set was used",
        "marked": "what is connected at or above the threshold is a region; it is marked down to "
        f"{100 * EXTENT:g} % of its highest anomaly, since the map's smoothing spreads what is strong; "
        "volumes are of what is marked",
        "p": "the share of healthy validation scans that score at least as high as the scan, itself counted in; the "
        f"least possible is 1/{known + 1} = {1 / (known + 1):.3f}; a scan is flagged where p ≤ {rate:g}",
    }
    terms["p of a region"] = (
        "the same for the largest mass of a region anywhere in a scan: volume times mean of all of it that is above "
        f"the threshold; regions with p > {COMMON:g} are common in healthy scans and folded away"
    )
    if content["detectability"]:
        terms["found"] = f"a lesion is found if at least {100 * FOUND_SHARE:g} % of it is marked"
    if figures:
        terms["chance level"] = (
            "what scores at random would have: for voxel AP the lesions' share of the scored brain, for AUROC 0.5"
        )
        terms["baselines"] = (
            "plain reconstruction error: the model's squared error without calibration; intensity threshold: the "
            "brain's brightest or darkest voxels; z-score: how far the intensity is from healthy scans' there. The "
            "last three need no model"
        )
        terms["95 % intervals"] = (
            "shares: exact (Clopper-Pearson); all else: bootstrap over subjects, and none where that did not vary"
        )
    if coverage := content.get("coverage"):
        terms["coverage"] = describe_coverage(coverage)
    return terms


def describe_coverage(coverage: dict) -> str:
    """How much of the brain is not scored, and which lesions are missed for it."""
    words = f"the middle {100 * coverage['keep']:.0f} % of the axial slices are scored"
    if coverage["unscored_share"] is None:
        words += "; how much of the brain lies outside them was not recorded when these scans were sliced"
    else:
        words += f"; {100 * coverage['unscored_share']:.1f} % of the brain's voxels lie outside them"
        words += f" (mean of {coverage['scans']} scans)" * (coverage["scans"] > 1)
    if coverage["lesions"]:
        words += f", and so do {coverage['lesions']} lesions, which count as missed in a column of their own"
    if coverage["unrecorded"]:
        words += f"; of {coverage['unrecorded']} scans it is not known whether lesions do"
    return words


def list_results(content: dict) -> list[dict]:
    """The tables of figures, of scans flagged, and of lesions by volume and kind: {"heads", "rows"} each."""
    figures = content["figures"]
    names = [name for name in COLUMNS if name in figures["score"]]
    tables = []
    if names:
        rows = [
            [title, *(format_figure(figures[detector].get(name)) for name in names)]
            for detector, title in DETECTORS.items()
        ]
        chance = list_chances(figures["score"].get("prevalence"))
        rows.append(["chance level", *(chance.get(name, "") for name in names)])
        tables.append({"heads": ["", *(COLUMNS[name] for name in names)], "rows": rows})
    flagged = {f"{label} scans": content["flagged"].get(label) for label in LABELS}
    for what in ("sex", "age"):
        for group, count in content["flagged"].get(f"normal_by_{what}", {}).items():
            flagged[f"normal scans, {what} {group}"] = count
    heads = [f"flagged at a false-positive rate of {content['settings']['false_positive_rate']:g}",
             "share (exact 95 % interval)"]  # fmt: skip
    tables.append({"heads": heads, "rows": [[name, format_rate(count)] for name, count in flagged.items() if count]})
    unknown = content["coverage"]["unrecorded"] > 0  # in slices of older versions
    for what, groups in content["detectability"].items():
        rows = [
            [
                group["group"],
                group["lesions"],
                *(format_figure(group[name]) for name in ("recall", "dice")),
                f"{group['not_scored'] or 'not recorded'}{' or more' * bool(group['not_scored'])}"
                if unknown
                else group["not_scored"],
            ]
            for group in groups
        ]
        heads = [f"lesions by {what}", "scored", "share found", "mean Dice", "outside the scored slices: missed"]
        tables.append({"heads": heads, "rows": rows})
    return tables


def list_chances(prevalence: float | None) -> dict[str, str]:
    """{figure of COLUMNS: what scores at random would have}."""
    chances = {"slice_auroc": "0.500", "scan_auroc": "0.500"}
    if prevalence is not None:
        # the best that can be had without knowing anything is to flag the whole brain
        chances |= {"voxel_ap": f"{prevalence:.3f}", "best_dice": f"{2 * prevalence / (1 + prevalence):.3f}"}
    return chances


def format_rate(count: dict) -> str:
    """`1 of 4: 0.25 (0.01–0.81)`."""
    share = count["flagged"] / count["scans"]
    return f"{count['flagged']} of {count['scans']}: {share:.2f} ({count['low']:.2f}–{count['high']:.2f})"


def name_run(content: dict) -> str:
    return Path(content["run"]).name


def summarise_scan(prediction: Prediction, verdict: str, false_positive_rate: float) -> str:
    """The verdict on one scan and what was found in it that healthy scans seldom show, in one line."""
    row, regions = prediction.scan_row, prediction.regions
    rare = [region for region in regions if region["p_value"] <= COMMON]
    words = f"{verdict.capitalize()} at a false-positive rate of {false_positive_rate:g}: "
    words += f"score {row['score']:.1f}, p {format_p(row['p_value'])}; {count_regions(rare)} above the threshold"
    largest = "the largest " * (len(rare) > 1)
    words += f", {largest}{rare[0]['volume_ml']:.2f} ml, {rare[0]['side']}" if rare else ""
    common = len(regions) - len(rare)
    return f"{words}; beside {common} that healthy scans commonly show." if common else f"{words}."


def count_regions(regions: list[dict]) -> str:
    """`1 region` or `2 regions`."""
    return f"{len(regions)} region{'s' * (len(regions) != 1)}"


def explain_no_flag(rate: float, known: int) -> str | None:
    """Why no scan can be flagged at this false-positive rate with so many normal validation scans; None: it can."""
    if count_needed_scans(rate) <= known:
        return None
    least = -(-1000 // (known + 1)) / 1000
    return (
        f"no scan can be flagged at {rate:g}: that needs {count_needed_scans(rate)} normal validation scans, the model "
        f"has {known}; give --false-positive-rate {least:g} or more, or validate on more scans"
    )
