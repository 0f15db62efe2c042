"""Draw condensation.svg: how many samples are kept over the paper's 240 epochs, from `KnowledgeCondenser` itself.

Run `python docs/figures/condensation.py` after a change of the schedules.
"""

from pathlib import Path

import torch

from kcd_ext import KnowledgeCondenser

N, KEEP, EVERY, STAGES = 50_000, 0.7, 40, 6  # CIFAR-100 as in the paper
EPOCHS = EVERY * STAGES
# Colour, dash pattern, and the end of the label (epoch, percent of N) of every schedule.
STYLES = {
    "reference": ("#c2410c", "none", 156, 81.2),
    "cosine": ("#1d4ed8", "9 5", 236, 95.6),
    "immediate": ("#15803d", "2 4", 236, 66.6),
}
WIDTH, HEIGHT = 480, 342
LEFT, RIGHT, TOP, BOTTOM = 52, 468, 56, 280
LOWEST, HIGHEST = 65, 103  # percent


def sizes(schedule: str) -> list[int]:
    """Return the samples kept in every epoch, and after the last one."""
    condenser = KnowledgeCondenser(N, keep=KEEP, every=EVERY, stages=STAGES, schedule=schedule)
    condenser.update(torch.arange(N), torch.rand(N))
    kept = []
    for _ in range(EPOCHS):
        kept.append(len(condenser.kept))
        condenser.step()
    return [*kept, len(condenser.kept)]


def x(epoch: float) -> float:
    """Return the horizontal position of an epoch."""
    return round(LEFT + (RIGHT - LEFT) * epoch / EPOCHS, 1)


def y(percent: float) -> float:
    """Return the vertical position of a percentage of N."""
    return round(BOTTOM - (BOTTOM - TOP) * (percent - LOWEST) / (HIGHEST - LOWEST), 1)


def text(at_x: float, at_y: float, content: str, anchor: str = "middle", colour: str = "#333", extra: str = "") -> str:
    """Return a text element."""
    return f'<text x="{at_x}" y="{at_y}" text-anchor="{anchor}" fill="{colour}"{extra}>{content}</text>'


def steps(kept: list[int]) -> str:
    """Return the path of a step function."""
    path = f"M{x(0)} {y(100 * kept[0] / N)}"
    for epoch in range(1, EPOCHS + 1):
        if kept[epoch] != kept[epoch - 1]:
            path += f"H{x(epoch)}V{y(100 * kept[epoch] / N)}"
    return path + f"H{x(EPOCHS)}"


def draw() -> str:
    """Return the figure."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="14">',
        "<title>Samples kept over 240 epochs with each schedule</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        text(12, 22, f"samples kept, % of {N // 1000} 000", "start"),
    ]
    for percent in (70, 80, 90, 100):
        parts.append(f'<path d="M{LEFT} {y(percent)}H{RIGHT}" stroke="#ddd"/>')
        parts.append(text(LEFT - 8, y(percent) + 5, str(percent), "end"))
    for stage in range(1, STAGES + 1):
        parts.append(f'<path d="M{x(stage * EVERY)} {TOP}V{BOTTOM}" stroke="#bbb" stroke-dasharray="3 3"/>')
        parts.append(text(x(stage * EVERY) - 4, TOP - 6, f"stage {stage}" if stage == 1 else str(stage), colour="#666"))
    for epoch in range(0, EPOCHS + 1, EVERY):
        parts.append(text(x(epoch) - (6 if epoch == EPOCHS else 0), BOTTOM + 20, str(epoch)))
    parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 42, "epoch"))
    parts.append(f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="#333"/>')
    labels = []
    for schedule, (colour, dashes, label_epoch, label_height) in STYLES.items():
        kept = sizes(schedule)
        share = 100 * sum(kept[:EPOCHS]) / (N * EPOCHS)
        parts.append(
            f'<path d="{steps(kept)}" fill="none" stroke="{colour}" stroke-width="3" stroke-dasharray="{dashes}"/>'
            f'<circle cx="{x(EPOCHS)}" cy="{y(100 * kept[-1] / N)}" r="4.5" fill="{colour}"/>'
        )
        label = f"{schedule}: {share:.1f} % of visits"
        labels.append(text(x(label_epoch), y(label_height), label, "end", colour))
    halo = ' paint-order="stroke" stroke="#fff" stroke-width="4"'
    parts += [label.replace("<text", f'<text font-weight="bold" font-size="13"{halo}') for label in labels]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw())
