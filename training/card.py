"""Fills the model card from what training and evaluation left: python -m training.card --out DIR [--to CARD].

Draws the curves (needs matplotlib: pip install -e '.[training]') and fills the tables of CARD/README.md between their
markers; the text around them is written by hand.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from training.evaluate import THRESHOLDS

COLUMNS = tuple(THRESHOLDS)


def draw_curves(out: Path, path: Path) -> None:
    """VAE reconstruction (PSNR) and transformer loss against steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), constrained_layout=True)
    codec, flow = _read(out / "vae.jsonl"), _read(out / "dit.jsonl")
    left.plot([r["step"] for r in codec], [r["psnr"] for r in codec], color="#2f6fd0")
    left.set(title="VAE: reconstruction of training batches", xlabel="step", ylabel="PSNR, dB")
    right.plot([r["step"] for r in flow], [r["loss"] for r in flow], color="#c03a6b")
    right.set(title="transformer: flow-matching loss", xlabel="step", ylabel="MSE", yscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _read(path: Path) -> list[dict[str, Any]]:
    """Figures by step; a resumed run wrote some steps twice, the last one counts."""
    rows = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def tables(result: dict[str, Any]) -> str:
    """The evaluation as Markdown."""
    lines = [
        f"{result['clips']} prompts, settings: "
        + ", ".join(f"{k} {v}" for k, v in result["settings"].items() if v is not None and k != "num_frames"),
        "",
        _row(["", "clips", *COLUMNS]),
        _row(["---"] * (2 + len(COLUMNS))),
        _row(["asked for", "", *(f">= {THRESHOLDS[c]:.2f}" for c in COLUMNS)]),
        _row(["**all**", result["clips"], *(f"**{result['all'][c]:.3f}**" for c in COLUMNS)]),
        _row(["held-out combinations", result["clips"] // 4, *(f"{result['held_out'][c]:.3f}" for c in COLUMNS)]),
    ]
    for title, key in (("frames", "by_num_frames"), ("motion", "by_motion"), ("shape", "by_shape")):
        groups = sorted(result[key].items(), key=lambda item: (len(item[0]) if title == "frames" else 0, item[0]))
        for name, row in groups:
            lines.append(_row([f"{title} {name}", row["clips"], *(f"{row[c]:.3f}" for c in COLUMNS)]))
    lines.append(_row(["real clips (the judge's ceiling)", "", *(f"{result['ceiling'][c]:.3f}" for c in COLUMNS)]))
    control = result["wrong_prompts"]
    lines.append(_row(["clips of other prompts (control)", "", *(f"{control[c]:.3f}" for c in COLUMNS)]))
    if result["two_shapes"]:
        pairs = ", ".join(f"{name} {value:.2f}" for name, value in result["two_shapes"].items())
        lines += ["", f"Two shapes in one clip (share of clips in which both are right): {pairs}."]
    missed = ", ".join(f"{k} {v:.4f} instead of {THRESHOLDS[k]:.2f}" for k, v in result["missed"].items())
    return "\n".join([*lines, "", f"Missed thresholds: {missed or 'none'}."])


def _row(cells: list[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def fill(card: Path, name: str, text: str) -> None:
    """Replaces what stands between `<!-- name -->` and `<!-- /name -->`."""
    content = card.read_text()
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(content):
        raise SystemExit(f"{card} has no markers <!-- {name} --> ... <!-- /{name} -->")
    card.write_text(pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", content))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--to", type=Path, default=Path("training/card"))
    arguments = parser.parse_args()
    draw_curves(arguments.out, arguments.to / "curves.png")
    evaluation = json.loads((arguments.to / "evaluation.json").read_text())
    fill(arguments.to / "README.md", "evaluation", tables(evaluation))
