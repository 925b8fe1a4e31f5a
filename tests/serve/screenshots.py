"""Pictures of the web page over the real model, as scripts/screenshots takes them.

python -m tests.serve.screenshots FOLDER
"""

import sys
from pathlib import Path

from playwright.sync_api import Browser, expect

from tests.serve.browser import chromium
from tests.serve.conftest import serving

QUESTION = "What is the capital of France?"


def picture(browser: Browser, url: str, path: Path, scheme: str) -> None:
    page = browser.new_page(viewport={"width": 1200, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
    page.goto(url)
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Seed").fill("3")
    page.get_by_label("Message", exact=True).fill(QUESTION)
    page.keyboard.press("Control+Enter")
    expect(page.locator(".answer .footer")).to_contain_text("tokens", timeout=400_000)
    expect(page.locator("#running")).to_have_text("0")
    page.locator(".token.unsure").nth(2).hover()
    page.screenshot(path=path)
    page.close()


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with serving("smollm2", OMP_NUM_THREADS="2") as server, chromium() as browser:
        for scheme in ("light", "dark"):
            path = folder / f"web-{scheme}.png"
            picture(browser, server.url, path, scheme)
            print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
