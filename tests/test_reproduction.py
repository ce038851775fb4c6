"""The protocol's program, run on a protocol of one tiny training."""

import json
import shlex
import subprocess

import pytest

import train
import utils
from aig.console import InputError
from aig.runs import read_json
from benchmarks import control, pays, pilot, reproduction, runner

NAME = "tiny-val2"
FLAGS = "--depth 8 --batch-size 4 --epochs 1 --target 1 --val-size 2 --seed 1"


@pytest.fixture
def call(tmp_path, run, monkeypatch):
    """Runs the program on a protocol of its own in a folder of its own."""
    (tmp_path / "train.py").symlink_to(runner.ROOT / "train.py")
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(reproduction, "protocol", lambda: iter([(NAME, FLAGS)]))
    return lambda *argv: run(reproduction.main, "--results", tmp_path / "kept", *argv)


@pytest.mark.slow
def test_a_training_is_tested_and_kept_and_not_done_twice(call, image_folder, tmp_path):
    images = image_folder(tmp_path / "data", train=3, test=2)
    kept = tmp_path / "kept" / "runs" / NAME
    assert call("--data", images)[0] == 0
    assert {path.name for path in kept.iterdir()} == {
        "args.json", "metrics.jsonl", "train.log", "test.log", "test.json", "test_best.json"}
    for file, checkpoint in (("test.json", "checkpoint"), ("test_best.json", "model_best")):
        assert json.loads((kept / file).read_text())["argmax"]["images"] == 4
        assert f"{checkpoint}.pth.tar" in (kept / "test.log").read_text()
    first = (kept / "train.log").read_text()
    assert first.startswith(f"$ OMP_NUM_THREADS=1 python train.py --expname {NAME} ")
    assert call("--data", images)[0] == 0
    assert (tmp_path / "runs" / NAME / "train.log").read_text() == first


def test_a_training_that_fails_is_named_with_its_log(call, tmp_path):
    status, out, err = call("--data", tmp_path / "nowhere")
    log = tmp_path / "runs" / NAME / "train.log"
    assert (status, out) == (2, "")
    assert err == f"script: error: {NAME} ended with status 2: {log} says why\n"
    assert "nowhere" in log.read_text()
    assert not (tmp_path / "kept").exists()


def test_a_stage_begins_when_the_one_before_is_done_and_only_names_what_was_asked_for(monkeypatch):
    done = []
    monkeypatch.setattr(runner, "carry_out", lambda name, *rest: done.append(name))
    stages = [[("a-first", ""), ("b-first", "")], [("a-second", "")]]
    parser = runner.make_parser("")
    runner.follow(stages, reproduction.tests, parser.parse_args(["--data", "DIR"]))
    assert (sorted(done[:2]), done[2:]) == (["a-first", "b-first"], ["a-second"])
    done.clear()
    runner.follow(stages, reproduction.tests, parser.parse_args(["--data", "DIR", "--only", "a"]))
    assert done == ["a-first", "a-second"]


def test_what_fails_stops_no_other_training_and_is_said_at_the_end(monkeypatch):
    done = []

    def carry_out(name, *rest):
        if name.endswith("bad"):
            raise InputError(f"{name} ended with status 2")
        done.append(name)

    monkeypatch.setattr(runner, "carry_out", carry_out)
    args = runner.make_parser("").parse_args(["--data", "DIR"])
    with pytest.raises(InputError, match=r"^a-bad ended with status 2; b-bad ended with status 2$"):
        runner.follow([[("a-bad", ""), ("a", "")], [("b-bad", ""), ("b", "")]], reproduction.tests, args)
    assert done == ["a", "b"]


def test_ctrl_c_begins_no_further_training(monkeypatch):
    done = []

    def carry_out(name, *rest):
        done.append(name)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "carry_out", carry_out)
    args = runner.make_parser("").parse_args(["--data", "DIR", "--jobs", "1"])
    with pytest.raises(KeyboardInterrupt):
        runner.follow([[(name, "") for name in "abcdefgh"]], reproduction.tests, args)
    assert len(done) < 8


def test_a_test_that_fails_does_not_lose_the_others(tmp_path, monkeypatch):
    """A budget may be out of reach."""

    def command(line, stdout, **rest):
        key, folder = line[-1], tmp_path / "runs" / NAME
        if "--expname" in line:
            for file in ("args.json", "metrics.jsonl"):
                (folder / file).write_text("{}")
        elif key != "0.45":
            (folder / "test.json").write_text(json.dumps({key: 1} | read_json(folder / "test.json")))
        return subprocess.CompletedProcess(line, int(key == "0.45"))

    def tests(name, flags):
        return {key: ["train.py", "--test", key] for key in ("0.6", "0.45", "0.75")}

    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "run", command)
    with pytest.raises(InputError, match=f"^{NAME} ended with status 1: .*test.log says why$"):
        runner.carry_out(NAME, "--depth 8", tests, "DIR", 1, tmp_path / "kept", lambda name: None)
    assert read_json(tmp_path / "kept" / "runs" / NAME / "test.json").keys() == {"0.6", "0.75"}


@pytest.mark.parametrize("program", [pilot, control, pays])
def test_every_command_of_the_other_protocols_is_one_of_train_py(program, capsys):
    program.main(["--data", "DIR", "--list"])
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert {words[2] for words in lines} == {"train.py"}
    names = set()
    for words in lines:
        args = train.make_parser().parse_args(words[3:])
        utils.check_flags(args, train.make_parser().given(words[3:]))
        names |= {args.expname} if not args.test else set()
        assert args.test or args.seed in range(1, 6)
    assert len(names) == {pilot: 17, control: 5, pays: 36}[program]


def test_the_control_drops_what_the_gates_of_its_seed_left_out():
    words = control.flags(3).split()
    dropped = [float(rate) for rate in words[words.index("--stochastic-depth") + 1].split(",")]
    assert (len(dropped), words[-1]) == (9, "3")
    assert 0.2 < sum(dropped) / 9 < 0.3


def test_the_commands_can_be_listed(call):
    status, out, _ = call("--data", "DIR", "--list")
    assert status == 0
    assert out.splitlines() == [
        f"OMP_NUM_THREADS=1 python train.py --expname {NAME} --dataset folder --data DIR {FLAGS} --resume auto",
        f"OMP_NUM_THREADS=1 python train.py --test --resume runs/{NAME}/checkpoint.pth.tar",
    ]
    status, _, err = call("--data", "DIR", "--only", "small")
    assert (status, err) == (2, "script: error: --only small: no training has such a name; see --list\n")
