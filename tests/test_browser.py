"""report.html in a browser: sorting, links, the viewer by mouse and keys, a phone, and no scripts at all."""

import csv
import shutil

import numpy as np
import pytest
from scipy import ndimage

from evaluation.viewer import CODES_PER_DOUBLING, LEAST_DOUBLINGS
from tests.predictions import mark


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


@pytest.fixture
def page(browser, evaluation):
    """The evaluation's report, opened; at the end the browser must have nothing to complain of."""
    out, _ = evaluation
    browser.get((out / "report.html").as_uri())
    yield browser
    errors = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert not errors


def find(browser, selector: str):
    """The first element of a CSS selector."""
    return browser.find_element("css selector", selector)


def wait_for(browser, script: str):
    """What a script gives, once that is neither false nor null."""
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, 20).until(lambda _: browser.execute_script(script))


def open_viewer(browser) -> str:
    """Unfold the first scan and wait until its viewer is drawn; returns its anchor."""
    anchor = find(browser, "#table .name").get_attribute("href").split("#")[1]
    find(browser, "#table .name").click()
    wait_for(browser, f"return !!(viewers['{anchor}'] && viewers['{anchor}'].scan)")
    return anchor


def read_values(browser) -> str:
    return find(browser, ".open .values").text


def test_scans_are_sorted_found_and_unfolded(page, evaluation):
    from selenium.webdriver.common.keys import Keys

    def shown() -> list[str]:
        return [one.text for one in page.find_elements("css selector", "#table .name") if one.is_displayed()]

    scans = list(csv.DictReader((evaluation[0] / "scans.csv").open()))
    assert shown() == [r["scan"] for r in sorted(scans, key=lambda row: -float(row["score"]))]
    head = page.find_element("xpath", "//thead//button[text()='scan']")
    head.send_keys(Keys.ENTER)
    assert shown() == sorted(row["scan"] for row in scans)
    assert head.find_element("xpath", "..").get_attribute("aria-sort") == "ascending"
    head.send_keys(Keys.ENTER)
    assert shown() == sorted((row["scan"] for row in scans), reverse=True)
    page.find_element("xpath", "//thead//button[text()='score']").click()
    assert shown() == [r["scan"] for r in sorted(scans, key=lambda row: -float(row["score"]))]

    label = find(page, "#label")
    label.send_keys("abnormal")
    assert set(shown()) == {row["scan"] for row in scans if row["label"] == "abnormal"}
    assert find(page, "#shown").text == "2 of 4 scans shown"
    label.send_keys(Keys.HOME)
    find(page, "#find").send_keys(scans[0]["scan"][:-2])
    assert shown()
    assert all(scans[0]["scan"][:-2] in name for name in shown())
    find(page, "#find").clear()
    find(page, "#find").send_keys(Keys.SPACE, Keys.BACKSPACE)
    assert len(shown()) == len(scans)

    name = find(page, "#table .name")
    name.send_keys(Keys.ENTER)
    assert name.get_attribute("aria-expanded") == "true"
    picture = find(page, ".open img")
    wait_for(page, "return document.querySelector('.open img').naturalWidth > 0")
    assert picture.is_displayed()
    name.send_keys(Keys.SPACE)
    assert name.get_attribute("aria-expanded") == "false"
    assert not picture.is_displayed()


def test_a_link_leads_to_its_scan(page, evaluation):
    last = page.find_elements("css selector", "#table .name")[-1]
    page.get(f"{(evaluation[0] / 'report.html').as_uri()}#{last.get_attribute('href').split('#')[1]}")
    page.refresh()
    assert page.find_elements("css selector", "#table .name")[-1].get_attribute("aria-expanded") == "true"
    assert find(page, ".open .held").is_displayed()


def test_the_viewer_moves_by_mouse_and_keys_and_says_where_it_is(page):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    anchor = open_viewer(page)
    packed = page.execute_script(f"return viewers['{anchor}'].packed")
    place = packed["start"][2]
    x, y, z = (round(value) for value in np.array(packed["affine"]) @ [*packed["start"], 1])
    start = read_values(page)
    assert start.startswith(f"x {x}, y {y}, z {z} mm")
    assert packed["slices"][place].split(", ")[1] in start
    assert "times the threshold" in start
    here = f"const v = viewers['{anchor}']; return v.code[v.locate(PLANES[0], v.voxel[0], v.voxel[1])]"
    assert page.execute_script(here) == page.execute_script(f"return Math.max(...viewers['{anchor}'].code)"), (
        "it opens at the highest anomaly, so it has unpacked the volumes the right way round"
    )
    axial = find(page, ".open canvas")
    axial.click()
    assert read_values(page) != start
    by = -1 if place else 1
    axial.send_keys(Keys.ARROW_DOWN if place else Keys.ARROW_UP)
    assert packed["slices"][place + by].split(", ")[1] in read_values(page)
    axial.send_keys("0")
    assert read_values(page) == start
    ActionChains(page).drag_and_drop_by_offset(axial, 15, 10).perform()
    assert read_values(page) != start
    wheel = "arguments[0].dispatchEvent(new WheelEvent('wheel', {deltaY: arguments[1], cancelable: true}))"
    axial.send_keys("0")
    page.execute_script(wheel, axial, 100 if place else -100)
    assert packed["slices"][place + by].split(", ")[1] in read_values(page), "the wheel steps through the slices"


def test_the_viewer_shows_what_is_asked_for(page):
    from selenium.webdriver.common.keys import Keys

    anchor = open_viewer(page)
    axial = find(page, ".open canvas")
    draw = f"return viewers['{anchor}'].canvases[0].toDataURL()"
    drawn = [page.execute_script(draw)]
    for key in ("1", "2", "3", "r", "o", "f", "f"):
        axial.send_keys(key)
        drawn.append(page.execute_script(draw))
    assert len(set(drawn[:6])) == 6, "scan, reconstruction, residual and map differ, so do the side and the lines"
    assert drawn[-2] != drawn[-1], "flicker"
    axial.send_keys("0")
    assert page.execute_script(draw) == drawn[0]
    for name, key in (("threshold", Keys.ARROW_RIGHT), ("opacity", Keys.ARROW_LEFT), ("window", Keys.ARROW_LEFT)):
        slider = find(page, f".open input[name={name}]")
        slider.send_keys(*[key] * 5)
        assert page.execute_script(draw) != drawn[0], name
        axial.send_keys("0")
    find(page, ".open input[name=threshold]").send_keys(Keys.ARROW_RIGHT)
    assert "1.0 times the threshold" in find(page, ".open output").text


def test_the_viewer_marks_what_the_maps_do(page):
    anchor = open_viewer(page)
    shape = page.execute_script(f"return viewers['{anchor}'].packed.shape")
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=shape), 2)
    noise[:3], strong, weak = -1, ((1, 10, -1), (0, -1, 5)), ((1, 11, 0), (1, 0, 5))
    for place in (*strong, *weak):  # neighbours in memory and not in the head: no weak one is of a strong one's region
        noise[place] = 1 if place in strong else 0.03
    doublings = np.rint(CODES_PER_DOUBLING * np.clip(40 * noise, -2, 7)) / CODES_PER_DOUBLING
    codes = 2 + (doublings - LEAST_DOUBLINGS) * CODES_PER_DOUBLING
    write = f"Object.assign(viewers['{anchor}'], {{code: Uint8Array.from(arguments[0]), markedAt: null}})"
    page.execute_script(write, codes.ravel().astype(int).tolist())
    for moved in (0, 1):
        page.execute_script(f"viewers['{anchor}'].change({{threshold: {moved}}})")
        excess = np.reshape(page.execute_script(f"return Array.from(viewers['{anchor}'].excess)"), shape)
        above, marked = doublings >= moved, mark(2.0**doublings, 2.0**moved)
        assert 100 < marked.sum() < above.sum() - 100, "regions are strong enough for their peaks to matter"
        near = above & (excess == 0)  # codes round the share of the peak
        assert near.sum() < 0.1 * marked.sum()
        np.testing.assert_array_equal((excess >= 0)[~near], marked[~near])


def test_the_subjects_left_is_on_the_left_unless_radiologists_ask_otherwise(page):
    from selenium.webdriver import ActionChains

    anchor = open_viewer(page)
    axial = find(page, ".open canvas")
    to_the_left = -axial.size["width"] // 4
    sides = []
    for _ in range(2):
        ActionChains(page).move_to_element_with_offset(axial, to_the_left, 0).click().perform()
        sides.append(page.execute_script(f"const v = viewers['{anchor}']; return v.voxel[0] / v.wide"))
        axial.send_keys("r")
    assert sides[0] < 0.4 < 0.6 < sides[1]
    assert page.execute_script(f"return viewers['{anchor}'].packed.affine[0][0]") > 0, "columns run to the right"


def test_a_click_on_a_region_moves_the_viewer_there(page):
    anchor = open_viewer(page)
    regions = page.execute_script(f"return viewers['{anchor}'].packed.regions")
    assert regions
    page.execute_script(f"viewers['{anchor}'].move([0, 0, 0])")
    page.execute_script("document.querySelectorAll('.open details').forEach(part => part.open = true)")
    row = page.find_elements("css selector", ".open .regions tbody tr")[-1]
    row.click()
    wait_for(page, f"return viewers['{anchor}'].region === {regions[-1]['number']}")
    voxel = page.execute_script(f"return viewers['{anchor}'].voxel")
    assert all(abs(a - b) <= 1 for a, b in zip(voxel, regions[-1]["voxel"], strict=True))


def test_the_page_fits_on_a_phone(page):
    metrics = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        open_viewer(page)
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390
        canvas = find(page, ".open canvas")
        assert canvas.size["width"] > 300
        assert page.execute_script("return getComputedStyle(arguments[0]).touchAction", canvas) == "pan-y"
        canvas.click()
        assert page.execute_script("return getComputedStyle(arguments[0]).touchAction", canvas) == "none", "it is used"
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_viewer_moves_by_touch(page):
    """A tap says what lies there; a finger that is drawn over a viewer in use goes through the scan."""
    open_viewer(page)
    canvas = find(page, ".open canvas")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    box = page.execute_script(
        "const b = arguments[0].getBoundingClientRect(); return [b.x, b.y, b.width, b.height]", canvas
    )
    page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})

    def touch(*places):
        for number, (x, y) in enumerate(places):
            point = {"x": box[0] + x * box[2], "y": box[1] + y * box[3]}
            kind = "touchMove" if number else "touchStart"
            page.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [point]})
        page.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        return read_values(page)

    try:
        tapped = touch((0.4, 0.5))
        assert touch((0.6, 0.6)) != tapped
        assert touch((0.6, 0.6), (0.5, 0.55), (0.4, 0.5)) == tapped
    finally:
        page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


def test_pictures_and_tables_are_there_without_scripts(browser, evaluation):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get((evaluation[0] / "report.html").as_uri())
        folded = browser.find_elements("css selector", "#table details:not(.held details)")[0]
        folded.find_element("css selector", "summary").click()
        assert folded.find_element("css selector", "img").is_displayed()
        for common in folded.find_elements("css selector", ":scope details > summary"):
            if common.is_displayed():  # regions that healthy scans commonly show
                common.click()
        assert folded.find_element("css selector", "table.regions").is_displayed()
        assert not find(browser, ".filters").is_displayed(), "what does nothing is not shown"
        assert find(browser, "#table thead th").text == "scan"
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
