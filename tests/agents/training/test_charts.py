import math
import re
from xml.etree import ElementTree

from agents.training.charts import Line, chart, ticks


def parsed(drawn):
    return ElementTree.fromstring(f"<div>{drawn}</div>")


def test_ticks_are_round_and_inside():
    for low, high in ((0, 1), (-3.2, 11), (1e-7, 3e-7), (5, 5), (0, 130), (0.2499, 0.2501)):
        found = ticks(low, high)
        assert all(low - 1e-9 <= value <= high + 1e-9 for value in found)
        if high > low:
            assert 2 <= len(found) <= 7


def test_a_line_runs_through_its_points():
    drawn = chart([Line("one", "red", [0, 1, 2], [0.0, 1.0, 0.0])], "iteration", "reward")
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in parsed(drawn).iter("circle")]
    assert dots[0][1] == dots[2][1] > dots[1][1]  # the higher value is further up
    assert math.isclose(dots[1][0] - dots[0][0], dots[2][0] - dots[1][0], abs_tol=0.2)
    texts = [t.text for t in parsed(drawn).iter("text")]
    assert {"iteration", "reward", "0", "1", "2"} <= set(texts)


def test_words_are_no_markup():
    drawn = chart([Line("<b>$a_b$", "red", [0, 1], [1, 2]), Line("&", "blue", [0, 1], [1, 2])], "<i>", "$x$")
    assert "<b>$a_b$" in "".join(parsed(drawn).itertext())
    assert {"<i>", "$x$"} <= {t.text for t in parsed(drawn).iter("text")}


def test_what_is_not_finite_is_left_out():
    nan = math.nan
    drawn = chart([Line("a", "red", [0, 1, 2], [nan, 1.0, 2.0], [nan, 0.5, 1.0], [nan, 1.5, math.inf])], "x", "y")
    assert len(list(parsed(drawn).iter("circle"))) == 1
    assert "nan" not in drawn
    assert chart([Line("a", "red", [0, 1], [nan, nan])], "x", "y") == ""
    assert chart([], "x", "y") == ""


def test_a_long_line_is_thinned_to_means():
    drawn = chart([Line("a", "red", range(10_000), [float(i % 2) for i in range(10_000)])], "x", "y")
    path = next(p.get("d") for p in parsed(drawn).iter("path") if p.get("stroke") == "red")
    points = re.findall(r"[ML]([\d.]+) ([\d.]+)", path)
    assert 200 < len(points) <= 400
    assert len({y for _, y in points}) <= 3  # means of 25 neighbours: 12/25 and 13/25
