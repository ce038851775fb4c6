"""The table of the long trainings and its verdicts."""

import json

import pytest

from benchmarks import pays, pays_table


@pytest.fixture
def keep(tmp_path):
    """Writes what was tested of an arm: `keep(arm, gates, mode=(MMACs, error, more of the second seed))`."""

    def write(arm, gates=(), seeds=pays.SEEDS, **tests):
        for index, seed in enumerate(seeds):
            folder = tmp_path / f"pays-{arm}-s{seed}"
            folder.mkdir()
            text = {
                mode: {"macs_mean": 1e6 * macs, "top1": 100 - error - index * sum(more), "gates": gates}
                for mode, (macs, error, *more) in tests.items()
            }
            (folder / "test.json").write_text(json.dumps(text))

    return write


@pytest.fixture
def static(keep):
    """All static nets, their means 20.1 at 10 MMACs, 15.1 at 30, 14.1 at 40."""
    for arm, macs, error in (("resnet8", 10, 20), ("resnet14", 30, 15), ("control", 40, 14)):
        keep(arm, argmax=(macs, error, 0.2))
        keep(f"{arm}-taught", argmax=(macs, error + 1, 0.1))  # the better one counts


def rows(folder, arm):
    """Of a gated net the cells of its comparisons."""
    lines = list(pays_table.table(folder))
    verdicts = lines[lines.index("") + 3 :]
    return [[cell.strip() for cell in line.split("|")[2:-1]] for line in verdicts if line.startswith(f"| {arm} |")]


def test_a_convex_curve_lies_between_its_bounds():
    points = [(macs, 100 / macs) for macs in (80, 10, 20, 40)]
    for macs in (12, 25, 30, 39, 70):
        lower, upper = pays_table.bounds(points, macs)
        assert lower < 100 / macs < upper
    assert pays_table.bounds(points, 20) == (5, 5)
    assert pays_table.bounds(points, 9) is pays_table.bounds(points, 81) is None
    assert pays_table.bounds([], 9) is pays_table.bounds([(9, 1)], 9) is None
    assert pays_table.bounds([(10, 20), (30, 16)], 30 / 3**0.5) == (None, pytest.approx(18))
    # the line through 30 and 90, prolonged; of two nets of the same cost the better one counts
    convex = [(10, 20), (30, 16), (30, 17), (90, 15)]
    assert pays_table.bounds(convex, 30 / 3**0.5) == (pytest.approx(16.5), pytest.approx(18))


@pytest.mark.parametrize(("distance", "word"), [
    (-0.51, "pays"), (-0.49, "undecided"), (0.49, "undecided"), (0.51, "loses"),
])
def test_a_net_is_judged_by_the_margin_of_half_a_point(tmp_path, keep, static, distance, word):
    keep("budget0.75", gates=[0.005, 0.5], **{"argmax@budget=0.75": (30, 15.1 + distance)})
    static_nets, same = rows(tmp_path, "budget0.75")
    difference = f"{distance:+.2f} ({0.1 + distance:+.2f} / {distance - 0.1:+.2f})"
    assert static_nets == ["1 of 2 / 1 of 2", "static nets", f"{15.1 + distance:.2f}", "15.10", difference, word]
    assert same[1:] == ["always the same blocks", "", "", "", "not yet: 6 trainings to come"]


@pytest.mark.parametrize(("error", "word"), [
    (16.5, "pays"), (16.52, "undecided"), (18.09, "undecided"), (18.11, "loses"),
])
def test_between_static_nets_a_verdict_takes_both_bounds(tmp_path, keep, static, error, word):
    """Halfway between 10 and 30 MMACs: 17.6 on the line, and 15.1 + log(3) / 2 / log(4 / 3) beyond 30 and 40."""
    keep("budget0.45", **{"argmax@budget=0.45": (30 / 3**0.5, error)})
    assert rows(tmp_path, "budget0.45")[0][3] == "17.01 to 17.60"
    assert rows(tmp_path, "budget0.45")[0][5] == word


def test_no_verdict_before_all_is_there(tmp_path, keep):
    keep("budget0.6", argmax=(20, 15))  # not yet tested at its budget
    keep("control", seeds=[1], argmax=(40, 14))
    keep("resnet8", argmax=(10, 20))
    assert {tuple(row[2:5]) for row in rows(tmp_path, "budget0.6")} == {("", "", "")}
    keep("budget0.75", seeds=[1], **{"argmax@budget=0.75": (40, 14.7)})
    assert rows(tmp_path, "budget0.75")[0][2:] == ["14.70", "14.00", "+0.70 (+0.70)", "not yet: 10 trainings to come"]
    keep("budget0.45", seeds=[2], **{"argmax@budget=0.45": (40, 14)})  # control has the other seed
    assert rows(tmp_path, "budget0.45")[0][2:5] == ["", "", ""]


def test_no_verdict_from_one_seed_where_the_other_is_out_of_range(tmp_path, keep, static):
    for seed, macs in ((1, 30), (2, 9)):
        keep("budget0.75", seeds=[seed], **{"argmax@budget=0.75": (macs, 10)})
    assert rows(tmp_path, "budget0.75")[0][2:] == ["10.00", "15.00", "-5.00 (-5.00)", "none: outside of their range"]


def test_the_better_kind_of_a_static_net_is_that_of_the_better_mean(tmp_path, keep):
    for seed, plain, taught in ((1, 10, 11), (2, 12, 10.5)):
        keep("control", seeds=[seed], argmax=(50, plain))
        keep("control-taught", seeds=[seed], argmax=(50, taught))
    found = {arm: pays_table.results(tmp_path, arm) for arm in ("control", "control-taught")}
    assert pays_table.static_points(found, pays.SEEDS) == [(50, 10.75)]  # not 10.25, the better one of each seed
    assert pays_table.static_points(found, [1]) == [(50, 10)]


def test_deciding_is_compared_with_the_same_blocks_at_equal_cost(tmp_path, keep):
    for arm, macs, error in (("majority0.45", 10, 17), ("majority0.6", 30, 15), ("majority0.75", 90, 14)):
        keep(arm, argmax=(macs, error))
    keep("budget0.6", **{"argmax@budget=0.6": (30 / 3**0.5, 14.9)})
    keep("budget0.75", **{"argmax@budget=0.75": (91, 13)})
    keep("budget0.45", **{"argmax@budget=0.45": (30, 15.4)})
    by_seed = "-1.10 (-1.10 / -1.10)"
    assert rows(tmp_path, "budget0.6")[1][2:] == ["14.90", "15.50 to 16.00", by_seed, "pays"]
    assert rows(tmp_path, "budget0.75")[1][2:] == ["", "", "", "none: outside of their range"]
    assert rows(tmp_path, "budget0.45")[1][2:] == ["15.40", "15.00", "+0.40 (+0.40 / +0.40)", "undecided"]


def test_adaptivity_is_judged_at_the_cost_of_the_fixed_gates(tmp_path, keep):
    """A net that errs less because it runs more is not adaptive for that."""
    tests = {"argmax": (30, 14.4), "argmax@budget=0.6": (10, 16), "argmax@budget=0.75": (30, 14)}
    keep("floor", gates=[0.3], **tests)
    keep("majority-floor", argmax=(30 / 3**0.5, 14.4))  # where floor has 15
    keep("random", sample=(10, 17), argmax=(10, 1))
    gates = "1 of 1 / 1 of 1"
    assert rows(tmp_path, "floor") == [
        [gates, "always its usual blocks", "15.00", "14.40", "+0.60 (+0.60 / +0.60)", "loses"],
        [gates, "random blocks", "16.00", "17.00", "-1.00 (-1.00 / -1.00)", "pays"],
    ]


def test_the_table_lists_every_mode_and_seed(tmp_path, keep, run):
    keep("rates", argmax=(40, 14, 0.5), sample=(30, 15))
    keep("floor", seeds=[2], argmax=(20, 16))
    lines = list(pays_table.table(tmp_path))
    assert "| rates | 1, 2 | `argmax` | 40.00 | 14.25 (14.00 / 14.50) |" in lines
    assert "| rates | 1, 2 | `sample` | 30.00 | 15.00 (15.00 / 15.00) |" in lines
    assert "| floor | 2 | `argmax` | 20.00 | 16.00 (16.00) |" in lines
    status, out, _ = run(pays_table.main, "--results", tmp_path)  # which has no runs/
    assert status == 0
    assert "not yet: 14 trainings to come" in out
