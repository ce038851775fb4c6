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


def test_between_two_nets_the_error_is_linear_in_the_logarithm_of_the_cost():
    points = [(40, 14.0), (10, 20.0), (30, 16.0)]
    assert pays_table.error_at(points, 30 / 3**0.5) == pytest.approx(18)
    assert pays_table.error_at(points, 30) == pytest.approx(16)
    assert pays_table.error_at(points, 41) is pays_table.error_at(points, 9) is None


def test_a_convex_curve_lies_between_the_line_and_its_lower_bound():
    points = [(macs, 100 / macs) for macs in (10, 20, 40, 80)]
    for macs in (12, 25, 30, 39, 70):
        assert pays_table.least_at(points, macs) < 100 / macs < pays_table.error_at(points, macs)
    assert pays_table.least_at(points[:2], 15) is pays_table.least_at(points, 9) is None
    assert pays_table.least_at([(10, 20), (30, 16), (90, 15)], 30 / 3**0.5) == pytest.approx(16.5)


@pytest.mark.parametrize(("distance", "word"), [
    (-0.51, "pays"), (-0.49, "undecided"), (0.49, "undecided"), (0.51, "loses"),
])
def test_a_net_is_judged_by_the_margin_of_half_a_point(tmp_path, keep, static, distance, word):
    keep("budget0.75", gates=[0.005, 0.5], **{"argmax@budget=0.75": (30, 15.1 + distance)})
    line, bound, same = rows(tmp_path, "budget0.75")
    sides = f"{15.1 + distance:.2f} against 15.10"
    by_seed = f"{0.1 + distance:+.2f} / {distance - 0.1:+.2f}"
    assert line == ["1 of 2 / 1 of 2", "static nets, line", sides, f"{distance:+.2f} ({by_seed})", word]
    assert bound[1] == "static nets, lower bound"
    assert same[1:] == ["always the same blocks", "", "", "not yet: 6 trainings to come"]


def test_no_verdict_before_all_is_there(tmp_path, keep):
    keep("budget0.6", argmax=(20, 15))  # not yet tested at its budget
    keep("control", seeds=[1], argmax=(40, 14))
    keep("resnet8", argmax=(10, 20))
    assert {tuple(row[2:4]) for row in rows(tmp_path, "budget0.6")} == {("", "")}
    keep("budget0.75", seeds=[1], **{"argmax@budget=0.75": (40, 14.7)})
    line, _, _ = rows(tmp_path, "budget0.75")
    assert line[2:] == ["14.70 against 14.00", "+0.70 (+0.70)", "not yet: 10 trainings to come"]
    keep("budget0.45", seeds=[2], **{"argmax@budget=0.45": (40, 14)})  # control has the other seed
    assert rows(tmp_path, "budget0.45")[0][2:4] == ["", ""]


def test_the_better_kind_of_a_static_net_is_that_of_the_better_mean(tmp_path, keep, static):
    for seed, plain, taught in ((1, 10, 11), (2, 12, 10.5)):
        keep("resnet26", seeds=[seed], argmax=(50, plain))
        keep("resnet26-taught", seeds=[seed], argmax=(50, taught))
    found = {arm: pays_table.results(tmp_path, f"resnet26{arm.partition('-')[1]}{arm.partition('-')[2]}")
             for arm in ("control", "control-taught")}
    assert pays_table.static_points(found, pays.SEEDS) == [(50, 10.75)]  # not 10.25, the better one of each seed
    assert pays_table.static_points(found, [1]) == [(50, 10)]


def test_deciding_is_compared_with_the_same_blocks_at_equal_cost(tmp_path, keep):
    for arm, macs, error in (("majority0.45", 10, 17), ("majority0.6", 30, 15), ("majority0.75", 40, 14)):
        keep(arm, argmax=(macs, error))
    keep("budget0.6", **{"argmax@budget=0.6": (30 / 3**0.5, 15.4)})
    keep("budget0.75", **{"argmax@budget=0.75": (41, 13)})
    keep("budget0.45", **{"argmax@budget=0.45": (30, 15.4)})
    assert rows(tmp_path, "budget0.6")[2][2:] == ["15.40 against 16.00", "-0.60 (-0.60 / -0.60)", "pays"]
    assert rows(tmp_path, "budget0.75")[2][2:] == ["", "", "outside of their range"]
    assert rows(tmp_path, "budget0.45")[2][2:] == ["15.40 against 15.00", "+0.40 (+0.40 / +0.40)", "undecided"]


def test_adaptivity_is_judged_at_the_cost_of_the_fixed_gates(tmp_path, keep):
    """A net that errs less because it runs more is not adaptive for that."""
    tests = {"argmax": (30, 14.4), "argmax@budget=0.6": (10, 16), "argmax@budget=0.75": (30, 14)}
    keep("floor", gates=[0.3], **tests)
    keep("majority", argmax=(30 / 3**0.5, 14.4))  # where floor has 15
    keep("random", sample=(10, 17), argmax=(10, 1))
    assert rows(tmp_path, "floor") == [
        ["1 of 1 / 1 of 1", "majority", "15.00 against 14.40", "+0.60 (+0.60 / +0.60)", "loses"],
        ["1 of 1 / 1 of 1", "random", "16.00 against 17.00", "-1.00 (-1.00 / -1.00)", "pays"],
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
