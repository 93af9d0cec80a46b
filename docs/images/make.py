"""Make the pictures of a report in the docs: `python docs/images/make.py runs/quickstart`.

Those that are there show a shortened quickstart: `distill train quickstart` with
data.demo.train_clips=1000 data.demo.val_clips=100 data.demo.test_clips=200 run.log_steps=5, ten
epochs of `distilled`, and twelve of `finetuned` and `scratch` on a share of 0.3. Takes what
`pip install 'distill-video[test]'` brings and a Chromium (`apt-get install chromium`).
"""

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from distill.report.page import write_report

HERE = Path(__file__).parent
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
SHOTS = {  # name: colour scheme, width and height, the run that is open, what is scrolled to
    "report": ("light", (1180, 1100), None, None),
    "report-patches": ("dark", (1180, 900), "distilled", ".watched"),
}


def shoot(run: Path, folder: Path, shots: dict = SHOTS, colours: int = 128) -> list[str]:
    """Write the pictures; returns what the browser had to complain of."""
    complaints: list[str] = []
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        page_file = write_report([run], Path(place) / "report.html")
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=FLAGS
        )
        for name, (scheme, (width, height), opened, target) in shots.items():
            page = browser.new_page(
                color_scheme=scheme, viewport={"width": width, "height": height}
            )
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.goto(page_file.resolve().as_uri())
            if opened:
                page.locator(f"summary:has(h2:text-is('{opened}'))").click()
            if target:
                page.locator(f"details[open] {target}, main > {target}").first.evaluate(
                    "e => e.closest('section').scrollIntoView()"
                )
            page.wait_for_timeout(800)
            image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            image.quantize(colours).save(folder / f"{name}.png", optimize=True)
        browser.close()
    return complaints


if __name__ == "__main__":
    sys.exit("\n".join(shoot(Path(sys.argv[1]), HERE)) or None)
