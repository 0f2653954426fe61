"""A headless Chromium, driven by selenium, that opens a report."""

import contextlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def missing() -> str:
    """The missing requirements of the browser tests on this machine; "" if none."""
    lacks = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    lacks += [] if importlib.util.find_spec("selenium") else ["selenium (extra 'browser')"]
    return ", ".join(lacks)


@contextlib.contextmanager
def chromium(width: int = 1366, height: int = 900) -> Iterator["Browser"]:
    """A browser that logs its console and every request."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    with tempfile.TemporaryDirectory() as profile:
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--disable-background-networking",
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options, Service(shutil.which("chromedriver") or ""))
        try:
            driver.set_script_timeout(60)
            driver.get("about:blank")
            driver.get_log("performance")  # of the browser's own first page
            yield Browser(driver)
        finally:
            driver.quit()


class Browser:
    """One page and what the tests ask of it."""

    def __init__(self, driver: Any):
        self.driver = driver

    def open(self, report: Path) -> None:
        self.driver.get(report.resolve().as_uri())
        self.settle()

    def js(self, script: str, *args: Any) -> Any:
        return self.driver.execute_script(script, *args)

    def settle(self) -> None:
        """Waits until every figure in sight is drawn."""
        self.driver.execute_async_script(
            """
            const done = arguments[arguments.length - 1];
            const wait = () => {
              const figures = [...document.querySelectorAll(".page.shown figure.plot")];
              const waiting = figures.filter((f) => !f.closest("[hidden]") && !f.dataset.drawn);
              if (waiting.length) setTimeout(wait, 20); else setTimeout(done, 60);
            };
            wait();
            """
        )

    @property
    def menu(self) -> list[str]:
        return self.js("return [...document.querySelectorAll('nav a')].map((a) => a.textContent)")

    def show(self, page: str) -> None:
        """Follows the menu's link to a page."""
        from selenium.webdriver.common.by import By

        self.driver.find_element(By.LINK_TEXT, page).click()
        self.settle()

    def data(self, figure: str) -> list[dict[str, Any]]:
        """Plotly's data of a drawn figure."""
        text = self.js(
            "const gd = document.getElementById(arguments[0]);"
            "return JSON.stringify(gd.data)", figure
        )  # fmt: skip
        return json.loads(text)

    def problems(self) -> list[str]:
        """The messages of the console since the last call, at any level."""
        return [f"{e['level']}: {e['message']}" for e in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that were asked for, besides the file and inline data."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [event for event in events if event["method"] == "Network.requestWillBeSent"]
        urls = [event["params"]["request"]["url"] for event in sent]
        return [url for url in urls if not url.startswith(("file:", "data:", "blob:"))]

    def pdf(self) -> bytes:
        import base64

        return base64.b64decode(self.driver.print_page())

    def screenshot(self, path: Path, height: int = 0) -> None:
        """A picture of the window, or of the page's whole height."""
        if height:
            self.driver.set_window_size(1366, height)
        self.driver.save_screenshot(str(path))
