"""A page of several candidates: all values are there, bars are to scale, nothing is loaded."""

import re

import pytest

from laconic.reports.comparison import Comparison, Entry, render, write


def page(highest=None):
    entries = [
        Entry("obs", {"cut": 80.0, "repaired": 90.0}, note="beats chance", good=True),
        Entry("l1 <b>", {"cut": 20.0}, note="does not beat chance", good=False),
        Entry("chance", {"cut": 40.0}, {"cut": (30.0, 50.0)}),
    ]
    return Comparison(
        "Scores", "One loses.", ["cut", "repaired"], "%", entries, ["1,024 images"], highest
    )


@pytest.mark.parametrize("highest", [None, 100.0])
def test_bars_are_to_scale(highest):
    text = render(page(highest))
    widths = [float(w) for w in re.findall(r'<rect x="190" y="[0-9.]+" width="([0-9.]+)"', text)]
    top = highest or 90.0
    assert len(widths) == 5 - 1  # four values; the legend's squares are not bars
    assert widths == pytest.approx([700 * v / top for v in (80, 90, 20, 40)], abs=0.1)


def test_the_table_shows_values_spread_and_gaps():
    text = render(page())
    assert "40.00 [30.00–50.00]" in text
    assert "<td class=n>–</td>" in text
    assert "<td class=no>does not beat chance</td>" in text


def test_the_page_needs_no_other_file_and_escapes(tmp_path):
    text = write(page(), tmp_path / "page.html").read_text(encoding="utf-8")
    assert text == render(page())
    assert "l1 &lt;b&gt;" in text
    assert "l1 <b>" not in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text)


def test_a_page_without_entries_is_a_page():
    text = render(Comparison("Nothing", "No candidates.", ["cut"], "%", []))
    assert text.count("<svg") == 1
