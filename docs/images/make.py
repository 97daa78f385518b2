"""Make every picture of the README and docs from the demo, so that they cannot grow old.

`make demo` first; this reads what it leaves in runs/demo-dae/evaluation. The pictures of the report need Chromium with
its driver (Debian: chromium, chromium-driver) and selenium; without them they stay as they are, and it says so.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
DEMO = HERE.parents[1] / "runs" / "demo-dae" / "evaluation"
PAGE_WIDTH = 1100  # pixels of the browser's window
JPEG_QUALITY = 85


def choose_scans(evaluation: Path) -> list[str]:
    """Two abnormal scans: the one with the highest score, and the one in the middle, which flatters nobody."""
    with open(evaluation / "scans.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["label"] == "abnormal"]
    rows.sort(key=lambda row: -float(row["score"]))
    return [rows[0]["scan"], rows[len(rows) // 2]["scan"]]


def find_panel(evaluation: Path, scan: str) -> Path:
    """The picture of the scan's worst slice; with --panels all or a number, that of the highest score."""
    with open(evaluation / "scores.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["label"] == "abnormal" and row["scan"] == scan]
    worst = max(rows, key=lambda row: float(row["score"]))
    return evaluation / "error_maps" / "abnormal" / f"{scan}_slice_{int(worst['slice']):03d}.png"


def stack_pictures(paths: list[Path], target: Path) -> None:
    """One picture with the others below each other on white."""
    pictures = [Image.open(path).convert("RGB") for path in paths]
    size = max(picture.width for picture in pictures), sum(picture.height for picture in pictures)
    canvas, top = Image.new("RGB", size, "white"), 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height
    canvas.save(target, optimize=True)


@contextlib.contextmanager
def open_browser() -> Iterator:
    """A headless Chromium; None where selenium, the browser or its driver is missing."""
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    try:
        from selenium import webdriver
    except ImportError:
        webdriver = None
    if not (webdriver and program and driver):
        yield None
        return
    options = webdriver.ChromeOptions()
    options.binary_location = program
    size = f"--window-size={PAGE_WIDTH},1400"
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars", size):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


def photograph(browser, top: float, bottom: float, target: Path) -> None:
    """Save what the page shows between two heights, in CSS pixels from its top."""
    clip = {"x": 0, "y": top, "width": PAGE_WIDTH, "height": bottom - top, "scale": 1}
    options = {"format": "jpeg", "quality": JPEG_QUALITY, "captureBeyondViewport": True, "clip": clip}
    target.write_bytes(base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", options)["data"]))


def measure(browser, selector: str) -> tuple[float, float]:
    """(top, bottom) of the first element of a CSS selector, in CSS pixels from the page's top."""
    script = """const box = document.querySelector(arguments[0]).getBoundingClientRect();
        return [box.top + scrollY, box.bottom + scrollY]"""
    return tuple(browser.execute_script(script, selector))


def photograph_report(browser, report: Path, out: Path) -> None:
    """report_results.jpg: the top of the report; report_scan.jpg: its table of scans, with the first one opened."""
    from selenium.webdriver.support.wait import WebDriverWait

    browser.get(report.as_uri())
    wait = WebDriverWait(browser, 30)
    photograph(browser, 0, measure(browser, "section[aria-labelledby=results]")[1] + 8, out / "report_results.jpg")
    browser.execute_script("document.querySelector('#table .name').click()")
    # eager: a lazy picture below the window would never come
    loaded = """return [...document.querySelectorAll('.open img')]
        .map(image => { image.loading = 'eager'; return image.naturalWidth }).every(width => width > 0)"""
    wait.until(lambda _: browser.execute_script(loaded))
    wait.until(lambda _: browser.execute_script("return Object.values(viewers).every(viewer => viewer.scan)"))
    top, bottom = measure(browser, "#table")[0], measure(browser, ".open")[1]
    photograph(browser, top - 8, bottom + 8, out / "report_scan.jpg")


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=formatter)
    parser.add_argument("--evaluation", type=Path, default=DEMO, help="folder that evaluate.py left")
    parser.add_argument("--out", type=Path, default=HERE, help="where the pictures go")
    args = parser.parse_args(argv)
    evaluation = args.evaluation.resolve()
    if not (evaluation / "metrics.json").exists():
        print(f"{evaluation}: holds no finished evaluation; run `make demo` first", file=sys.stderr)
        return 1
    panels = [find_panel(evaluation, scan) for scan in choose_scans(evaluation)]
    stack_pictures(panels, args.out / "example.png")
    print(f"example.png of {panels[0].name} and {panels[1].name}")
    with open_browser() as browser:
        if browser is None:
            print("report_results.jpg and report_scan.jpg stay as they are: no selenium, Chromium or driver here")
        else:
            photograph_report(browser, evaluation / "report.html", args.out)
            print("report_results.jpg and report_scan.jpg of report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
