"""The table of the long trainings and its verdicts."""

import json
import random

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
    assert pays_table.bounds([], 9) is pays_table.bounds([(9, 1)], 10) is None
    assert pays_table.bounds([(10, 20), (30, 16)], 30 / 3**0.5) == (16, pytest.approx(18))  # a larger net is no worse
    # the line through 30 and 90, extended; of two nets of the same cost the better one counts
    convex = [(10, 20), (30, 16), (30, 17), (90, 15)]
    assert pays_table.bounds(convex, 30 / 3**0.5) == (pytest.approx(16.5), pytest.approx(18))


def test_a_net_that_another_one_beats_at_less_cost_does_not_count():
    points = [(10, 20), (30, 14), (40, 15)]
    assert pays_table.hull(points) == [(10, 20), (30, 14)]
    assert pays_table.bounds(points, 35) == pays_table.bounds(points, 40) == (14, 14)


def test_a_net_above_the_line_between_two_others_does_not_count():
    """Or else the lower bound would be above the upper one, and a net could pay within the margin."""
    points = [(10, 20), (20, 19), (40, 14), (80, 13)]
    assert pays_table.hull(points) == [(10, 20), (40, 14), (80, 13)]
    assert pays_table.bounds(points, 20) == (pytest.approx(15), pytest.approx(17))


def test_the_lower_bound_is_never_above_the_upper_one():
    draw = random.Random(0)
    for _ in range(2000):
        points = [(draw.randint(1, 20), draw.randint(0, 20)) for _ in range(draw.randint(1, 8))]
        macs = draw.randint(1, 20)
        if found := pays_table.bounds(points, macs):
            lower, upper = found
            assert min(error for _, error in points) <= lower <= upper + 1e-9
            assert upper <= min(error for cost, error in points if cost <= macs) + 1e-9


@pytest.mark.parametrize(("distance", "word"), [
    (-0.51, "pays"), (-0.49, "undecided"), (0.49, "undecided"), (0.51, "loses"),
])
def test_a_net_is_judged_by_the_margin_of_half_a_point(tmp_path, keep, static, distance, word):
    keep("budget0.75", gates=[0.005, 0.5], **{"argmax@budget=0.75": (30, 15.1 + distance)})
    static_nets, same = rows(tmp_path, "budget0.75")
    difference = f"{distance:+.2f} (seed 1: {0.1 + distance:+.2f}, seed 2: {distance - 0.1:+.2f})"
    numbers = [f"{15.1 + distance:.2f}", "15.10", difference]
    assert static_nets == ["0.75", "1 of 2 / 1 of 2", "static nets", *numbers, word]
    assert same[2:] == ["always the same blocks", "", "", "", "not yet: 8 trainings to come"]


@pytest.mark.parametrize(("error", "word"), [
    (16.5, "pays"), (16.52, "undecided"), (18.09, "undecided"), (18.11, "loses"),
])
def test_between_static_nets_a_verdict_takes_both_bounds(tmp_path, keep, static, error, word):
    """Halfway between 10 and 30 MMACs: 17.6 on the line, and 15.1 + log(3) / 2 / log(4 / 3) beyond 30 and 40."""
    keep("budget0.45", **{"argmax@budget=0.45": (30 / 3**0.5, error)})
    assert rows(tmp_path, "budget0.45")[0][4] == "17.01 to 17.60"
    assert rows(tmp_path, "budget0.45")[0][6] == word


def test_no_verdict_before_all_is_there(tmp_path, keep):
    keep("budget0.6", argmax=(20, 15))  # not yet tested at its budget
    keep("control", seeds=[1], argmax=(40, 14))
    keep("resnet8", argmax=(10, 20))
    assert {tuple(row[3:6]) for row in rows(tmp_path, "budget0.6")} == {("", "", "")}
    keep("budget0.75", seeds=[1], **{"argmax@budget=0.75": (40, 14.7)})
    numbers = ["14.70", "14.00", "+0.70 (seed 1: +0.70)"]
    assert rows(tmp_path, "budget0.75")[0][3:] == [*numbers, "not yet: 10 trainings to come"]
    keep("budget0.45", seeds=[2], **{"argmax@budget=0.45": (40, 14)})  # control has the other seed
    assert rows(tmp_path, "budget0.45")[0][3:6] == ["", "", ""]


def test_costs_that_differ_are_given_by_seed(tmp_path, keep):
    for arm, costs in (("majority-floor", (22, 17)), ("majority0.6", (22, 21))):
        for seed, macs in zip(pays.SEEDS, costs, strict=True):
            keep(arm, seeds=[seed], argmax=(macs, 12 + seed))
    lines = list(pays_table.table(tmp_path))
    assert "| majority-floor | 1, 2 | `argmax` | 19.50 (22.00 / 17.00) | 13.50 (13.00 / 14.00) |" in lines
    assert "| majority0.6 | 1, 2 | `argmax` | 21.50 | 13.50 (13.00 / 14.00) |" in lines


def test_no_verdict_while_a_test_is_missing(tmp_path, keep, static):
    keep("budget0.75", **{"argmax@budget=0.75": (30, 10)})
    assert rows(tmp_path, "budget0.75")[0][-1] == "pays"
    (tmp_path / "pays-resnet14-s2" / "test.json").write_text('{"sample": {"macs_mean": 3e7, "top1": 85}}')
    assert rows(tmp_path, "budget0.75")[0][4:] == ["15.00", "-5.00 (seed 1: -5.00)", "none: not tested at this cost"]


def test_between_its_budgets_a_net_is_on_the_line_of_the_neighbours():
    nets = [(10, 20), (20, 19), (40, 14)]
    assert pays_table.between(nets, 20) == 19  # though it is above the hull, which would favour the net
    assert pays_table.between(nets, 20 * 2**0.5) == pytest.approx(16.5)
    assert pays_table.between(nets, 41) is pays_table.between(nets, 9) is None


def test_seeds_are_averaged_where_the_same_nets_are_done(tmp_path, keep):
    """Or else seeds would be held against different rivals."""
    keep("resnet8", argmax=(10, 20))
    keep("control", argmax=(40, 14))
    keep("control-taught", seeds=[1], argmax=(40, 13))
    keep("budget0.75", **{"argmax@budget=0.75": (40, 14)})
    assert rows(tmp_path, "budget0.75")[0][3:6] == ["14.00", "13.00", "+1.00 (seed 1: +1.00)"]


def test_no_verdict_from_one_seed_where_the_other_is_out_of_range(tmp_path, keep, static):
    for seed, macs in ((1, 30), (2, 9)):
        keep("budget0.75", seeds=[seed], **{"argmax@budget=0.75": (macs, 10)})
    numbers = ["10.00", "15.00", "-5.00 (seed 1: -5.00)"]
    assert rows(tmp_path, "budget0.75")[0][3:] == [*numbers, "none: seed 2 outside of their range"]


def test_the_kind_of_a_static_net_is_that_of_the_lower_mean(tmp_path, keep):
    for seed, plain, taught in ((1, 10, 11), (2, 12, 10.5)):
        keep("control", seeds=[seed], argmax=(50, plain))
        keep("control-taught", seeds=[seed], argmax=(50, taught))
    found = {arm + kind: pays_table.results(tmp_path, arm + kind) for arm in pays.STATIC for kind in ("", "-taught")}
    assert pays_table.static_points(found, pays.SEEDS) == [[(50, 11)], [(50, 10.5)]]  # not 10, the better of seed 1
    assert pays_table.static_points(found, [1]) == [[(50, 10)]]


def test_deciding_is_compared_with_the_same_blocks_at_equal_cost(tmp_path, keep):
    for arm, macs, error in (("majority0.45", 10, 17), ("majority0.6", 30, 15), ("majority0.75", 90, 14)):
        keep(arm, argmax=(macs, error))
    keep("majority-floor", argmax=(30, 16))  # never the better choice
    keep("budget0.6", **{"argmax@budget=0.6": (30 / 3**0.5, 14.9)})
    keep("budget0.75", **{"argmax@budget=0.75": (91, 13)})
    keep("budget0.45", **{"argmax@budget=0.45": (30, 15.4)})
    by_seed = "-1.10 (seed 1: -1.10, seed 2: -1.10)"
    assert rows(tmp_path, "budget0.6")[1][3:] == ["14.90", "15.50 to 16.00", by_seed, "pays"]
    assert rows(tmp_path, "budget0.75")[1][3:] == ["", "", "", "none: outside of their range"]
    by_seed = "+0.40 (seed 1: +0.40, seed 2: +0.40)"
    assert rows(tmp_path, "budget0.45")[1][3:] == ["15.40", "15.00", by_seed, "undecided"]


def test_the_same_blocks_of_each_seed_are_compared_at_their_own_cost(tmp_path, keep):
    """The mean of two nets is no net: it would lie above the curve of either seed."""
    for seed, macs, error in ((1, 20, 15), (2, 30, 14)):
        keep("majority0.6", seeds=[seed], argmax=(macs, error))
        keep("majority0.75", seeds=[seed], argmax=(90, 13))
        keep("budget0.6", seeds=[seed], **{"argmax@budget=0.6": (macs, error)})
    assert rows(tmp_path, "budget0.6")[1][3:6] == ["14.50", "14.50", "+0.00 (seed 1: +0.00, seed 2: +0.00)"]


def test_adaptivity_is_judged_at_the_cost_of_the_fixed_gates(tmp_path, keep):
    """A net with a lower error because it runs more is not adaptive for that."""
    tests = {"argmax": (30, 14.4), "argmax@budget=0.6": (10, 16), "argmax@budget=0.75": (30, 14)}
    keep("floor", gates=[0.3], **tests)
    keep("majority-floor", argmax=(30 / 3**0.5, 14.4))  # where floor has 15
    keep("random", sample=(10, 17), argmax=(10, 1))
    gates = "1 of 1 / 1 of 1"
    lost, won = (f"{each} (seed 1: {each}, seed 2: {each})" for each in ("+0.60", "-1.00"))
    assert rows(tmp_path, "floor")[-2:] == [
        ["its cost", gates, "`majority-floor`", "15.00", "14.40", lost, "loses"],
        ["its cost", gates, "`random`", "16.00", "17.00", won, "pays"],
    ]


def test_the_nets_with_target_rates_or_a_floor_are_compared_with_static_ones_too(tmp_path, keep, static):
    for arm, error in (("floor", 15), ("rates", 16), ("scratch", 14)):
        keep(arm, gates=[0.5], **{f"argmax@budget={budget}": (30, error) for budget in (0.75, 0.6, 0.5)})
    verdicts = {arm: [row[0] + " " + row[-1] for row in rows(tmp_path, arm)] for arm in ("floor", "rates", "scratch")}
    for arm, word in (("floor", "undecided"), ("rates", "loses"), ("scratch", "pays")):
        assert verdicts[arm][:3] == [f"0.75 {word}", f"0.6 {word}", "0.45 none: not tested at this cost"]


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


def test_the_same_is_said_of_the_images_held_out(tmp_path, keep, static, run):
    keep("budget0.6", gates=[0.5, 1], argmax=(30, 20), **{"argmax@budget=0.6": (25, 3)})
    for folder in tmp_path.iterdir():
        top1 = json.loads((folder / "test.json").read_text())["argmax"]["top1"]
        epochs = [{"epoch": epoch, "val": {"top1": value}} for epoch, value in enumerate((1, top1 + 2))]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(epoch)}\n" for epoch in epochs))
    keep("budget0.45", argmax=(20, 9))  # without records
    (tmp_path / "runs").mkdir()
    for folder in tmp_path.glob("pays-*"):
        folder.rename(tmp_path / "runs" / folder.name)
    status, out, _ = run(pays_table.main, "--results", tmp_path, "--held-out")
    assert status == 0
    assert "| budget0.6 | 1, 2 | `argmax` | 30.00 | 18.00 (18.00 / 18.00) |" in out
    assert "| budget0.6 | argmax | 1 of 2 / 1 of 2 | static nets | 18.00 | 13.10 | +4.90 " in out
    assert "(seed 1: +5.00, seed 2: +4.80) | loses |" in out
    assert "| always the same blocks |  |  |  | not yet: 8 trainings to come |" in out
    assert "budget0.45 | 1" not in out
    assert "budget=" not in out
