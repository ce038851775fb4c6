"""The dashboard draws every window from the records alone, and a missing server never stops a run."""

import json
import math
import socket
import time

import pytest

pytest.importorskip("visdom", reason="visdom is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # visdom's own

import dashboard  # noqa: E402
import train  # noqa: E402
import utils  # noqa: E402

RATES = [1.0, 0.7, 0.5]


def record(epoch, loss=1.0):
    part = {"loss": loss, "loss_classify": loss, "loss_target": 0.1, "top1": 50.0 + epoch, "execution_rate": 0.7}
    matrix = [[1.0, 0.2, 0.4], [1.0, 0.6, 0.8]]
    gates = {"gates": [1.0, 0.4, 0.6], "classes": {"ant": 0.5, "bee": 0.8}, "gates_by_class": matrix}
    return {"epoch": epoch, "lr": 0.1, "seconds": 1.0, "train": part, "val": {**part, **gates}}


def draw(records):
    board = dashboard.Dashboard("test", RATES)
    messages = [message for message, _ in dashboard.windows(board.painter, records, RATES)]
    return {message["win"]: message for message in messages}


def traces(window):
    return {trace.get("name"): trace["y"] for trace in window["data"]}


def test_every_window_holds_the_complete_curves_of_the_records():
    drawn = draw([record(1), record(2), record(3)])
    names = {"learning_rate", "loss", "top1", "execution_rate", "gates", "classes", "activations", "modules"}
    assert set(drawn) == names
    assert traces(drawn["top1"]) == {"train top1": [51.0, 52.0, 53.0], "val top1": [51.0, 52.0, 53.0]}
    assert traces(drawn["gates"]) == {"block 2": [0.4] * 3, "block 3": [0.6] * 3}  # block 1 always runs
    assert traces(drawn["classes"]) == {"ant": [0.5] * 3, "bee": [0.8] * 3}
    assert len(traces(drawn["loss"])) == 6
    assert drawn["activations"]["data"][0]["z"] == [[1.0, 0.2, 0.4], [1.0, 0.6, 0.8]]
    assert traces(drawn["modules"])["std / mean over classes"] == pytest.approx([0, 0.5, 1 / 3])


def test_a_single_epoch_is_visible_as_a_marker():
    trace = draw([record(1)])["top1"]["data"][0]
    assert "markers" in trace["mode"]


def test_values_that_are_not_finite_leave_a_gap_and_not_an_invalid_message():
    message = draw([record(1, loss=math.inf), record(2, loss=None), record(3, loss=math.nan)])["loss"]
    text = json.dumps(dashboard.finite(message))
    assert "Infinity" not in text
    assert math.isnan(traces(dashboard.finite(message))["val loss"][0])


def test_many_classes_show_the_least_and_the_most_demanding():
    wide = record(1)
    wide["val"]["classes"] = {f"c{k}": k / 100 for k in range(100)}
    del wide["val"]["gates_by_class"]
    shown = list(traces(draw([wide])["classes"]))
    assert shown == [f"c{k}" for k in (*range(10), *range(90, 100))]


def test_a_run_without_a_server_warns_once_and_is_not_changed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(dashboard.Dashboard.__init__, "__defaults__", ("http://localhost", free_port()))
    command = ["--dataset", "digits", "--depth", 8, "--epochs", 3, "--batch-size", 256, "--device", "cpu"]
    status, _, err = run(train.main, *command, "--save", tmp_path, "--expname", "watched", "--visdom")
    assert status == 0
    assert err.count("no answer from") == 1
    assert run(train.main, *command, "--save", tmp_path, "--expname", "alone")[0] == 0
    watched, alone = (utils.read_records(tmp_path / name) for name in ("watched", "alone"))
    assert [r["train"] for r in watched] == [r["train"] for r in alone]


def test_a_server_that_accepts_and_never_answers_costs_the_time_out(capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        board = dashboard.Dashboard("test", RATES, "http://127.0.0.1", server.getsockname()[1])
        start = time.perf_counter()
        board.update([record(1)])
        assert time.perf_counter() - start < 2 * dashboard.TIMEOUT
    assert "no answer from" in capsys.readouterr().err


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
