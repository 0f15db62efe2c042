"""Draw architecture.svg, the layers of kcd_ext from top to bottom: `python docs/figures/architecture.py`."""

from pathlib import Path

WIDTH, MARGIN, GAP = 720, 12, 12
BOX, ARROW = 78, 26  # heights
# Each band: its colour and its boxes, each with a title and what it does.
BANDS = (
    ("#e8eaf6", (("commands", "the kcd command"), ("reports", "run folders to a page"))),
    ("#e3f2fd", (("training", "the loop: batches, phases, checkpoints, ranks"),)),
    ("#e0f2f1", (("methods", "what is distilled"), ("evaluation", "did it work?"))),
    ("#e8f5e9", (("condensation", "values, kept set"), ("models", "networks"), ("data", "images, views"))),
    ("#fff8e1", (("losses", "condensed_kd_loss, select_rows"), ("reference", "the same in PyTorch"))),
    ("#fff3e0", (("ops", "operators: fake kernels, autograd, fast path"),)),
    ("#fbe9e7", (("csrc/torch", "registration"), ("csrc/cpu", "CPU kernels"), ("csrc/cuda", "CUDA kernels"))),
    ("#fce4ec", (("csrc/math", "the formulas of a row and of the loss"),)),
)
FONT = 'font-family="DejaVu Sans, Helvetica, Arial, sans-serif" text-anchor="middle" fill="#212121"'


def box(x: float, y: float, width: float, colour: str, title: str, text: str) -> str:
    """Return a box with a title and a line of text."""
    middle = x + width / 2
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{BOX}" rx="8" fill="{colour}" stroke="#78909c"/>\n'
        f'<text x="{middle:g}" y="{y + 32:g}" font-size="23" font-weight="bold" {FONT}>{title}</text>\n'
        f'<text x="{middle:g}" y="{y + 60:g}" font-size="20" {FONT}>{text}</text>\n'
    )


def arrow(y: float) -> str:
    """Return an arrow that points from one band to the next."""
    x, end = WIDTH / 2, y + ARROW - 5
    return (
        f'<path d="M{x:g} {y + 3:g}V{end - 7:g}" stroke="#546e7a" stroke-width="3"/>\n'
        f'<path d="M{x - 9:g} {end - 9:g}L{x:g} {end:g}L{x + 9:g} {end - 9:g}Z" fill="#546e7a"/>\n'
    )


def draw() -> str:
    """Return the picture as SVG."""
    y, parts = MARGIN, []
    for number, (colour, boxes) in enumerate(BANDS):
        if number:
            parts.append(arrow(y))
            y += ARROW
        width = (WIDTH - 2 * MARGIN - GAP * (len(boxes) - 1)) / len(boxes)
        parts += [box(MARGIN + i * (width + GAP), y, width, colour, *texts) for i, texts in enumerate(boxes)]
        y += BOX
    size = f'viewBox="0 0 {WIDTH} {y + MARGIN}" width="{WIDTH}" height="{y + MARGIN}"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{background}\n{"".join(parts)}</svg>\n'


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw())
