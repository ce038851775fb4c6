"""The report: its statistics, its verdicts, and that it says what is missing."""

import math

import pytest

from aig.console import InputError
from aig.runs import read_json, read_records, write_json, write_records
from benchmarks import report, reproduction
from benchmarks.report import Difference, difference, verdict

FLAGS = dict(reproduction.protocol(dropped=True))


def write_run(results, name, errors, epochs=None, seconds=10, **options):
    """A run folder with these errors by gate mode; those of the epochs fall to the first of them.

    Args:
        epochs: that were run; all by default.
        options: entries of args.json, `flags` other than those of the protocol, `fractions`, the executed part of the
            multiply-accumulates by gate mode, where it is not 0.75, and `executed`, the execution rate in training.
    """
    flags, fractions = options.pop("flags", FLAGS.get(name, "--epochs 12")), options.pop("fractions", {})
    executed, words = options.pop("executed", 0.75), flags.split()
    last = int(words[words.index("--epochs") + 1])
    epochs = last if epochs is None else epochs
    folder = results / "runs" / name
    folder.mkdir(parents=True)
    args = {"epochs": last, "parameters": 277820, "git_commit": "0123456789abcdef-dirty", "hardware": "a machine",
            "versions": {"torch": "2.14.1"}, "data": "/home/someone/cifar10-jpeg", "depth": 20, "target": 0.7,
            "commands": [f"train.py --data /home/someone/cifar10-jpeg {flags} --resume auto"], **options}
    write_json(folder / "args.json", args)
    error = next(iter(errors.values()), 50)
    top1 = {epoch: 100 - error - (last - epoch) for epoch in range(1, epochs + 1)}  # a point better with every epoch
    common = {"seconds": seconds, "train": {"execution_rate": executed}}
    write_records(folder, [{"epoch": e, **common, "val": {"top1": top1[e]}} for e in top1])
    costs = {"execution_rate": 0.75, "macs_mean": 30e6, "macs_paper": 30e6}
    if errors:
        tests = {mode: {"top1": 100 - error, "epoch": last, "macs_fraction": fractions.get(mode, 0.75), **costs}
                 for mode, error in errors.items()}
        write_json(folder / "test.json", tests)
    return folder


def write_arm(results, arm, errors, shift=0):
    """An arm of the small protocol: the seeds' errors in mode argmax; in the other modes they are lower by `shift`."""
    gated = arm not in ("plain", "stochastic-depth")
    for seed, error in enumerate(errors, start=1):
        other = dict.fromkeys(("sample", "expected", "all"), error - shift) if gated else {}
        write_run(results, f"small-{arm}-s{seed}", {"argmax": error, **other})


def row(text, *cells):
    """The cells of the one table row that begins with these."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n") if line.startswith("|")]
    (found,) = [found for found in rows if tuple(found[: len(cells)]) == cells]
    return found


def section(text, title):
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_a_test_at_a_budget_with_a_threshold_for_each_gate_is_read_past(tmp_path):
    folder = write_run(tmp_path, "full-plain", {"argmax": 20})
    tests = read_json(folder / "test.json")
    write_json(folder / "test.json", {**tests, "argmax@budget=0.6": {**tests["argmax"], "threshold": [0.1, 0.9]}})
    assert report.read_tests(folder / "test.json").keys() == {"argmax"}


# ---------------------------------------------------------------------------------------------- statistics


def test_the_interval_of_two_means_is_welchs():
    # variances 1 and 4: standard error sqrt(1/3 + 4/3) = 1.29099, degrees of freedom (5/3)^2 / (1/18 + 16/18) = 2.94;
    # t at 0.975: 3.18245 for 3 degrees and 4.30265 for 2 (and 2.77645 for the 4 of a pooled variance)
    found = difference([1, 2, 3], [4, 6, 8])
    assert found.mean == -4
    half = (found.high - found.low) / 2
    assert found.low + half == pytest.approx(-4)
    assert 3.18245 * 1.29099 < half < 4.30265 * 1.29099


def test_with_equal_variances_and_sizes_welch_has_all_degrees_of_freedom():
    # both variances 1, three values each: 4 degrees, t = 2.776445, standard error sqrt(2/3)
    low, high = -2.5 - 2.776445 * math.sqrt(2 / 3), -2.5 + 2.776445 * math.sqrt(2 / 3)
    assert difference([1, 2, 3], [3.5, 4.5, 5.5]) == pytest.approx((-2.5, low, high), abs=1e-5)


def test_pairs_are_compared_pair_by_pair():
    # differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t = 4.302653 for 2 degrees of freedom
    half = 4.302653 / math.sqrt(3)
    assert difference([11, 22, 33], [10, 20, 30], paired=True) == pytest.approx((2, 2 - half, 2 + half), abs=1e-5)


def test_too_few_values_have_no_interval_and_no_verdict():
    assert math.isnan(difference([], [1, 2]).mean)
    assert difference([3], [1, 2]).mean == 1.5
    assert verdict(difference([3], [1, 2])) == verdict(difference([], [1, 2])) == "not known yet"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-2, -0.01, "beat"), (-2, 0.01, "no difference shown"), (-0.01, 2, "no difference shown"), (0.01, 2, "missed")],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(low, high, expected):
    assert verdict(Difference((low + high) / 2, low, high)) == expected


def test_deviations_are_those_of_a_sample():
    assert report.show_mean([1, 2, 3]) == "2.00 ± 1.00"
    assert report.show_mean([1]) == "1.00"
    assert report.show_mean([]) == "–"


# ---------------------------------------------------------------------------------------------- the text


def test_arms_are_compared_over_their_seeds(tmp_path):
    write_arm(tmp_path, "plain", [30, 31, 32, 33, 34])
    write_arm(tmp_path, "aig-t0.7", [31, 32, 33, 34, 35], shift=11)  # in mode sample lower by 10 than plain, on average
    write_arm(tmp_path, "aig-t0.5", [40, 41, 42, 43, 44])
    write_arm(tmp_path, "stochastic-depth", [20, 21, 22, 23, 24])
    text = report.report(tmp_path)
    told = section(text, "Verdict")
    assert row(told, "aig-t0.7", "plain", "sample")[-1] == "beat"
    # standard deviations of sqrt(2.5), five seeds each: standard error 1, 8 degrees of freedom, t = 2.306
    assert row(told, "aig-t0.7", "plain", "argmax")[-2:] == ["+1.00 (-1.31 to +3.31)", "no difference shown"]
    assert row(told, "aig-t0.5", "plain", "sample")[-1] == "missed"
    assert row(told, "aig-t0.7", "stochastic-depth", "sample")[-1] == "no difference shown"
    assert row(told, "aig-t0.7", "stochastic-depth", "argmax")[-1] == "missed"
    assert "Provisional" not in told
    assert "at 100.0 % of the plain net's multiply-accumulates: **beat**" in told
    arms = section(text, "The arms of the small protocol")
    assert row(arms, "aig-t0.7", "sample")[2:6] == ["5 of 5", "22.00 ± 1.58", "0.750 ± 0.000", "0.750 ± 0.000"]
    assert row(arms, "plain", "–")[3] == "32.00 ± 1.58"


def test_options_are_held_against_the_arm_without_them(tmp_path):
    write_arm(tmp_path, "aig-t0.7", [30, 31, 32])
    write_arm(tmp_path, "option-lrfact", [20, 21, 22])
    write_arm(tmp_path, "option-temperature", [40, 41, 42])
    told = section(report.report(tmp_path), "The options")
    assert row(told, "lrfact", "sample")[-2] == "-10.00 (-12.27 to -7.73): lower"  # t = 2.776, sqrt(2/3)
    assert row(told, "temperature", "argmax")[-2].endswith(": higher")
    assert row(told, "target-warmup", "argmax")[-2:] == ["–: not known yet", "–: not known yet"]
    assert row(told, "target-warmup", "sample")[2:4] == ["0 of 5, missing: 1, 2, 3, 4, 5", "–"]
    assert "Not tested yet: no run has `argmax+bn`" in told


def test_reestimated_batchnorm_is_compared_within_the_runs(tmp_path):
    for seed, (error, change) in enumerate([(30, -1), (40, -2), (50, -3)], start=1):
        errors = dict.fromkeys(report.GATE_MODES, error) | {"argmax+bn": error + change}
        fractions = {"argmax": seed / 10, "argmax+bn": seed / 10 + 0.01 * seed}
        write_run(tmp_path, f"small-aig-t0.7-s{seed}", errors, fractions=fractions)
    write_run(tmp_path, "small-aig-t0.7-s4", dict.fromkeys(report.GATE_MODES, 99))  # not part of a pair
    told = section(report.report(tmp_path), "The options")
    assert row(told, "aig-t0.7", "argmax")[2:4] == ["3", "40.00 ± 10.00"]
    found = row(told, "aig-t0.7", "argmax+bn")
    assert found[2:4] == ["3", "38.00 ± 9.00"]
    # 4.303 / sqrt(3); unpaired would be ± 21
    assert found[-2:] == ["-2.00 (-4.48 to +0.48): no difference shown", "+2.00 (-0.48 to +4.48): no difference shown"]
    assert found[5] == "0.220 ± 0.110"


def test_the_shares_of_branches_run_in_training_are_given_beside_the_difference(tmp_path):
    assert "AIG executed not known yet." in report.report(tmp_path)
    for seed, executed in ((1, 0.743), (2, 0.752), (3, 0.75)):
        write_run(tmp_path, f"small-aig-t0.7-s{seed}", dict.fromkeys(report.GATE_MODES, 30), executed=executed)
    told = section(report.report(tmp_path), "Verdict")
    assert "stochastic depth keeps 0.70 of the branches (1 - its drop rate);\n" in told
    assert "AIG executed 0.743 to 0.752 (mean over the epochs, 3 seeds)." in told


def test_runs_of_a_dropped_flag_stay_in_the_report_but_are_not_offered(tmp_path):
    text = report.report(tmp_path)
    assert row(text, "small-option-temperature-s1")[-1] == "not run yet"
    assert "check out commit 0014ec0" in section(text, "How it was measured")
    offered = dict(reproduction.protocol())
    assert "small-option-lrfact-s1" in offered
    assert not any("temperature" in name + flags for name, flags in offered.items())


def test_missing_seeds_and_runs_are_named(tmp_path):
    write_arm(tmp_path, "plain", [30, 31, 32])
    text = report.report(tmp_path)
    assert "`plain` 3 of 5, missing: 4, 5;" in section(text, "Verdict")
    assert row(text, "small-plain-s4")[-1] == "not run yet"
    assert row(text, "small-plain-s3")[1:4] == ["32.00", "32.00", "32.00 (12)"]


@pytest.mark.parametrize(
    ("options", "remark"),
    [
        ({"errors": {}, "epochs": 3}, "incomplete: 3 of 12 epochs"),
        ({"errors": {}}, "incomplete: not tested in argmax"),
        ({"errors": {"argmax": 10}, "flags": "--epochs 12 --lr 0.5"}, "left out: trained with other flags"),
    ],
)
def test_a_run_that_does_not_count_is_listed_and_left_out(tmp_path, options, remark):
    write_arm(tmp_path, "plain", [30, 31])
    write_run(tmp_path, "small-plain-s3", **options)
    text = report.report(tmp_path)
    assert row(text, "small-plain-s3")[-1].startswith(remark)
    assert row(section(text, "The arms of the small protocol"), "plain", "–")[2:4] == [
        "2 of 5, missing: 3, 4, 5", "30.50 ± 0.71"]


@pytest.mark.parametrize(
    ("key", "value", "remark"),
    [
        ("epoch", 11, "left out: tested at epoch 11 instead of the last"),
        ("threshold", 0.9, "left out: tested at threshold 0.9 instead of 0.5"),
    ],
)
def test_a_test_that_is_not_the_protocols_does_not_count(tmp_path, key, value, remark):
    path = write_run(tmp_path, "small-plain-s1", {"argmax": 30}) / "test.json"
    tests = read_json(path)
    tests["argmax"][key] = value
    write_json(path, tests)
    assert row(report.report(tmp_path), "small-plain-s1")[-1] == remark


def test_choosing_the_best_epoch_is_held_against_the_last(tmp_path):
    folder = write_run(tmp_path, "full-plain", {"argmax": 30})
    records = read_records(folder)
    records[4]["val"]["top1"] = 72.5  # 27.5 % in epoch 5, 30 % in the last
    write_records(folder, records)
    assert row(report.report(tmp_path), "full-plain", "30.00")[3] == "27.50 (5)"
    assert "`full-plain`: -2.50 points against the last epoch, chosen on the test images" in report.report(tmp_path)


def test_an_epoch_chosen_on_held_out_images_is_judged_on_the_test_images(tmp_path):
    folder = write_run(tmp_path, "full-aig-t0.7-val5000", dict.fromkeys(report.GATE_MODES, 30), val_size=5000)
    assert "its best epoch has not been tested yet" in report.report(tmp_path)
    best = {"argmax": {"top1": 69, "epoch": 8, "execution_rate": 0.8}}
    write_json(folder / "test_best.json", best)
    text = report.report(tmp_path)
    assert "`full-aig-t0.7-val5000`: +1.00 points against the last epoch, chosen on held-out images" in text
    full = section(text, "The full and the long runs")
    assert row(full, "full-aig-t0.7-val5000", "best (8)") == [
        "full-aig-t0.7-val5000", "best (8)", "argmax", "31.00", "0.800", "–", "–", "–"]


def test_the_curve_and_foreign_runs_are_reported(tmp_path):
    folder = write_run(tmp_path, "mine", {"argmax": 30})
    (folder / "notes.md").write_text("A trial.\n")
    curve = tmp_path / report.CURVE
    curve.parent.mkdir(parents=True)
    curve.write_text("run,mode,threshold,error,execution_rate,macs_mean,macs_fraction,macs_paper\n"
                     "full-aig-t0.7,argmax,0.3,22.5,0.9,36e6,0.88,36.5e6\nfull-aig-t0.7,sample,nan,25,0.7,3e7,0.7,3e7\n")
    text = report.report(tmp_path)
    assert row(text, "full-aig-t0.7", "argmax", "0.30")[3:] == ["22.50", "0.900", "0.880", "36.00", "36.50"]
    assert row(text, "full-aig-t0.7", "sample", "–")[3] == "25.00"
    others = section(text, "Other runs")
    assert row(others, "mine")[:4] == ["mine", "ResNet-20, t = 0.7", "cifar10-jpeg", "0123456-dirty"]
    assert "    python train.py --data cifar10-jpeg --epochs 12 --resume auto\n\nA trial.\n" in others
    assert "someone" not in text


def test_the_full_runs_are_compared_without_a_verdict(tmp_path):
    write_run(tmp_path, "full-plain", {"argmax": 20})
    assert "- All training images (one seed, so no interval), error not known yet.\n" in report.report(tmp_path)
    write_run(tmp_path, "full-aig-t0.7", {"argmax": 23, "sample": 25, "expected": 22, "all": 22})
    words = "no interval), 10 epochs: error 25.00 % in mode `sample` and 23.00 % in mode `argmax` against 20.00 %."
    assert words in section(report.report(tmp_path), "Verdict")


def test_nothing_at_all_makes_a_report_that_says_so(tmp_path):
    text = report.report(tmp_path)
    for words in ("No training of the protocol has begun yet", "None has been tested yet", "Not measured yet"):
        assert words in text
    assert text.count("| not run yet |") == len(FLAGS)
    for words in ("JPEG at quality 75", "learning rate 0.03", "It can show"):
        assert words in text


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("test.json", "{"),
        ("test.json", '{"argmax": {"top1": null, "epoch": 12}}'),
        ("test.json", '{"argmax": 3}'),
        ("test_best.json", "[]"),
        ("args.json", '{"epochs": 12}'),
        ("metrics.jsonl", '{"epoch": 1}\n'),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path, run, name, damage):
    path = write_run(tmp_path, "small-plain-s1", {"argmax": 30}) / name
    path.write_text(damage)
    status, out, err = run(report.main, "--results", tmp_path)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert str(path) in err
    assert not (tmp_path / "README.md").exists()


def test_a_curve_without_its_columns_is_named(tmp_path):
    curve = tmp_path / report.CURVE
    curve.parent.mkdir(parents=True)
    curve.write_text("run,mode,threshold,error\nfull-aig-t0.7,argmax,0.3,22.5\n")
    with pytest.raises(InputError, match=r"curve\.csv is damaged"):
        report.report(tmp_path)


def test_check_tells_whether_the_report_is_up_to_date(tmp_path, run):
    assert run(report.main, "--results", tmp_path, "--check")[0] == 2  # there is none yet
    assert run(report.main, "--results", tmp_path)[0] == 0
    assert run(report.main, "--results", tmp_path, "--check") == (0, "", "")
    write_run(tmp_path, "small-plain-s1", {"argmax": 30})
    before = (tmp_path / "README.md").read_bytes()
    status, _, err = run(report.main, "--results", tmp_path, "--check")
    assert status == 2
    assert "run python -m benchmarks.report" in err
    assert (tmp_path / "README.md").read_bytes() == before


def test_the_committed_report_is_what_its_runs_say(run):
    assert run(report.main, "--check") == (0, "", "")
