"""Charts as SVG text: nothing to install, any browser shows them, in light and in dark mode.

    chart = panel("loss", [Line(steps, losses)], x=Axis("step"))       # one <svg>
    picture = sheet([chart, chart], {"run": 1})                        # a whole SVG file

Used by the picture of a training run, by sweeps, by the report and by the figure of the
architecture.
"""
import math
import re
from dataclasses import dataclass
from html import escape

COLOURS = 7                                 # colours of lines; more lines use them again
WIDTH, HEIGHT = 340, 220                    # pixels of a panel
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 28, 38   # its margins
# One palette for charts and report, {name: (light, dark)}: ink, its fainter shades, and lines that
# colour-blind readers can tell apart (the hues of Okabe and Ito). Line 0 is grey: the base.
PALETTE = {"paper": ("#ffffff", "#14171a"), "ink": ("#1d2126", "#e4e7ea"),
           "soft": ("#5d6670", "#9aa4ae"), "faint": ("#d9dee3", "#343a41"),
           "c0": ("#7a838c", "#939ca5"), "c1": ("#0068a8", "#58b0ea"),
           "c2": ("#c8550b", "#f08a45"), "c3": ("#00805f", "#2fc79c"),
           "c4": ("#a04f83", "#d98fbd"), "c5": ("#a67800", "#dfb13f"),
           "c6": ("#3b8fc4", "#9bd0f2"), "c7": ("#1d2126", "#e4e7ea")}
LIGHT, DARK = ("; ".join(f"--{name}: {pair[n]}" for name, pair in PALETTE.items())
               for n in (0, 1))
DARK_MODE = "@media (prefers-color-scheme: dark)"
RULES = """
svg.chart { font: 11px system-ui, sans-serif; fill: var(--ink); }
svg.chart .title { font-weight: 600; font-size: 12px; }
svg.chart .soft { fill: var(--soft); }
svg.chart .grid { stroke: var(--faint); }
svg.chart .guide { stroke: var(--soft); stroke-dasharray: 2 3; }
svg.chart .line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
svg.chart .band { opacity: .16; }
svg.chart .ring { fill: none; stroke-width: 1.4; }
"""
# For a page of HTML. A file of its own has no variables: `whole_file`.
STYLE = f"""
:root {{ color-scheme: light dark; {LIGHT}; }}
{DARK_MODE} {{ :root {{ {DARK}; }} }}{RULES}"""


@dataclass
class Line:
    """One line of a panel, or a cloud of dots.

    Points that are not finite are left out, and on a logarithmic axis those that are not positive.
    """
    x: list
    y: list
    colour: int = 0
    dashed: bool = False
    band: tuple = None          # (lows, highs), as long as y
    radius: list = None         # of a dot at each point; None: no dots
    ringed: list = None         # whether a point has a ring
    joined: bool = True         # whether the points are joined
    shift: float = 0            # pixels to the right, so that lines with the same x stay visible


@dataclass(frozen=True)
class Axis:
    label: str = ""
    range: tuple = None         # (lowest, highest); None: what the lines need
    log: bool = False


PLAIN = Axis()


# ---- Axes ----------------------------------------------------------------------------------------


def ticks(low, high, log=False):
    """Round numbers within [low, high]: 1, 2 or 5 times a power of ten, about five of them."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = math.ceil(len(decades) / 6)
        steps = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
        found = [s * 10.0 ** d for d in decades if d % every == 0 for s in steps]
    else:
        power = 10.0 ** math.floor(math.log10((high - low) / 4))
        step = next(s * power for s in (1, 2, 5, 10) if (high - low) / (s * power) <= 5)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        found = [k * step for k in range(first, last + 1)]
    return [t for t in found if low * (1 - 1e-9) <= t <= high * (1 + 1e-9) or low <= t <= high]


def number(value):
    """As short as a person would type it: 5e-7, 0.25, 1500."""
    text = f"{value:.5e}" if 0 < abs(value) < 1e-3 else f"{value:.6g}"
    mantissa, _, exponent = text.partition("e")
    return f"{float(mantissa):g}".replace("-", "−") + (f"e{int(exponent)}" if exponent else "")


def span(values, log):
    """The range of an axis that shows all values, with a little room around them."""
    values = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not values:
        return (1, 10) if log else (0, 1)
    low, high = min(values), max(values)
    if log:
        room = max((high / low) ** 0.06, 1.2)
        return low / room, high * room
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1
    return low - room, high + room


@dataclass
class Scale:
    """Where the values of an axis stand, in pixels: `low` at `start`, `high` at `end`."""
    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value):
        f = math.log10 if self.log else float
        length, low, high = self.end - self.start, f(self.low), f(self.high)
        return round(self.start + length * (f(value) - low) / (high - low), 2)

    def shows(self, *values):
        """Whether all values have a place: they are finite, and positive on a logarithmic axis."""
        return all(math.isfinite(v) and (v > 0 or not self.log) for v in values)


# ---- Panels --------------------------------------------------------------------------------------


def panel(title, lines, x=PLAIN, y=PLAIN, guides=(), diagonal=False):
    """One chart as an `<svg>` of WIDTH × HEIGHT.

    `guides` are y values that get a dotted line; `diagonal` draws one from corner to corner.
    """
    x_values, y_values = [], list(guides)
    for line in lines:
        x_values += line.x
        for values in (line.y, *(line.band or ())):
            y_values += values
    x_at = Scale(*(x.range or span(x_values, x.log)), LEFT, WIDTH - RIGHT, x.log)
    y_at = Scale(*(y.range or span(y_values, y.log)), HEIGHT - BOTTOM, TOP, y.log)

    out = [f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>', grid(x_at, y_at)]
    out += [f'<path class="guide" d="M{LEFT} {y_at(g)}H{WIDTH - RIGHT}"/>' for g in guides]
    if diagonal:
        corners = f"M{LEFT} {HEIGHT - BOTTOM}L{WIDTH - RIGHT} {TOP}"
        out.append(f'<path class="guide" d="{corners}"/>')
    out += [draw_line(line, x_at, y_at) for line in lines]
    out.append(f'<text class="soft" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" '
               f'text-anchor="middle">{escape(x.label)}</text>')
    out.append(f'<text class="soft" x="{WIDTH - RIGHT}" y="16" text-anchor="end">'
               f'{escape(y.label)}</text>')
    return svg(WIDTH, HEIGHT, "".join(out), f' role="img" aria-label="{escape(title)}"')


def grid(x_at, y_at):
    """The ticks of both axes, and a line across the panel at those of y."""
    out = []
    for t in ticks(y_at.low, y_at.high, y_at.log):
        out.append(f'<path class="grid" d="M{LEFT} {y_at(t)}H{WIDTH - RIGHT}"/>'
                   f'<text class="soft" x="{LEFT - 6}" y="{y_at(t) + 4}" text-anchor="end">'
                   f'{number(t)}</text>')
    for t in ticks(x_at.low, x_at.high, x_at.log):
        out.append(f'<path class="grid" d="M{x_at(t)} {HEIGHT - BOTTOM}v4"/>'
                   f'<text class="soft" x="{x_at(t)}" y="{HEIGHT - BOTTOM + 16}" '
                   f'text-anchor="middle">{number(t)}</text>')
    return "".join(out)


def draw_line(line, x_at, y_at):
    """A Line on two Scales: its band, then the line itself, then its dots."""
    def path(points):
        return "M" + "L".join(f"{x_at(x)} {y_at(y)}" for x, y in points)

    colour = f"var(--c{line.colour})"
    points = [n for n in range(len(line.x)) if x_at.shows(line.x[n]) and y_at.shows(line.y[n])]
    out = [f'<g transform="translate({line.shift:g})">']
    if line.band:
        lows, highs = line.band
        edge = [n for n in points if y_at.shows(lows[n], highs[n])]
        around = [(line.x[n], lows[n]) for n in edge]
        around += [(line.x[n], highs[n]) for n in reversed(edge)]
        if edge:
            out.append(f'<path class="band" fill="{colour}" d="{path(around)}Z"/>')
    if line.joined and len(points) > 1:
        dashes = ' stroke-dasharray="5 3"' if line.dashed else ""
        along = path((line.x[n], line.y[n]) for n in points)
        out.append(f'<path class="line" stroke="{colour}"{dashes} d="{along}"/>')
    for n in points if line.radius else ():
        place = f'cx="{x_at(line.x[n])}" cy="{y_at(line.y[n])}"'
        out.append(f'<circle {place} r="{line.radius[n]:.3g}" fill="{colour}">'
                   f'<title>{number(line.x[n])}: {line.y[n]:.4g}</title></circle>')
        if line.ringed and line.ringed[n]:
            radius = f"{line.radius[n] + 3.5:.3g}"
            out.append(f'<circle class="ring" stroke="{colour}" {place} r="{radius}"/>')
    return "".join([*out, "</g>"])


# ---- Files ---------------------------------------------------------------------------------------


def svg(width, height, content, attributes=""):
    return (f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" width="{width}" '
            f'height="{height}" viewBox="0 0 {width} {height}"{attributes}>{content}</svg>')


def sheet(panels, names, notes=(), columns=3):
    """Panels side by side under one legend, {name: colour}, and above notes → a whole SVG file."""
    columns, x, y, legend = min(columns, len(panels)), 16, 20, []
    width = columns * WIDTH
    for name, colour in names.items():
        needed = 34 + 6.5 * len(name)
        if x > 16 and x + needed > width:
            x, y = 16, y + 18
        legend.append(f'<path stroke="var(--c{colour})" stroke-width="3" d="M{x} {y - 4}h16"/>'
                      f'<text x="{x + 22}" y="{y}">{escape(name)}</text>')
        x += needed
    top = y + 14
    height = top + math.ceil(len(panels) / columns) * HEIGHT + 16 * len(notes) + 8
    placed = []
    for n, drawn in enumerate(panels):
        row, column = divmod(n, columns)
        place = f'x="{column * WIDTH}" y="{top + row * HEIGHT}"'
        placed.append(drawn.replace("<svg ", f"<svg {place} ", 1))
    below = [f'<text class="soft" x="16" y="{height - 16 * n - 8}">{escape(note)}</text>'
             for n, note in enumerate(reversed(notes))]
    return whole_file(width, height, "".join([*legend, *placed, *below]))


def plain(text, dark=False):
    """A text with colours in place of their names."""
    return re.sub(r"var\(--(\w+)\)", lambda name: PALETTE[name[1]][dark], text)


def whole_file(width, height, content, rules="", attributes=""):
    """A whole SVG file: plain colours, which every viewer shows, and others in dark mode, which
    browsers add.
    """
    rules = RULES + rules
    dark = [plain(rules, dark=True)]
    for light, other in PALETTE.values():
        dark += [f'[{what}="{light}"] {{ {what}: {other}; }}' for what in ("fill", "stroke")]
        dark.append(f'[style="fill: {light}"] {{ fill: {other} !important; }}')
    style = (f":root {{ color-scheme: light dark; }}{plain(rules)}"
             f"{DARK_MODE} {{{' '.join(dict.fromkeys(dark))}}}")
    paper = f'<rect width="{width}" height="{height}" fill="var(--paper)"/>'
    return svg(width, height, f"<style>{style}</style>{plain(paper + content)}", attributes) + "\n"
