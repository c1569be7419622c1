"""What stands in a drawn SVG, and made-up runs to draw.

    found = panels(svg)                                  # {title: its <svg>}
    points = path_points(lines_of(found["loss"])[0])     # [(x, y), ...] in pixels
    path, rows = write_run(tmp_path / "run", steps=20)
"""
import json
import math
import xml.etree.ElementTree as xml

import numpy as np

SVG = "{http://www.w3.org/2000/svg}"


def panels(svg):
    """{title: its <svg>}"""
    return {inner.get("aria-label"): inner for inner in xml.fromstring(svg).iter(SVG + "svg")
            if inner.get("aria-label")}


def paths_of(panel, name):
    """Its paths of one class: "line" or "band"."""
    return [path for path in panel.iter(SVG + "path") if path.get("class") == name]


def lines_of(panel):
    return paths_of(panel, "line")


def path_points(path):
    return [tuple(map(float, point.split()))
            for point in path.get("d")[1:].rstrip("Z").split("L")]


def is_dashed(path):
    return path.get("stroke-dasharray") is not None


def dots_of(panel):
    """Circles: the dots, the rings around some of them."""
    circles = list(panel.iter(SVG + "circle"))
    return ([circle for circle in circles if not circle.get("class")],
            [circle for circle in circles if circle.get("class") == "ring"])


def place_of(circle):
    return float(circle.get("cx")), float(circle.get("cy"))


def write_run(folder, steps, seed=0):
    """The metrics.jsonl of a preference run → its path, its rows."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    rows = []
    for n in range(steps):
        noise = .01 * rng.standard_normal()
        rows.append({"step": n + 1, "loss": .69 * math.exp(-n / steps) + noise,
                     "rewards/margin": n / steps, "rewards/accuracy": .5, "logps/chosen": -1.,
                     "logps/rejected": -1. - n, "grad_norm": 1 + rng.random(),
                     "learning_rate": 1e-3 * (1 - n / steps)})
    write_rows(folder / "metrics.jsonl", rows)
    return str(folder / "metrics.jsonl"), rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
