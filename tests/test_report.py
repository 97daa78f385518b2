"""report.html says what the tables say and holds all that it shows."""

import base64
import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from evaluation.report import make_viewer, write_report
from evaluation.results import Results
from tests.predictions import make_prediction
from tests.test_table import make_metrics


class Page(HTMLParser):
    """What a test asks of report.html."""

    def __init__(self, text: str):
        super().__init__()
        self.images, self.links, self.outside, self.buttons, self.heads = [], [], [], [], []
        self.rows, self.cells, self.scripts, self.words = [], [], {}, []
        self.script = None
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    @property
    def shown(self) -> list[str]:
        """The words of the table of scans, as they are seen."""
        start = max(i for i, word in enumerate(self.words) if word.strip() == "largest, ml")
        return [word.strip() for word in self.words[start + 1 :] if word.strip()]

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.outside += [
            v for k, v in attributes if k in ("src", "href", "srcdoc") and v and re.match(r"(https?:)?//", v)
        ]
        self.head = None
        if tag == "img":
            self.images.append(given)
        elif tag == "a":
            self.links.append(given["href"])
        elif tag == "th" and given.get("scope") == "col":
            self.heads.append(given)
        elif tag == "button":
            self.buttons.append(given)
        elif tag == "tbody" and "data-find" in given:
            self.rows.append(given)
            self.cells.append([])
        elif "data-value" in given:
            self.cells[-1].append(given["data-value"])
        self.script = given.get("id", "") if tag == "script" else None

    def handle_data(self, data):
        if self.script is None:
            self.words.append(data)
            if self.heads and "text" not in self.heads[-1]:
                self.heads[-1]["text"] = data
        elif self.script:
            self.scripts[self.script] = data

    def handle_endtag(self, tag):
        if tag == "script":
            self.script = None


def make_content(**changes) -> dict:
    content = make_metrics(0.2) | {"run": "runs/dae", "data": "Dataset/test", "settings": {"false_positive_rate": 0.05}}
    rate = {"flagged": 1, "scans": 4, "low": 0.01, "high": 0.81}
    metric = {"value": 0.4, "low": 0.3, "high": 0.5}
    content["flagged"] = {"normal": rate, "abnormal": rate | {"flagged": 3}, "normal_by_sex": {"F": rate}}
    content["detectability"] = {"volume": [{"group": "1–3 ml", "lesions": 5, "recall": metric, "dice": metric}]}
    return content | changes


def make_row(scan: str, score: float, label: str = "normal", **more) -> dict:
    row = {"label": label, "scan": scan, "subject": f"sub-{scan}", "score": score, "p_value": 0.5, "flagged": False}
    return row | {"lesion_known": True, "age": None, "sex": None} | more


def make_region(scan: str, volume_ml: float, label: str = "normal") -> dict:
    place = {"x_mm": 11.4, "y_mm": -22.0, "z_mm": 33.0, "side": "right", "peak": 9.5, "mean": 4.5}
    return {"label": label, "scan": scan, "volume_ml": volume_ml} | place


def write_picture(path, colour: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), colour).save(path)


def read_colour(source: str) -> np.ndarray:
    picture = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
    return np.asarray(picture.convert("RGB"))[5, 10].astype(int)


def make_page(out, scans: list[dict], regions: list[dict] = (), viewers: dict | None = None, **changes) -> "Page":
    """The page of some scans whose slices 7, 8 and 9 score 1, 3 and 2."""
    slices = [
        {"label": row["label"], "scan": row["scan"], "slice": index, "score": score}
        for row in scans
        for index, score in ((7, 1), (8, 3), (9, 2))
    ]
    write_picture(out / "dice.png", (0, 0, 250))
    results = Results({})
    results.scans, results.slices, results.regions = scans, slices, list(regions)
    write_report(out, make_content(**changes), results, {"dice.png": "Dice & more"}, viewers or {})
    return Page((out / "report.html").read_text())


def test_rows_stand_by_falling_score(tmp_path):
    scans = [
        make_row("a", 1.0),
        make_row("b", 3.456789012, "abnormal", p_value=0.012345678, flagged=True),
        make_row("c", 2),
    ]
    page = make_page(tmp_path, scans, [make_region("c", 0.5), make_region("c", 0.25), make_region("b", 9.0)])
    assert page.cells == [
        ["b", "abnormal", "3.45679", "0.0123457", "1", "8", "0", "0"],
        ["c", "normal", "2", "0.5", "0", "8", "2", "0.5"],
        ["a", "normal", "1", "0.5", "0", "8", "0", "0"],
    ], "the region of a normal scan b is none of the abnormal one's"
    assert [(row["data-find"], row["data-label"], row["data-flagged"]) for row in page.rows] == [
        ("b sub-b", "abnormal", "1"),
        ("c sub-c", "normal", "0"),
        ("a sub-a", "normal", "0"),
    ]
    assert page.shown[:5] == ["b", "abnormal", "3.46", "0.012", "yes"]
    heads = [head["text"] for head in page.heads if "data-first" in head]
    assert heads == ["scan", "label", "score", "p", "flagged", "worst slice", "regions", "largest, ml"]
    assert [head["text"] for head in page.heads if head.get("aria-sort")] == ["score"]
    first = [head["data-first"] for head in page.heads if "data-first" in head]
    assert first == [
        "ascending",
        "ascending",
        "descending",
        "ascending",
        "descending",
        "ascending",
        *["descending"] * 2,
    ]
    assert re.findall(r'<span class="flag">(\w+)</span>', (tmp_path / "report.html").read_text()) == ["yes"]


def test_abnormal_scans_without_a_lesion_mask_are_named_before_the_figures(tmp_path):
    scans = [make_row(f"p{i}", 1.0, "abnormal", lesion_known=i > 13) for i in range(15)]
    page = make_page(tmp_path, scans)
    assert (
        "14 abnormal scans have no lesion mask and count for scan figures only, not slices and voxels: p0, p1,"
        in page.text
    )
    assert "p11 and 2 more." in page.text
    assert "no lesion mask" not in make_page(tmp_path, scans[14:]).text


def test_what_was_not_plain_in_a_scan_stands_with_it(tmp_path):
    results = Results({})
    results.scans = [make_row("a", 1.0), make_row("b", 2.0)]
    results.slices = [{"label": "normal", "scan": name, "slice": 7, "score": 1} for name in "ab"]
    results.warnings["normal", "a"] = ("its axes are <oblique>",)
    write_report(tmp_path, make_content(), results, {}, {})
    page = (tmp_path / "report.html").read_text()
    assert page.count("its axes are &lt;oblique&gt;") == 1
    assert page.index("its axes are") > page.index('id="detail-1"'), "b has the higher score"


def test_age_and_sex_have_columns_where_somebodys_is_known(tmp_path):
    page = make_page(tmp_path, [make_row("a", 2, age=61.5), make_row("b", 1)])
    assert [head["text"] for head in page.heads if "data-first" in head][-1] == "age"
    assert [cells[-1] for cells in page.cells] == ["61.5", ""]
    page = make_page(tmp_path, [make_row("a", 2, age=61.5, sex="F"), make_row("b", 1, sex="M")])
    assert [cells[-2:] for cells in page.cells] == [["61.5", "F"], ["", "M"]]
    assert "61.5 F" in page.text


def test_names_cannot_break_the_page(tmp_path):
    evil = '<script>alert(1)</script>"&'
    page = make_page(
        tmp_path,
        [make_row(evil, 2, subject=evil), make_row("b", 1)],
        viewers={("normal", evil): "</script><script>alert(2)"},
        data=evil,
        run=f"runs/{evil}",
    )
    assert page.cells[0][0] == evil
    assert page.rows[0]["data-find"] == f"{evil} {evil}"
    assert "alert" not in "".join(text for name, text in page.scripts.items() if not name)
    assert json.loads(page.scripts["viewer-0"]) == "</script><script>alert(2)"
    assert len(page.scripts) == 1
    assert not re.search(r"<script>\s*alert", (tmp_path / "report.html").read_text())


def test_the_results_are_those_of_the_metrics(tmp_path):
    text = make_page(tmp_path, [make_row("a", 1)]).text
    for words in (
        "Evaluation of dae",
        "3 normal and 2 abnormal scans with 7 lesions, 40 slices, 4 subjects",
        "Data: Dataset/test. Run: runs/dae.",
        "anomaly map of the model 0.200 (0.100–0.300) 0.700 (0.600–0.800) 0.600 (0.500–0.700)",
        "z-score of intensity 0.240 (0.140–0.340)",
        "normal scans 1 of 4: 0.25 (0.01–0.81)",
        "abnormal scans 3 of 4: 0.75 (0.01–0.81)",
        "normal scans, sex F 1 of 4",
        "1–3 ml 5 0.400 (0.300–0.500)",
        "Not a medical device",
        "Nose up, the subject's left on the left",
    ):
        assert words in text, words
    figures = {name: {} for name in make_metrics(0.2)["figures"]}
    text = make_page(tmp_path, [make_row("a", 1)], figures=figures, detectability={}).text
    assert "anomaly map of the model" not in text
    assert "lesions by" not in text


def test_pictures_are_held_by_the_page(tmp_path):
    write_picture(tmp_path / "error_maps/normal/a_slice_008.png", (250, 0, 0))
    write_picture(tmp_path / "error_maps/normal/a_slice_009.png", (250, 250, 250))
    write_picture(tmp_path / "montages/normal/a.png", (0, 250, 0))
    page = make_page(tmp_path, [make_row("a", 1), make_row("b", 0)])
    assert [image["alt"] for image in page.images] == [
        "a (normal), its worst slice 8: slice, reconstruction, signed residual and anomaly map",
        "a (normal), anomaly map over all slices",
        "Dice & more",
    ]
    assert [image.get("class") or "" for image in page.images] == ["worst", "", ""]
    for image, channel in zip(page.images, (0, 1, 2), strict=True):
        assert image["src"].startswith("data:image/webp;base64,")
        colour = read_colour(image["src"])
        assert colour[channel] > 200 > 50 > np.delete(colour, channel).max()
    assert not page.outside


def test_scans_beyond_the_sixtieth_have_links_instead_of_pictures(tmp_path):
    scans = [make_row(f"s {i}", 100 - i) for i in range(61)]
    for row in scans[59:]:
        write_picture(tmp_path / f"montages/normal/{row['scan']}.png", (1, 2, 3))
    page = make_page(tmp_path, scans)
    assert [image["alt"] for image in page.images] == ["s 59 (normal), anomaly map over all slices", "Dice & more"]
    assert "montages/normal/s%2060.png" in page.links


def test_eight_regions_are_listed(tmp_path):
    regions = [make_region("a", 20.0 - i) for i in range(10)]
    text = make_page(tmp_path, [make_row("a", 1)], regions).text
    assert "20.00 ml right 11, -22, 33 9.5 4.5" in text
    assert "13.00 ml" in text
    assert "12.00 ml" not in text
    assert "and 2 smaller ones, in regions.csv" in text
    assert "smaller ones" not in make_page(tmp_path, [make_row("a", 1)], regions[:8]).text


def test_a_viewer_belongs_to_its_scan(tmp_path):
    scans = [make_row("a", 1), make_row("b", 3), make_row("c", 2)]
    page = make_page(tmp_path, scans, viewers={("normal", "c"): "<p>c's page</p>"})
    assert list(page.scripts) == ["viewer-1"]
    assert json.loads(page.scripts["viewer-1"]) == "<p>c's page</p>"
    (button,) = [button for button in page.buttons if "data-viewer" in button]
    assert button["data-viewer"] == "viewer-1"
    assert button["data-title"].startswith("c: ")


def test_a_viewer_shows_the_map_over_the_scan_from_its_highest_place_on(monkeypatch):
    shown = {}

    def view(anomaly, **options):
        shown.update(options, anomaly=anomaly)
        return SimpleNamespace(
            get_standalone=lambda: '<link href="https://icon"><p id="a-0123456789abcdef0123456789abcdef">'
        )

    monkeypatch.setattr("nilearn.plotting.view_img", view)
    made = make_prediction()
    made.maps["score"][7, 30, 40] = 9.0
    assert make_viewer(made) == '<p id="a-1">', "nothing from the network, no random names"
    place = nib.affines.apply_affine(made.scan.geometry.stack_affine, [40, 30, 7])
    assert shown["cut_coords"] == pytest.approx(list(place))
    assert (shown["threshold"], shown["vmin"], shown["vmax"]) == (2.0, 0, 8.0)
    assert (shown["cmap"], shown["symmetric_cmap"], shown["black_bg"], shown["title"]) == (
        "inferno",
        False,
        True,
        "one",
    )
    for image, stack in ((shown["anomaly"], made.maps["score"]), (shown["bg_img"], made.scan.stack)):
        np.testing.assert_array_equal(image.get_fdata().transpose(2, 1, 0), np.nan_to_num(stack))
        np.testing.assert_allclose(image.affine, made.scan.geometry.stack_affine)


def test_files_beside_the_page_are_listed_where_they_are(tmp_path):
    (tmp_path / "maps").mkdir()
    (tmp_path / "scores.csv").write_text("")
    assert make_page(tmp_path, [make_row("a", 1)]).links == ["scores.csv", "metrics.json", "maps"]


def test_page_agrees_with_the_tables(evaluation):
    out, _ = evaluation
    page = Page((out / "report.html").read_text())
    scans = sorted(csv.DictReader((out / "scans.csv").open()), key=lambda row: -float(row["score"]))
    worst = {}
    for row in csv.DictReader((out / "scores.csv").open()):
        key = row["label"], row["scan"]
        worst[key] = max(worst.get(key, (0, "")), (float(row["score"]), row["slice"]))
    assert len(page.rows) == len(scans)
    for cells, row in zip(page.cells, scans, strict=True):
        assert cells[:4] == [row["scan"], row["label"], row["score"], row["p_value"]]
        assert cells[5] == worst[row["label"], row["scan"]][1]
    assert not page.outside, "the page asks for nothing outside itself"
    for link in page.links:
        assert (out / link).exists(), link
    assert len(page.scripts) == 4, "a viewer for each of the four worst scans"
    for text in page.scripts.values():
        viewer = json.loads(text)
        assert not Page(viewer).outside
        assert "brainsprite" in viewer
    assert (out / "report.html").stat().st_size < 30e6


def test_a_name_is_text_wherever_it_stands():
    name = "<img src=x onerror=alert(1)>"
    made = make_prediction()
    page = make_viewer(replace(made, scan=replace(made.scan, name=name)))
    assert name not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
