"""support/charts.py: what is drawn stands where the numbers say, and ticks are round numbers."""
import math
import re
import xml.etree.ElementTree as xml

import numpy as np
import pytest
from conftest import largest_difference
from drawings import dots_of, lines_of, path_points, place_of

from support.charts import (
    BOTTOM,
    DARK_MODE,
    HEIGHT,
    LEFT,
    PALETTE,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Line,
    number,
    panel,
    sheet,
    ticks,
)


@pytest.mark.parametrize("low, high, log, expected", [
    (0, 1, False, [0, .2, .4, .6, .8, 1]), (-0.06, 1.06, False, [0, .5, 1]),
    (-41, 1, False, [-40, -30, -20, -10, 0]), (0, 1672, False, [0, 500, 1000, 1500]),
    (1e-7, 1e-5, True, [1e-7, 2e-7, 5e-7, 1e-6, 2e-6, 5e-6, 1e-5]),
    (.01, 300, True, [.01, .1, 1, 10, 100]), (1e-12, 1, True, None), (3, 3.001, False, None)])
def test_ticks(low, high, log, expected):
    found = ticks(low, high, log)
    assert expected is None or np.allclose(found, expected)
    assert 2 <= len(found) <= 8 and found == sorted(found)
    assert low - 1e-12 <= min(found) and max(found) <= high + 1e-12
    assert len({number(t) for t in found}) == len(found)


def test_numbers_as_they_are_typed():
    values = (5e-7, 0.25, 1500., -3., 2e-4, -2.5e-6, 0.)
    assert [number(x) for x in values] == ["5e-7", "0.25", "1500", "−3", "2e-4", "−2.5e-6", "0"]


@pytest.mark.parametrize("log", [False, True])
def test_points_stand_where_the_numbers_say(log):
    x, y = [1e-7, 1e-6, 1e-4], [2., 30., 5.]
    points = Line(x, y, radius=[3, 3, 3], ringed=[False, True, False])
    x_axis, y_axis = Axis(range=(1e-7, 1e-4), log=log), Axis(range=(1, 100), log=log)
    drawn = xml.fromstring(panel("a < b", [points], x_axis, y_axis))
    f = np.log10 if log else np.array
    across = (f(x) - f(1e-7)) / (f(1e-4) - f(1e-7))
    up = (f(y) - f(1)) / (f(100) - f(1))
    expected = np.stack((LEFT + (WIDTH - RIGHT - LEFT) * across,
                         HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * up), 1)              # (3, 2)
    dots, rings = dots_of(drawn)
    assert largest_difference("dots", [place_of(dot) for dot in dots], expected) < 0.006
    line, = lines_of(drawn)
    assert largest_difference("line", path_points(line), expected) < 0.006
    ring, = rings
    assert ring.get("cx") == dots[1].get("cx") and drawn.get("aria-label") == "a < b"


def test_what_cannot_be_drawn_is_left_out():
    points = Line([1, 2, 3, 4, 5], [1., math.nan, 0., math.inf, 10.])
    line, = lines_of(xml.fromstring(panel("", [points], y=Axis(log=True))))
    assert len(path_points(line)) == 2
    xml.fromstring(panel("nothing", [Line([], [])]))
    xml.fromstring(panel("one value", [Line([1, 1], [5., 5.])]))


def test_a_file_has_plain_colours_and_others_in_dark_mode():
    """Viewers without variables (rsvg-convert) showed everything black."""
    text = sheet([panel("a", [Line([1, 2], [1, 2], colour=1)])], {"run": 1})
    before, _, dark = text.partition(DARK_MODE)
    assert "var(" not in text and text.count(DARK_MODE) == 1
    assert "fill: #1d2126" in before and "svg.chart .soft { fill: #5d6670; }" in before
    rules, _, content = dark.partition("</style>")
    assert "svg.chart .soft { fill: #9aa4ae; }" in rules
    assert '[stroke="#0068a8"] { stroke: #58b0ea; }' in rules
    used = set(re.findall(r'(?:fill|stroke)="(#\w+)"', content))
    assert used == {"#0068a8", "#ffffff"} and all(f'"{colour}"' in rules for colour in used)
    light = [pair[0] for name, pair in PALETTE.items() if name != "c7"]       # c7 is ink
    assert len(set(light)) == len(light)
