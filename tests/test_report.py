"""report.html says what the tables say and holds all that it shows."""

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from evaluation.cards import name_anchors, select_scans
from evaluation.report import write_report
from evaluation.results import Results
from tests.test_table import make_metrics


class Page(HTMLParser):
    """What a test asks of report.html."""

    def __init__(self, text: str):
        super().__init__()
        self.images, self.links, self.outside, self.heads, self.anchors = [], [], [], [], []
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
        if given.get("id", "").startswith("scan-"):
            self.anchors.append(given["id"])
        if tag == "img":
            self.images.append(given)
        elif tag == "a":
            self.links.append(given["href"])
        elif tag == "th" and given.get("scope") == "col":
            self.heads.append(given)
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
    group = {"group": "1–3 ml", "lesions": 5, "not_scored": 2, "recall": metric, "dice": metric}
    content["detectability"] = {"volume": [group]}
    content["calibration"] = {"normal_scans": 35, "voxel_threshold": 4.0}
    content["coverage"] = {"keep": 0.7, "unscored_share": 0.0789, "scans": 5, "lesions": 2, "unrecorded": 0}
    training = {"data": ["Dataset/a", "Dataset/b"], "train_subjects": 110, "val_subjects": 35, "steps": 36000}
    content["origin"] = {"date": "2030-01-02T03:04+01:00", "commit": "abc123", "versions": {"torch": "2.0"}}
    content["origin"]["training"] = training
    return content | changes


def make_row(scan: str, score: float, label: str = "normal", **more) -> dict:
    row = {"label": label, "scan": scan, "subject": f"sub-{scan}", "score": score, "p_value": 0.5, "flagged": False}
    return row | {"lesion_known": True, "age": None, "sex": None} | more


def make_region(scan: str, volume_ml: float, label: str = "normal", **changes) -> dict:
    place = {"x_mm": 11.4, "y_mm": -22.0, "z_mm": -0.3, "side": "right", "peak": 9.5, "mean": 4.5}
    place |= {"peak_x_mm": 12.0, "peak_y_mm": -20.0, "peak_z_mm": 31.0, "number": 1, "slice": 8, "on_lesion": None}
    place |= {"file_axis": "k", "file_index": 8, "p_value": 0.028}
    return {"label": label, "scan": scan, "volume_ml": volume_ml} | place | changes


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
    results = Results({})
    results.scans, results.slices, results.regions = scans, slices, list(regions)
    figures = {"Dice & more": ("dice.pdf", "data:image/svg+xml;base64,AAAA")}
    write_report(out, make_content(**changes), results, figures, viewers or {})
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


def test_beyond_a_thousand_scans_the_lowest_are_left_to_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.report.MOST_SCANS", 3)
    scans = [make_row(f"s{i}", float(i)) for i in range(6)] + [make_row("missed", 0.5, "abnormal")]
    page = make_page(tmp_path, scans)
    assert [cells[0] for cells in page.cells] == ["s5", "s4", "s3", "missed"], "a miss that is shown above"
    assert "4 scans, the highest score first; 3 more with lower scores are in scans.csv." in page.text
    assert "scans.csv" not in make_page(tmp_path, scans[:3]).text.split("Files beside")[0]


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
    assert page.index("its axes are") > page.index('id="scan-normal-a"') > page.index('id="scan-normal-b"')


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
        viewers={("normal", evil): {"slices": ["</script><script>alert(2)"]}},
        data=evil,
        run=f"runs/{evil}",
    )
    assert page.cells[0][0] == evil
    assert page.rows[0]["data-find"] == f"{evil} {evil}"
    assert "alert" not in "".join(text for name, text in page.scripts.items() if not name)
    (anchor,) = [name for name in page.scripts if name.startswith("volumes-")]
    assert json.loads(page.scripts[anchor]) == {"slices": ["</script><script>alert(2)"]}
    assert set(page.scripts) == {anchor, "palette"}
    assert f"#{anchor.removeprefix('volumes-')}" in page.links
    assert not re.search(r"<script>\s*alert", (tmp_path / "report.html").read_text())


def test_the_results_are_those_of_the_metrics(tmp_path):
    text = make_page(tmp_path, [make_row("a", 1)]).text
    for words in (
        "Evaluation of dae 3 of 4 abnormal and 1 of 4 normal scans are flagged, where at most 5 % of healthy ones "
        "should be; 2 of 7 known lesions are found; voxel average precision is 0.200.",
        "3 normal and 2 abnormal scans with 7 lesions, 40 slices, 4 subjects",
        "Data: Dataset/test. Run: runs/dae.",
        "anomaly map of the model 0.200 (0.100–0.300) 0.700 (0.600–0.800) 0.600 (0.500–0.700)",
        "z-score of intensity 0.240 (0.140–0.340)",
        "normal scans 1 of 4: 0.25 (0.01–0.81)",
        "abnormal scans 3 of 4: 0.75 (0.01–0.81)",
        "normal scans, sex F 1 of 4",
        "1–3 ml 5 0.400 (0.300–0.500) 0.400 (0.300–0.500) 2",
        "Not a medical device",
        "Nose up, the subject's left on the left",
    ):
        assert words in text, words
    figures = {name: {} for name in make_metrics(0.2)["figures"]}
    text = make_page(tmp_path, [make_row("a", 1)], figures=figures, detectability={}).text
    assert "anomaly map of the model" not in text
    assert "lesions by" not in text


def test_the_page_says_what_its_words_mean_and_where_it_comes_from(tmp_path):
    text = make_page(tmp_path, [make_row("a", 1)]).text
    for words in (
        "threshold an anomaly of 4: 0.2 % of the brains of 35 healthy validation scans lie above it",
        "the least possible is 1/36 = 0.028; a scan is flagged where p ≤ 0.05",
        "it is marked down to 12.5 % of its highest anomaly",
        "found a lesion is found if at least 10 % of it is marked",
        "the middle 70 % of the axial slices are scored; 7.9 % of the brain's voxels lie outside them (mean of 5 "
        "scans), and so do 2 lesions, which count as missed",
        "trained on 110 subjects and validated on 35 of Dataset/a, Dataset/b, 36000 steps; calibrated on 35 healthy",
        "Made 2030-01-02T03:04+01:00, commit abc123, torch 2.0.",
    ):
        assert words in text, words
    origin = make_content()["origin"] | {"training": None, "commit": None}
    coverage = {"keep": 0.7, "unscored_share": None, "scans": 0, "lesions": 0, "unrecorded": 3}
    text = make_page(tmp_path, [make_row("a", 1)], origin=origin, coverage=coverage).text
    assert "its training set is not recorded" in text
    assert "commit unknown" in text
    assert "was not recorded when these scans were sliced; of 3 scans it is not known whether lesions do" in text
    assert "1–3 ml 5 0.400 (0.300–0.500) 0.400 (0.300–0.500) 2 or more" in text


def test_chance_stands_below_the_figures(tmp_path):
    figures = make_metrics(0.2)["figures"]
    figures["score"]["prevalence"] = 0.02
    text = make_page(tmp_path, [make_row("a", 1)], figures=figures).text
    assert "chance level 0.020 0.039 0.500 0.500" in text
    assert "voxel average precision is 0.200, chance 0.020" in text


def test_a_p_value_is_never_zero(tmp_path):
    text = make_page(tmp_path, [make_row("a", 1, p_value=0.0001)]).text
    assert "score 1.0, p <0.001" in text
    assert "0.000 " not in text


def test_pictures_are_held_by_the_page(tmp_path):
    write_picture(tmp_path / "error_maps/normal/a_slice_008.png", (250, 0, 0))
    write_picture(tmp_path / "error_maps/normal/a_slice_009.png", (250, 250, 250))
    write_picture(tmp_path / "montages/normal/a.png", (0, 250, 0))
    page = make_page(tmp_path, [make_row("a", 1), make_row("b", 0)])
    assert page.images.pop(0)["class"] == "large", "one of the selected scans"
    assert page.images.pop() == {"alt": "Dice & more", "src": "data:image/svg+xml;base64,AAAA"}
    assert [image["alt"] for image in page.images] == [
        "a (normal), its worst slice 8: slice, reconstruction, signed residual and anomaly map",
        "a (normal), anomaly map over all slices",
    ]
    assert [image.get("class") or "" for image in page.images] == ["worst", ""]
    for image, channel in zip(page.images, (0, 1), strict=True):
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


def test_regions_are_listed_with_their_places(tmp_path):
    regions = [make_region("a", 20.0, number=1), make_region("a", 13.5, number=2, file_axis=None, file_index=None)]
    text = make_page(tmp_path, [make_row("a", 1)], regions).text
    assert "no. volume, ml side centre x, y, z, mm highest at peak mean p 1 20.00" in text
    assert "1 20.00 right 11, -22, 0 z 31 mm, k = 8" in text
    assert "2 13.50 right 11, -22, 0 z 31 mm 9.5 4.5" in text, "a resampled scan has no slices of the file"
    assert " -0" not in text
    assert "on a known lesion" not in text
    regions = [make_region("a", 20.0, on_lesion=True), make_region("a", 13.5, on_lesion=False)]
    text = make_page(tmp_path, [make_row("a", 1)], regions).text
    assert "peak mean p on a known lesion" in text
    assert "9.5 4.5 0.028 yes 1 13.50 right 11, -22, 0 z 31 mm, k = 8 9.5 4.5 0.028 no" in text
    assert "No region above the threshold." in make_page(tmp_path, [make_row("a", 1)]).text


def test_regions_that_healthy_scans_commonly_show_are_folded_away(tmp_path):
    regions = [make_region("a", 20.0 - i, number=i + 1, p_value=p) for i, p in enumerate((0.01, 0.21, 0.2))]
    text = make_page(tmp_path, [make_row("a", 1)], regions).text
    shown, folded = text.split("Regions that healthy scans commonly show (p above 0.2): 1")
    assert "peak mean p 1 20.00" in shown
    assert "9.5 4.5 0.010 3 18.00" in shown
    assert "2 19.00 right" in folded
    assert "4.5 0.210" in folded
    assert "commonly show" not in make_page(tmp_path, [make_row("a", 1)], [make_region("a", 1)]).text


def test_a_viewer_belongs_to_its_scan(tmp_path):
    scans = [make_row("a", 1), make_row("b", 3), make_row("c", 2)]
    page = make_page(tmp_path, scans, viewers={("normal", "c"): {"threshold": 4.0}})
    assert list(page.scripts) == ["palette", "volumes-scan-normal-c"]
    assert json.loads(page.scripts["volumes-scan-normal-c"]) == {"threshold": 4.0}
    assert (tmp_path / "report.html").read_text().count('id="viewer-of-') == 1


def test_each_scan_has_a_link_of_its_own(tmp_path):
    scans = [make_row("a b", 3), make_row("a-b", 2), make_row("a-b", 1, "abnormal")]
    assert name_anchors(scans) == ["scan-normal-a-b", "scan-normal-a-b~2", "scan-abnormal-a-b"]
    page = make_page(tmp_path, scans)
    assert page.anchors == name_anchors(scans)
    assert [link for link in page.links if link.startswith("#")] == [f"#{anchor}" for anchor in page.anchors]


def test_misses_and_false_positives_are_selected_as_well_as_hits():
    rows = [make_row(f"h{i}", 90 - i, "abnormal", flagged=True) for i in range(5)]
    rows += [make_row(f"m{i}", 20 - i, "abnormal") for i in range(3)]
    rows += [make_row("f0", 30, flagged=True), make_row("n0", 1)]
    assert [row["scan"] for row in select_scans(rows)] == ["h0", "h1", "m2", "m1", "f0"]
    assert [row["scan"] for row in select_scans(rows[-1:])] == ["n0"], "something is shown of normal scans too"


def test_files_beside_the_page_are_listed_where_they_are(tmp_path):
    (tmp_path / "maps").mkdir()
    (tmp_path / "scores.csv").write_text("")
    assert make_page(tmp_path, [make_row("a", 1)]).links == [
        "#scan-normal-a",
        "dice.pdf",
        "scores.csv",
        "metrics.json",
        "maps",
    ]


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
        assert link[1:] in page.anchors if link.startswith("#") else (out / link).exists(), link
    volumes = {name for name in page.scripts if name.startswith("volumes-")}
    assert volumes == {f"volumes-{anchor}" for anchor in page.anchors}, "a viewer for each scan"
    assert (out / "report.html").stat().st_size < 30e6
