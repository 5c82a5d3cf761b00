"""Pages that we write, in a real headless Chromium without a network, on a desktop's screen and on a phone's.

Skipped where there is no Chromium; REQUIRE_BROWSER=1 makes its absence a failure.
"""

import os
import shutil
from pathlib import Path

import pytest

from flow import browse
from flow.page import Heading, Picture, to_html
from tests.tiny import made_run
from train.report import write_report
from train.report_parts import SECTIONS

#: Width and height in px, and how many pixels of the screen one of them is.
SCREENS = {"desktop": (1280, 900, 1), "phone": (390, 844, 2)}

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND",  # no name is found
)

OFFLINE = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}


def run_report(folder, packed):
    return write_report(made_run(packed, folder / "run"))


def empty_report(folder, packed):
    (folder / "empty").mkdir()
    return write_report(folder / "empty")


def experiments_report(folder, packed):
    return Path(__file__).parent.parent / "docs" / "experiments" / "report.html"


def packed_set(folder, packed):
    assert browse.main([str(packed), "--out", str(folder / "browse.html")]) == 0
    return folder / "browse.html"


#: What to look at: what writes it, from a folder to do so in and a packed set; and headings that it has.
PAGES = {
    "report of a run": (run_report, [*SECTIONS]),
    "report of nothing": (empty_report, [*SECTIONS]),
    "packed set": (packed_set, ["Contact sheet", "Classes"]),
    "report of the experiments": (experiments_report, ["The paper's experiments, and ours", "Findings"]),
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One browser for all pages; it reaches no network."""
    browsers = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    programs = [next(filter(None, browsers), None), shutil.which("chromedriver")]
    if None in programs:
        message = "no chromium and chromedriver: apt-get install chromium chromium-driver"
        pytest.fail(message) if os.environ.get("REQUIRE_BROWSER") == "1" else pytest.skip(message)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", OFFLINE)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(packed, tmp_path_factory):
    """Name -> path of each page, written once."""
    folder = tmp_path_factory.mktemp("pages")
    return {name: write(folder, packed) for name, (write, _) in PAGES.items()}


def faults(browser, page, screen):
    """Open a page, as a file, on a screen: what is wrong with it, in words. A headless window cannot be as narrow as a
    phone, so its screen is emulated.
    """
    width, height, density = SCREENS[screen]
    metrics = {"width": width, "height": height, "deviceScaleFactor": density, "mobile": screen == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get_log("browser")  # forget the page before
    browser.get(page.resolve().as_uri())
    found = [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    broken = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.alt)"
    found += [f"an image that is none: {alt}" for alt in browser.execute_script(broken)]
    wide, inner = browser.execute_script("return [document.scrollingElement.scrollWidth, window.innerWidth]")
    if inner != width or wide > inner:
        found.append(f"{wide} px wide on a screen of {inner}")
    return found


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_from_a_file_without_a_network(browser, pages, name, screen):
    assert faults(browser, pages[name], screen) == []
    headings = "return [...document.querySelectorAll('h1, h2, h3')].map(h => h.innerText)"
    assert set(PAGES[name][1]) <= set(browser.execute_script(headings))
    assert browser.execute_script("return getComputedStyle(document.body).fontSize") == "15px"


def test_what_is_wrong_is_found(browser, tmp_path):
    page = to_html([Heading("Wrong", 1), Picture(b"no image", "image/png", "broken")])
    more = "<img src='http://example.org/x.png' alt='far'><script>throw Error('mine')</script>"
    (tmp_path / "wrong.html").write_text(page.replace("</body>", f"{more}<p style='width:2000px'>wide</p></body>"))
    found = "\n".join(faults(browser, tmp_path / "wrong.html", "phone"))
    for fault in ("an image that is none: broken", "an image that is none: far", "mine", "example.org", "px wide on a"):
        assert fault in found
