"""Bytes that ship and the high-water mark of a process."""

import pytest

from laconic.core.errors import DataError
from laconic.measuring import memory, size


def test_size_adds_up_files_and_folders(tmp_path):
    (tmp_path / "a.xml").write_bytes(b"x" * 10)
    below = tmp_path / "deep" / "deeper"
    below.mkdir(parents=True)
    (below / "b.bin").write_bytes(b"y" * 32)
    assert size.of(tmp_path / "a.xml").value == 10
    found = size.of([tmp_path / "a.xml", tmp_path / "deep"])
    assert (found.value, found.unit) == (42, "B")
    assert found.conditions["files"] == ["a.xml", "b.bin"]
    with pytest.raises(DataError, match="no such file"):
        size.of(tmp_path / "none")


def test_peak_memory_sees_what_was_held_for_a_moment(tmp_path, monkeypatch):
    (tmp_path / "hog.py").write_text(
        "def hold(mib):\n    held = b'x' * (mib << 20)\n    del held\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    little = memory.peak("hog:hold", {"mib": 1})
    much = memory.peak("hog:hold", {"mib": 65}, conditions={"batch": 1})
    assert much.value - little.value == pytest.approx(64, abs=16)
    assert much.unit == "MiB"
    assert much.conditions["batch"] == 1
    assert much.conditions["imports_only"] < little.value + 1


def test_a_failing_process_tells_why(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("def run():\n    raise ValueError('no such model')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match="no such model"):
        memory.peak("broken:run", {})


def test_a_hanging_process_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "asleep.py").write_text("import time\n\ndef run():\n    time.sleep(60)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match="not done after"):
        memory.peak("asleep:run", {}, timeout=0.5)
