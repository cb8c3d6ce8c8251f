"""The harness's book-keeping, on a clock that the tests drive."""

import pytest

from laconic.core.errors import DataError
from laconic.measuring import latency
from laconic.measuring.latency import Plan, compare


class _World:
    """A clock, the CPU time of all processes and of this one; calls move them on."""

    def __init__(self, monkeypatch):
        self.now, self.busy, self.own = 0.0, 0.0, 0.0
        self.log = []
        monkeypatch.setattr(latency.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(latency.time, "sleep", lambda seconds: self.pass_(seconds))
        monkeypatch.setattr(latency, "_cpu_seconds", lambda: (self.busy, self.own))

    def pass_(self, seconds, own=0.0, others=0.0):
        self.now += seconds
        self.own += own
        self.busy += own + others

    def call(self, name, seconds, others=lambda now: 0.0):
        def run():
            self.log.append(name)
            self.pass_(seconds, own=seconds, others=others(self.now) * seconds)

        return run


@pytest.fixture
def world(monkeypatch):
    return _World(monkeypatch)


def test_turns_alternate_and_medians_are_kept(world):
    plan = Plan(rounds=3, seconds=0.1, calls=2, warm_calls=0)
    found = compare(
        {"slow": world.call("slow", 0.02), "fast": world.call("fast", 0.005)},
        plan=plan,
        baseline="slow",
    )
    order = [
        name for name, before in zip(world.log, [None, *world.log], strict=False) if name != before
    ]
    assert order == ["slow", "fast", "slow", "fast", "slow", "fast"]  # first calls, 1, 2 back, 3
    assert found.latency["slow"].value == pytest.approx(20)
    assert found.latency["fast"].value == pytest.approx(5)
    assert found.ratio["fast"].value == pytest.approx(4)
    assert found.ratio["slow"].value == pytest.approx(1)
    assert found.latency["fast"].repeats == 3
    assert (found.repeated, found.disturbed) == (0, 0)


def test_a_turn_is_long_enough_and_has_calls_enough(world):
    compare(
        {"long": world.call("long", 1.0)}, plan=Plan(rounds=1, seconds=0.3, calls=3, warm_calls=2)
    )
    assert world.log.count("long") == 1 + 2 + 3
    world.log.clear()
    compare(
        {"short": world.call("short", 0.01)},
        plan=Plan(rounds=1, seconds=0.3, calls=3, warm_calls=0),
    )
    assert world.log.count("short") in (31, 32)


def test_disturbed_turns_are_repeated(world):
    noisy = world.call("x", 0.05, others=lambda now: 0.5 if now < 1.0 else 0.0)
    found = compare({"x": noisy}, plan=Plan(rounds=2, seconds=0.3))
    assert found.repeated > 0
    assert found.disturbed == 0
    assert found.latency["x"].conditions["repeated_turns"] == found.repeated


def test_repeating_is_bounded_and_what_was_kept_is_counted(world):
    found = compare(
        {"x": world.call("x", 0.05, others=lambda now: 1.0)}, plan=Plan(rounds=2, repeats=3)
    )
    assert (found.repeated, found.disturbed) == (3, 2)
    assert found.latency["x"].repeats == 2


def test_a_little_company_is_borne(world):
    found = compare({"x": world.call("x", 0.05, others=lambda now: 0.1)}, plan=Plan(rounds=2))
    assert (found.repeated, found.disturbed) == (0, 0)


def test_without_proc_nothing_is_repeated(world, monkeypatch):
    monkeypatch.setattr(latency, "_cpu_seconds", lambda: None)
    found = compare({"x": world.call("x", 0.05, others=lambda now: 1.0)}, plan=Plan(rounds=1))
    assert (found.repeated, found.disturbed) == (0, 0)


def test_conditions_and_spread_are_stated(world):
    speeds = iter([0.01] * 8 + [0.03] * 1000)

    def drifting():
        world.pass_(next(speeds))

    found = compare(
        {"x": drifting},
        plan=Plan(rounds=3, seconds=0.05, warm_calls=0),
        conditions={"x": {"threads": 2}},
    )
    value = found.latency["x"]
    assert (value.low, value.value, value.high) == pytest.approx((10, 10, 30))
    assert value.conditions["threads"] == 2
    assert "CPUs" in value.conditions["machine"]


def test_nothing_to_time_and_unknown_baselines_are_refused():
    with pytest.raises(DataError, match="nothing"):
        compare({})
    with pytest.raises(DataError, match="'y'"):
        compare({"x": lambda: None}, baseline="y")


def test_cpu_time_of_others_is_what_is_not_ours(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 10 20 500 5 3 2 7 50 0\ncpu0 1 2 3\n")
    monkeypatch.setattr(latency, "_STAT", stat)
    busy, own = latency._cpu_seconds()
    ticks = latency.os.sysconf("SC_CLK_TCK")
    assert busy == pytest.approx((100 + 10 + 20 + 3 + 2 + 7) / ticks)
    assert own > 0
    monkeypatch.setattr(latency, "_STAT", tmp_path / "none")
    assert latency._cpu_seconds() is None
