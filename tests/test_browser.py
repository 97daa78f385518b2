"""report.html in a browser: it sorts, finds, unfolds, shows the viewer and fits on a phone."""

import csv
import shutil

import pytest


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
