"""What people look at: pictures show what is there, maps lie on their scans, the page agrees with the tables."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest
from matplotlib.colors import to_rgb

import evaluation.figures as figures
from evaluation.evaluate import main as evaluate
from evaluation.examiner import Examined, OpenScan
from evaluation.maps import list_regions, locate_stack, name_bids
from evaluation.panels import LESION_COLOUR, NOT_SCORED, draw_montage, draw_panels, outline, overlay
from evaluation.report import VIEWERS
from preprocessing.slices import list_scans
from preprocessing.volume import cut_stack, read_volume, restore_to_grid
from tests.conftest import make_head


@pytest.fixture
def examined() -> Examined:
    """Ten slices of a disc with a lesion, 6 x 4 pixels, in slices 4 and 5."""
    y, x = np.mgrid[:64, :64] - 31.5
    stack = np.repeat(np.where(x**2 + y**2 < 25**2, 0.6, 0)[None], 10, axis=0).astype(np.float16)
    lesion = np.zeros(stack.shape, dtype=bool)
    lesion[4:6, 40:46, 20:24] = True
    anomaly = np.where(stack > 0, np.where(lesion, 8, 1), np.nan).astype(np.float32)
    record = {"slices": list(range(50, 60)), "spacing_mm": [2.0, 2.0, 2.0], "pixel_mm": 2.0}
    reconstruction = np.where(lesion, 0.3, stack).astype(np.float32)
    return Examined(OpenScan("one", "abnormal", stack, lesion, record), reconstruction, {"score": anomaly})


def find_colour(path, colour) -> np.ndarray:
    return np.argwhere(np.abs(plt.imread(path)[..., :3] - to_rgb(colour)).max(axis=-1) < 0.02)


def test_montage_outlines_the_lesion_in_its_slices(examined, tmp_path):
    draw_montage(tmp_path / "montage.png", examined, "a title with $ and _", 4.0)
    found = find_colour(tmp_path / "montage.png", LESION_COLOUR)
    height, width = plt.imread(tmp_path / "montage.png").shape[:2]
    # tiles stand in rows of eight, 10 of the picture's 11 inches wide: slices 4 and 5 are the fifth and the sixth
    tiles = found[:, 1] / (width * 10 / 11 / 8)
    assert set(tiles.astype(int)) == {4, 5}
    assert (tiles % 1).mean() < 0.5, "the lesion lies left of the middle"
    tile = (height - 0.4 * 110) / 2
    assert (found[:, 0] - 0.4 * 110).mean() < tile / 2, "and in front, which is up"


def test_panels_have_a_row_a_slice(examined, tmp_path):
    draw_panels(tmp_path / "one.png", examined, [4], "title", 4.0)
    draw_panels(tmp_path / "two.png", examined, [0, 4], "title", 4.0)
    one, two = (plt.imread(tmp_path / f"{name}.png") for name in ("one", "two"))
    assert two.shape[0] > 1.7 * one.shape[0]
    assert one[..., :3].std() > 0.05
    assert len(find_colour(tmp_path / "one.png", LESION_COLOUR)) > 20
    draw_panels(tmp_path / "none.png", examined, [0], "title", 4.0)
    assert len(find_colour(tmp_path / "none.png", LESION_COLOUR)) == 0


def test_overlay_leaves_the_usual_alone_and_greys_what_was_not_scored():
    slice_ = np.array([[0.0, 0.5, 0.5]])
    drawn = overlay(slice_, np.array([[np.nan, 0.5, 10.0]]), top=10)
    np.testing.assert_allclose(drawn[0, 0], NOT_SCORED)
    np.testing.assert_allclose(drawn[0, 1], 0.5)
    assert np.ptp(drawn[0, 2]) > 0.2, "the highest anomaly is coloured"
    mask = np.zeros((1, 5, 5), dtype=bool)
    mask[0, 2, 2] = True
    assert outline(mask).sum() == 8


def test_every_axis_is_labelled(monkeypatch, tmp_path, evaluation):
    drawn = []
    monkeypatch.setattr(figures, "write_figure", lambda path, figure: drawn.append((path, figure)))
    rng = np.random.default_rng(0)
    labels, scores = np.arange(30) % 2 == 0, rng.random(30)
    figure = {"value": 0.5, "low": 0.4, "high": 0.6}
    figures.draw_curves(tmp_path, labels, {"one": scores}, {"one": (figure, figure)}, "scans")
    rows = [{"label": "normal", "score": s, "mse": s, "age": 20 + i, "sex": "FM"[i % 2]} for i, s in enumerate(scores)]
    figures.draw_histograms(tmp_path, rows, {"score": "score", "mse": "MSE"}, {"score": (0.5, "threshold")})
    figures.draw_dice(tmp_path, np.linspace(10, 0, 50), np.linspace(0, 0.5, 50), 4.0, "2 lesions")
    group = {"group": "1–3 ml", "recall": figure, "dice": figure, "lesions": 4, "scans": 3}
    figures.draw_detectability(tmp_path, {"volume": [group], "kind": [group]})
    figures.draw_calibration(tmp_path, {"scans": scores, "slices": scores}, 0.05)
    figures.draw_ages(tmp_path, rows, (0.5, "threshold"))
    assert len(drawn) == 6
    for _, figure in drawn:
        for axis in figure.axes:
            assert axis.get_xlabel(), axis.get_title()
            assert axis.get_ylabel(), axis.get_title()
            assert axis.get_legend()
        plt.close(figure)


def reorient(image: nib.Nifti1Image, axes: str) -> nib.Nifti1Image:
    ornt = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(axes)))
    return image.as_reoriented(ornt)


@pytest.mark.parametrize("axes", ["RAS", "PSR", "LPI"])
def test_stack_knows_where_it_lies(axes, tmp_path):
    nib.save(reorient(make_head(), axes), tmp_path / "head.nii.gz")
    volume = read_volume(tmp_path / "head.nii.gz")
    stack, record = cut_stack(volume, volume.values > 0, True, 0.7, 64, 200.0)
    affine = locate_stack(record)
    grid = np.indices(stack.shape[::-1]).reshape(3, -1)  # right, anterior, superior
    places = nib.affines.apply_affine(affine, grid.T).T.reshape(3, *stack.shape[::-1])
    for axis in range(3):
        there = places[axis].transpose(2, 1, 0)  # as the stack: (superior, anterior, right)
        native = restore_to_grid(np.where(stack > 0, there, np.nan), record)
        inside = np.argwhere(np.isfinite(native))
        wanted = nib.affines.apply_affine(volume.affine, inside)[:, axis]
        assert np.abs(np.median(native[tuple(inside.T)] - wanted)) < 0.05
        assert np.abs(native[tuple(inside.T)] - wanted).max() < 3, "the rim takes its neighbours' values"


@pytest.mark.parametrize("axes", ["RAS", "LIP"])
def test_regions_name_the_subjects_side(axes):
    values = np.ones((20, 20, 20), dtype=np.float32)
    values[2:5, 8:11, 8:11], values[9:11, 3:5, 9:11] = 9, 9
    image = reorient(nib.Nifti1Image(values, np.diag([4.0, 4.0, 4.0, 1.0])), axes)
    regions = list_regions(image.get_fdata(), image.affine, 5.0, 0.0)
    assert [region["side"] for region in regions] == ["left", "middle"]


def test_bids_names_are_valid_and_unlike():
    names = name_bids([("sub-01", "ses-1"), ("a_b", ""), ("c", ""), ("a-b", None)])
    assert names[0] == "sub-01/ses-1/anat/sub-01_ses-1"
    assert names[1:] == ["sub-ab/anat/sub-ab_run-1", "sub-c/anat/sub-c", "sub-ab/anat/sub-ab_run-2"]


def test_bids_derivative(evaluation, processed):
    out, _ = evaluation
    description = json.loads((out / "bids/dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0]["Name"]
    threshold = json.loads((out / "metrics.json").read_text())["calibration"]["voxel_threshold"]
    maps = sorted((out / "bids").rglob("*_desc-anomaly_statmap.nii.gz"))
    assert len(maps) == len(list(list_scans(processed / "test")))
    for path in maps:
        assert re.fullmatch(r"sub-[0-9a-zA-Z]+(_run-\d)?_desc-anomaly_statmap\.nii\.gz", path.name)
        sidecar = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())
        source = nib.load(sidecar["Sources"][0])
        image = nib.load(path)
        mask = nib.load(path.with_name(path.name.replace("statmap", "mask")))
        for one in (image, mask):
            assert one.shape == source.shape
            np.testing.assert_allclose(one.get_sform(), source.affine, atol=1e-4)
            np.testing.assert_allclose(one.get_qform(), source.affine, atol=1e-4)
        np.testing.assert_array_equal(mask.get_fdata() > 0, np.nan_to_num(image.get_fdata()) >= threshold)


class Page(HTMLParser):
    """What a test asks of report.html."""

    def __init__(self, text: str):
        super().__init__()
        self.images, self.links, self.outside, self.rows, self.cells, self.scripts = [], [], [], [], [], {}
        self.script = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.outside += [
            v for k, v in attributes if k in ("src", "href", "srcdoc") and v and re.match(r"(https?:)?//", v)
        ]
        if tag == "img":
            self.images.append(given)
        elif tag == "a":
            self.links.append(given["href"])
        elif tag == "tbody" and "data-find" in given:
            self.rows.append(given)
            self.cells.append([])
        elif "data-value" in given:
            self.cells[-1].append(given["data-value"])
        elif tag == "script":
            self.script = given.get("id")

    def handle_data(self, data):
        if self.script:
            self.scripts[self.script] = data

    def handle_endtag(self, tag):
        if tag == "script":
            self.script = None


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
        wanted = [row["scan"], row["label"], row["score"], row["p_value"]]
        assert cells[:4] == wanted
        assert cells[5] == worst[row["label"], row["scan"]][1]
    assert not page.outside, "the page asks for nothing outside itself"
    for link in page.links:
        assert (out / link).exists(), link
    assert all(image["alt"] and image["src"].startswith("data:image/webp;base64,") for image in page.images)
    assert len(page.scripts) == min(VIEWERS, len(scans))
    for text in page.scripts.values():
        viewer = json.loads(text)
        assert not Page(viewer).outside
        assert "brainsprite" in viewer
    assert (out / "report.html").stat().st_size < 30e6


def test_ages_are_shown_and_names_cannot_break_the_page(evaluation, processed, tmp_path):
    _, command = evaluation
    folder = tmp_path / "test/normal/<script>alert(1)<"
    shutil.copytree(next((processed / "test/normal").iterdir()), folder)
    record = json.loads((folder / "scan.json").read_text())
    (folder / "scan.json").write_text(json.dumps(record | {"age": 61.5, "sex": "F"}))
    command = [*command, "--data", str(tmp_path / "test"), "--out", str(tmp_path / "out"), "--panels", "worst"]
    assert evaluate(command) == 0
    text = (tmp_path / "out/report.html").read_text()
    assert "<script>alert" not in text
    assert Page(text).cells[0][0] == "<script>alert(1)<"
    assert Page(text).cells[0][-2:] == ["61.5", "F"]
    flagged = json.loads((tmp_path / "out/metrics.json").read_text())["flagged"]
    assert list(flagged["normal_by_sex"]) == ["F"]
    assert list(flagged["normal_by_age"]) == ["60 to 74"]
    assert plt.imread(tmp_path / "out/age.png")[..., :3].std() > 0.05


def test_evaluating_again_gives_the_same_bytes(evaluation):
    out, command = evaluation
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (out / "metrics.json").unlink()  # as an interrupted evaluation leaves it
    assert evaluate(command) == 0
    for path, content in before.items():
        assert path.read_bytes() == content, path


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("no Chromium with its driver here")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def test_page_in_a_browser(browser, evaluation):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    def shown() -> list[str]:
        return [one.text for one in browser.find_elements(By.CSS_SELECTOR, "#table .name") if one.is_displayed()]

    out, _ = evaluation
    browser.get((out / "report.html").as_uri())
    scans = list(csv.DictReader((out / "scans.csv").open()))
    assert shown() == [r["scan"] for r in sorted(scans, key=lambda row: -float(row["score"]))]
    head = browser.find_element(By.XPATH, "//thead//button[text()='scan']")
    head.send_keys(Keys.ENTER)
    assert shown() == sorted(row["scan"] for row in scans)
    assert head.find_element(By.XPATH, "..").get_attribute("aria-sort") == "ascending"
    head.send_keys(Keys.ENTER)
    assert shown() == sorted((row["scan"] for row in scans), reverse=True)
    browser.find_element(By.XPATH, "//thead//button[text()='score']").click()
    assert shown() == [r["scan"] for r in sorted(scans, key=lambda row: -float(row["score"]))]

    label = browser.find_element(By.ID, "label")
    label.send_keys("abnormal")
    assert set(shown()) == {row["scan"] for row in scans if row["label"] == "abnormal"}
    assert browser.find_element(By.ID, "shown").text == "2 of 4 scans shown"
    label.send_keys(Keys.HOME)
    assert len(shown()) == len(scans)
    browser.find_element(By.ID, "find").send_keys(scans[0]["scan"][:-2])
    assert shown()
    assert all(scans[0]["scan"][:-2] in name for name in shown())
    browser.find_element(By.ID, "find").clear()
    browser.find_element(By.ID, "find").send_keys(Keys.SPACE, Keys.BACKSPACE)
    assert len(shown()) == len(scans)

    name = browser.find_element(By.CSS_SELECTOR, "#table .name")
    name.send_keys(Keys.ENTER)
    assert name.get_attribute("aria-expanded") == "true"
    picture = browser.find_element(By.CSS_SELECTOR, ".detail img")
    WebDriverWait(browser, 20).until(lambda _: picture.get_property("naturalWidth") > 0)
    browser.find_element(By.CSS_SELECTOR, "button.viewer").send_keys(Keys.ENTER)
    browser.switch_to.frame(browser.find_element(By.TAG_NAME, "iframe"))
    canvas = WebDriverWait(browser, 20).until(lambda _: browser.find_elements(By.TAG_NAME, "canvas"))[0]
    coloured = """const c = arguments[0], d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
        return d.some((v, i) => i % 4 < 3 && v > 0)"""
    WebDriverWait(browser, 20).until(lambda _: browser.execute_script(coloured, canvas))
    browser.switch_to.default_content()

    metrics = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    errors = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert not errors
