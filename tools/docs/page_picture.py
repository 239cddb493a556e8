"""Takes the pictures of the task mixer that the documentation shows, in light and dark.

    make demo                            trains the checkpoint that they show
    python tools/docs/page_picture.py    writes docs/images/task-mixer-light.png and -dark.png

Needs Debian's chromium. The font is Inter where it is installed (Debian's fonts-inter and fonts-jetbrains-mono).
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image
from playwright.sync_api import sync_playwright

from loraf_serve.launch import launch

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
VIEW = {
    "mix": "pig-latin+count:0.9",
    "q": "How many letters are in window?",
    "max": "24",
    "pins": ["pig-latin", "count", "base"],
}
WIDTH, SCALE = 1180, 2  # px of the page, and of the picture for each of them
COLOURS = 128  # of the picture, which keeps it small
MOST_BYTES = 200_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(ROOT / "examples" / "demo" / "ckpt"), help="(examples/demo/ckpt)")
    parser.add_argument("--backend", default="resident", choices=["resident", "slots", "merged"], help="(resident)")
    arguments = parser.parse_args()
    options = ["--http-port", "0", "--backend", arguments.backend, "--dtype", "float32"]
    if arguments.backend != "merged":
        options += ["--enforce-eager", "--max-model-len", "1024"]
    with launch("tiny", f"demo={arguments.checkpoint}", options=tuple(options)) as server:
        pictures = take(server.http)
    for theme, picture in pictures.items():
        file = IMAGES / f"task-mixer-{theme}.png"
        file.write_bytes(picture)
        print(f"{file.relative_to(ROOT)}: {len(picture) // 1000} kB")
    return int(any(len(picture) > MOST_BYTES for picture in pictures.values()))


def take(address: str) -> dict[str, bytes]:
    """Theme → PNG of the page from its top to the mask map, after it has answered a question."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        pictures = {}
        for theme in ("light", "dark"):
            page = browser.new_page(
                viewport={"width": WIDTH, "height": 1400}, device_scale_factor=SCALE, color_scheme=theme
            )
            page.goto(f"{address}/#{urlencode(VIEW, doseq=True)}")
            page.wait_for_selector("canvas")
            page.click("#send")
            page.wait_for_function("() => document.querySelector('#said').textContent.includes('complete')")
            page.evaluate("() => document.activeElement.blur()")
            page.mouse.move(0, 0)
            box = page.locator(".bench.even").bounding_box()
            assert box is not None
            clip = {"x": 0, "y": 0, "width": WIDTH, "height": box["y"] + box["height"] + 10}
            pictures[theme] = smaller(page.screenshot(clip=clip))
        browser.close()
    return pictures


def smaller(png: bytes) -> bytes:
    """The picture with few colours."""
    with Image.open(io.BytesIO(png)) as image:
        out = io.BytesIO()
        image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


if __name__ == "__main__":
    sys.exit(main())
