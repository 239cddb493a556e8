"""Draws the pictures of the documentation as SVG, with fonts of the reader's own system.

    python tools/docs/figures.py            writes docs/images/*.svg
    python tools/docs/figures.py --check    exit status 1 if one of them is not what this script draws

The rooms of the packages and their order are those of tests/test_architecture.py.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools.docs.rooms import rooms as order_of_rooms  # noqa: E402  (after the path is set)

IMAGES = ROOT / "docs" / "images"

INK, SOFT, LINE, PAPER = "#1f2933", "#52606d", "#9aa5b1", "#fbfbf9"
BLUE, ORANGE, FREE, PALE, FILL = "#3366b8", "#d9822b", "#e4e7eb", "#f1f3f5", "#ffffff"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"


class Svg:
    """A drawing of a given size in px; positions are in px from the upper left corner."""

    def __init__(self, width: int, height: int, title: str):
        self.width = width
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="{FONT}" font-size="13" role="img">',
            f"<title>{escape(title)}</title>",
            f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0,0 L8,4 L0,8 z" fill="{SOFT}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="10" fill="{PAPER}"/>',
        ]

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 13,
        color: str = INK,
        anchor: str = "start",
        bold: bool = False,
        mono: bool = False,
    ) -> None:
        style = (f' font-family="{MONO}"' if mono else "") + (' font-weight="600"' if bold else "")
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{style}>'
            f"{escape(text)}</text>"
        )

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str, line: str = "none", rx: float = 0
    ) -> None:
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{rx:g}" fill="{fill}" '
            f'stroke="{line}"/>'
        )

    def box(
        self, x: float, y: float, width: float, height: float, title: str, lines: Sequence[str] = (), fill: str = FILL
    ) -> None:
        """A box with a bold title and lines below it."""
        self.rect(x, y, width, height, fill, LINE, 6)
        top = y + height / 2 - 8 * len(lines) + 5
        self.text(x + width / 2, top, title, anchor="middle", bold=True)
        for i, line in enumerate(lines):
            self.text(x + width / 2, top + 17 * (i + 1), line, size=12, color=SOFT, anchor="middle")

    def frame(self, x: float, y: float, width: float, height: float, title: str) -> None:
        """A dashed frame with its title inside, at the top."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="{PALE}" stroke="{LINE}" '
            'stroke-dasharray="4 3"/>'
        )
        self.text(x + 12, y + 20, title, size=12, color=SOFT)

    def arrow(self, points: Sequence[tuple[float, float]], label: str = "", both: bool = False, at: float = -7) -> None:
        """A line through points with a tip at its end; the label stands above the middle of its first part."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        start = ' marker-start="url(#tip)"' if both else ""
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{SOFT}" stroke-width="1.4" marker-end="url(#tip)"{start}/>'
        )
        if label:
            (x0, y0), (x1, y1) = points[:2]
            self.text((x0 + x1) / 2, (y0 + y1) / 2 + at, label, size=11, color=SOFT, anchor="middle")

    def grid(self, x: float, y: float, cell: float, colors: Sequence[Sequence[str]]) -> None:
        """Squares in rows, `cell` px apart."""
        for i, row in enumerate(colors):
            for j, color in enumerate(row):
                self.rect(x + j * cell, y + i * cell, cell - 1, cell - 1, color, rx=1.5)

    def __str__(self) -> str:
        return "\n".join([*self._parts, "</svg>", ""])


def masks() -> Svg:
    """A and B of one checkpoint, and what three requests take of it."""
    rows, rank, each = 14, 8, 22
    order = random.Random(7).sample(range(rows * rank), 2 * each)
    owner = dict.fromkeys(order[:each], "math") | dict.fromkeys(order[each:], "nlu")
    color = {"math": BLUE, "nlu": ORANGE}

    def b(active: Iterable[str]) -> list[list[str]]:
        names = set(active)
        flat = [color[owner[i]] if owner.get(i) in names else FREE for i in range(rows * rank)]
        return [flat[i * rank : (i + 1) * rank] for i in range(rows)]

    svg = Svg(880, 330, "One checkpoint: a frozen A from a seed, and a sparse B in which each task owns its positions")
    svg.text(24, 32, "One checkpoint", bold=True, size=15)
    svg.grid(36, 58, 15, b(["math", "nlu"]))
    svg.text(36 + 60, 288, "B, sparse", anchor="middle", bold=True)
    svg.text(36 + 60, 306, "no position has two tasks", anchor="middle", size=12, color=SOFT)
    svg.text(172, 170, "×", size=20, anchor="middle", color=SOFT)
    tones = random.Random(3)
    svg.grid(192, 103, 15, [[tones.choice(("#c5ccd3", "#d3d9de", "#b8c0c8")) for _ in range(16)] for _ in range(rank)])
    svg.text(192 + 120, 244, "A, shared by all tasks", anchor="middle", bold=True)
    svg.text(192 + 120, 262, "random, frozen, rebuilt from a seed", anchor="middle", size=12, color=SOFT)
    for i, (name, text) in enumerate((("math", "math"), ("nlu", "nlu"), ("", "free for later tasks"))):
        x = (192, 252, 302)[i]
        svg.rect(x, 62, 12, 12, color.get(name, FREE), rx=2)
        svg.text(x + 17, 73, text, size=12)
    svg.rect(458, 20, 1, 290, LINE)
    svg.text(482, 32, "One server, each request chooses", bold=True, size=15)
    requests = (("{math}", ["math"]), ("{math, nlu}", ["math", "nlu"]), ("base", []))
    for i, (label, active) in enumerate(requests):
        x = 492 + i * 128
        svg.grid(x, 58, 12, b(active))
        svg.text(x + 48, 250, label, anchor="middle", mono=True)
    svg.text(482, 288, "W + Σ w · α/r · B · A, over the tasks of the request,", size=12, color=SOFT)
    svg.text(482, 306, "mixed in one batch", size=12, color=SOFT)
    return svg


def processes() -> Svg:
    """The processes of a server, with vLLM and without it."""
    svg = Svg(880, 400, "The processes of a server")
    svg.text(24, 30, "--backend resident, slots", mono=True, bold=True)
    svg.box(24, 96, 110, 56, "client", ("any gRPC client",))
    svg.frame(190, 48, 220, 160, "loraf-serve")
    svg.box(206, 78, 188, 48, "service", ("checks, queue, drain",))
    svg.box(206, 144, 188, 48, "adapters", ("names, loading, memory",))
    svg.frame(470, 48, 150, 160, "vLLM's engine core")
    svg.box(482, 96, 126, 62, "scheduler", ("batches, KV cache",))
    svg.frame(680, 48, 176, 160, "vLLM's worker")
    svg.box(692, 78, 152, 48, "model", ("layers with a delta",))
    svg.box(692, 144, 152, 48, "checkpoint store", ("A and B, verified",))
    svg.arrow([(134, 124), (190, 124)], "gRPC", both=True)
    svg.arrow([(410, 124), (470, 124)], "tokens", both=True)
    svg.arrow([(620, 124), (680, 124)], "steps", both=True)
    svg.text(24, 246, "--backend merged", mono=True, bold=True)
    svg.box(24, 296, 110, 56, "client", ("any gRPC client",))
    svg.frame(190, 258, 430, 122, "loraf-serve")
    svg.box(206, 296, 188, 56, "service, adapters", ("as above",))
    svg.box(430, 296, 174, 56, "transformers", ("sets take turns in W",))
    svg.arrow([(134, 324), (190, 324)], "gRPC", both=True)
    svg.arrow([(394, 324), (430, 324)], both=True)
    svg.text(648, 306, "loraf-train is one process,", size=12, color=SOFT)
    svg.text(648, 324, "or one a GPU under accelerate", size=12, color=SOFT)
    return svg


def _chain(
    svg: Svg, y: float, boxes: Sequence[tuple[str, Sequence[str]]], width: float, gap: float, x: float = 24
) -> None:
    for i, (title, lines) in enumerate(boxes):
        left = x + i * (width + gap)
        svg.box(left, y, width, 74, title, lines)
        if i:
            svg.arrow([(left - gap, y + 37), (left, y + 37)])


def request() -> Svg:
    """From a request to the pieces of its answer."""
    svg = Svg(880, 260, "The life of a request")
    first = (
        ("admission", ("service/admission", "queue or retry later")),
        ("validation", ("request/", "every mistake at once")),
        ("task set", ("loraf/tasksets", "canonical: math:0.5+nlu")),
        ("backend", ("backends/, vllm/", "set becomes weights")),
    )
    _chain(svg, 30, first, 178, 40)
    svg.arrow([(767, 104), (767, 150)])
    second = (
        ("pieces", ("service/messages", "streamed to the client")),
        ("text", ("tokens to text", "stops, finish reason")),
        ("layer", ("kernels/", "y = W·x + delta(x)")),
        ("step", ("vLLM's scheduler", "any sets in one batch")),
    )
    for i, (title, lines) in enumerate(second):
        left = 24 + i * 218
        svg.box(left, 150, 178, 74, title, lines)
        if i:
            svg.arrow([(left, 187), (left - 40, 187)])
    svg.text(
        440,
        248,
        "a cancelled or expired request is aborted in the engine at once",
        size=12,
        color=SOFT,
        anchor="middle",
    )
    return svg


def training() -> Svg:
    """A run of loraf-train, task after task."""
    svg = Svg(880, 290, "The life of a training run")
    svg.box(24, 40, 150, 74, "settings", ("tasks.yaml, --set",))
    svg.box(214, 40, 170, 74, "preflight", ("model, records, capacity", "all mistakes at once"))
    svg.arrow([(174, 77), (214, 77)])
    svg.frame(424, 14, 432, 262, "for each task that the checkpoint does not have yet")
    svg.box(440, 48, 180, 66, "calibrate", ("B dense on free positions", "for a few batches"))
    svg.box(660, 48, 180, 66, "mask", ("the K positions", "that moved most"))
    svg.box(660, 170, 180, 66, "train", ("K values, B starts anew", "A and W stay frozen"))
    svg.box(440, 170, 180, 66, "commit", ("task file, then manifest", "then scores"))
    svg.arrow([(384, 77), (440, 77)])
    svg.arrow([(620, 81), (660, 81)])
    svg.arrow([(750, 114), (750, 170)])
    svg.arrow([(660, 203), (620, 203)])
    svg.arrow([(530, 170), (530, 114)])
    svg.text(540, 146, "next task", size=11, color=SOFT)
    svg.text(
        640, 262, "state on disk at least every minute: a killed run goes on here", size=12, color=SOFT, anchor="middle"
    )
    svg.box(24, 170, 150, 66, "serve, export", ("loraf-serve, PEFT",))
    svg.box(214, 170, 170, 66, "checkpoint", ("loraf.json, tasks/",))
    svg.arrow([(440, 203), (384, 203)])
    svg.arrow([(214, 203), (174, 203)])
    return svg


def rooms() -> Svg:
    """The rooms of each package from the top down; a room imports rooms below it only."""
    columns = [(package, names, ROOT / package) for package, names in order_of_rooms().items()]
    step, top = 27, 64
    tallest = max(len(names) for _, names, _ in columns)
    height = top + tallest * step + 84
    svg = Svg(880, height, "The rooms of the packages; a room imports rooms below it only")
    for i, (title, names, folder) in enumerate(columns):
        x = 24 + i * 284
        svg.text(x + 8, 34, title, mono=True, bold=True)
        for j, name in enumerate(names):
            is_folder = (folder / name).is_dir()
            y = top + j * step
            svg.rect(x + 8, y, 220, step - 5, FILL if is_folder else PALE, LINE, 4)
            svg.text(x + 118, y + 15, f"{name}/" if is_folder else name, size=12, anchor="middle", mono=True)
        svg.arrow([(x + 242, top), (x + 242, top + len(names) * step - 5)])
    base = top + tallest * step + 20
    svg.rect(32, base, 816, 44, FILL, LINE, 6)
    svg.text(440, base + 19, "loraf", anchor="middle", bold=True, mono=True)
    svg.text(440, base + 36, "projection, task sets, checkpoint, ΔW", anchor="middle", size=12, color=SOFT)
    return svg


def retention() -> Svg:
    """From the end of one task to the training of the next."""
    svg = Svg(880, 270, "How a finished task is protected while later ones train")
    svg.frame(16, 16, 400, 238, "when a task ends")
    svg.box(32, 52, 164, 66, "its own examples", ("up to 128, all tasks", "so far are on"))
    svg.box(236, 52, 164, 66, "random probes", ("of its answers' logits,", "two backward passes"))
    svg.box(236, 166, 164, 66, "G and C", ("one pair a module,", "no text, no example"))
    svg.box(32, 166, 164, 66, "statistics/TASK", ("beside the task's file,", "never read by a server"))
    svg.arrow([(196, 85), (236, 85)])
    svg.arrow([(318, 118), (318, 166)])
    svg.arrow([(236, 199), (196, 199)])
    svg.frame(464, 16, 400, 238, "while later tasks train, at every step")
    svg.box(480, 52, 164, 66, "D", ("all later tasks'", "scaled values"))
    svg.box(684, 52, 164, 66, "P = Σ tr(G·D·C·Dᵀ)", ("predicted mean squared", "change of a logit"))
    svg.box(684, 166, 164, 66, "λ", ("rises while P is", "above the budget²"))
    svg.box(480, 166, 164, 66, "gradient", ("of the loss", "+ 2·λ·s·(G·D·C)"))
    svg.arrow([(644, 85), (684, 85)])
    svg.arrow([(766, 118), (766, 166)])
    svg.arrow([(684, 199), (644, 199)])
    svg.arrow([(562, 166), (562, 118)])
    svg.arrow([(114, 232), (114, 262), (440, 262), (440, 135), (464, 135)])
    return svg


# Mean squared change of a logit of pig-latin after four tasks: as measured, then with one assumption more a row. They
# are those of docs/explanation/retention.md.
LEFT_OUT = (
    ("measured", 0.221, ""),
    ("linear, exact", 0.152, "no curvature"),
    ("layers apart", 0.123, "modules of one layer together"),
    ("modules apart", 0.083, "each module alone, exact"),
    ("G and C, whole", 0.064, "K-FAC"),
    ("G of rank 16, as used", 0.055, "and the rest of its diagonal"),
)


def assumptions() -> Svg:
    """What the prediction loses with each assumption."""
    svg = Svg(880, 92 + 34 * len(LEFT_OUT), "What each assumption of the prediction leaves out")
    svg.text(24, 32, "Mean squared change of a logit", bold=True, size=15)
    svg.text(
        24,
        52,
        "pig-latin's answers after three later tasks; each row assumes what those above it do, and more",
        color=SOFT,
    )
    before = None
    for i, (name, figure, note) in enumerate(LEFT_OUT):
        y, width = 74 + 34 * i, 400 * figure / LEFT_OUT[0][1]
        color = BLUE if i else ORANGE
        svg.text(200, y + 16, name, anchor="end")
        svg.rect(212, y, width, 22, color, rx=2)
        svg.text(220 + width, y + 16, f"{figure:.3f}", bold=True)
        if before is not None:
            svg.text(672, y + 16, f"÷ {before / figure:.2f}", size=12, color=SOFT, anchor="end")
        svg.text(684, y + 16, note, size=12, color=SOFT)
        before = figure
    return svg


FIGURES = {
    "masks": masks,
    "processes": processes,
    "request": request,
    "training": training,
    "rooms": rooms,
    "retention": retention,
    "assumptions": assumptions,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a picture is out of date")
    arguments = parser.parse_args(argv)
    stale = []
    for name, draw in FIGURES.items():
        file, text = IMAGES / f"{name}.svg", str(draw())
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not arguments.check:
            IMAGES.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    if stale and arguments.check:
        print(f"out of date: {', '.join(stale)}; run python tools/docs/figures.py", file=sys.stderr)
        return 1
    print(f"drawn: {', '.join(stale) or 'nothing new'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
