"""A real headless Chromium without a network, and what is expected of every page that we write."""

import shutil
from pathlib import Path

#: Name -> width, height and density of the screen.
SCREENS = {"desktop": (1280, 900, 1), "phone": (390, 844, 2)}

FLAGS = (
    (
        "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --host-resolver-rules=MAP*~NOTFOUND"
    )
    .replace("MAP*", "MAP *")
    .replace("~", " ")
)


class Browser:
    """One browser for many pages. Ends with `close`."""

    def __init__(self, profile: Path):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for flag in FLAGS:
            options.add_argument(flag)
