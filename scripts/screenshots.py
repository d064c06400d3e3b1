"""Pictures of a report's page and of the playground for docs/, as chromium shows them.

scripts/screenshots.py REPORT PHOTO, where REPORT is a folder that `sdvae eval` wrote.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from sdvae.report.comparison import write_report

DOCS = Path(__file__).parents[1] / "docs"
SIZE = {"width": 1360, "height": 850}
MARGIN_PX = 16
MAX_BYTES = 250_000
MINUTES_MS = 600_000


def show_below_top(page: Page, selector: str) -> None:
    """Scroll so that nothing above this element is seen, not even half of a line."""
    page.locator(selector).first.evaluate(f"it => scrollTo(0, scrollY + it.getBoundingClientRect().top - {MARGIN_PX})")


def save(page: Page, path: Path) -> None:
    page.wait_for_timeout(300)  # pictures are decoded after they are loaded
    page.screenshot(path=path, type="jpeg", quality=80)
    if path.stat().st_size > MAX_BYTES:
        sys.exit(f"{path} has more than {MAX_BYTES} bytes")
    print(path)


def shoot_report(browser: Browser, report: Path) -> None:
    page = browser.new_page(viewport=SIZE, color_scheme="light")
    page.goto(write_report(report).absolute().as_uri())
    show_below_top(page, ".headed")
    save(page, DOCS / "report.jpg")


def shoot_app(browser: Browser, vaes: list[str], photo: Path) -> None:
    named = [argument for vae in vaes for argument in ("--vae", vae)]
    command = [sys.executable, "-m", "sdvae", "app", *named, "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as app:
        assert app.stdout is not None
        page = browser.new_page(viewport=SIZE, color_scheme="dark")
        page.goto(json.loads(app.stdout.readline())["url"])
        page.locator("#files").set_input_files(photo)
        page.locator(".photo").wait_for(timeout=MINUTES_MS)
        show_below_top(page, "#ask fieldset")
        save(page, DOCS / "app.jpg")
        app.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--vae", action="append", default=[], help="of the playground; can be repeated")
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        shoot_report(browser, arguments.report)
        shoot_app(browser, arguments.vae, arguments.photo)
        browser.close()


if __name__ == "__main__":
    main()
