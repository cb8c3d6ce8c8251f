"""A page of what is gained against what it costs."""

import re

from laconic.reports.front import Front, Point, best, write

UNIFORM = [Point(10, 80, "2 bits"), Point(20, 90, "4 bits"), Point(40, 91, "8 bits")]
MIXED = [Point(12, 88, "mixed <3>"), Point(21, 89, "mixed 4")]


def test_the_front_is_what_nothing_beats():
    found = best([*UNIFORM, *MIXED])
    assert [point.name for point in found] == ["2 bits", "mixed <3>", "4 bits", "8 bits"]
    assert best([Point(1, 5, "a"), Point(1, 6, "b")]) == [Point(1, 6, "b")]
    assert best([]) == []


def test_every_point_is_drawn_and_named(tmp_path):
    front = Front("Bits", "It pays.", "kB", "%", {"uniform": UNIFORM, "mixed": MIXED}, ["So."])
    text = write(front, tmp_path / "front.html").read_text()
    assert text.count("<circle") == 5
    assert text.count('stroke="#1c2430"') == 4
    assert text.count("on the front") == 4
    assert "mixed &lt;3&gt;" in text
    places = [tuple(map(float, found)) for found in re.findall(r'cx="(.+?)" cy="(.+?)"', text)]
    (x2, y2), _, (x8, y8), *_ = places
    assert x2 < x8
    assert y2 > y8  # more accurate is higher up


def test_equal_points_and_none_at_all_are_drawn(tmp_path):
    same = {"one": [Point(3, 50, "a"), Point(3, 50, "b")]}
    assert "nan" not in write(Front("t", "v", "c", "v", same), tmp_path / "a.html").read_text()
    assert "Nothing" in write(Front("t", "v", "c", "v", {}), tmp_path / "b.html").read_text()
