"""Every window shows what the records say, on a real server; no server, however broken, gets in the way of a run."""

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("visdom", reason="visdom is not installed")
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")  # visdom's own
    for kind in ("DeprecationWarning", "SyntaxWarning", "ResourceWarning")
]

import train  # noqa: E402
from aig import dashboard, runs  # noqa: E402

RUN = {"block_rates": [1.0, 0.7, 0.5], "stages": [2, 1], "epochs": 5, "commands": ["train.py --visdom"]}
WINDOWS = {
    "learning_rate", "loss", "top1", "execution_rate", "gates", "classes", "activations", "modules",
    "executed_blocks", "summary",
}  # fmt: skip
ROOT = Path(__file__).parent.parent
TINY = ["--dataset", "digits", "--depth", 8, "--batch-size", 256, "--device", "cpu", "--visdom"]


def record(epoch, loss=1.0):
    part = {"loss": loss, "loss_classify": loss, "loss_target": 0.1, "top1": 50.0 + epoch, "execution_rate": 0.7}
    matrix = [[1.0, 0.2, 0.4], [1.0, 0.6, 0.8]]
    gates = {"gates": [1.0, 0.4, 0.6], "classes": {"ant": 0.5, "bee": 0.8}, "gates_by_class": matrix}
    gates |= {"executed_blocks": [0, 3, 4, 3]}
    return {"epoch": epoch, "lr": 0.1, "seconds": 1.0, "train": part, "val": {**part, **gates}}


def windows(records, run=RUN, matrix=None):
    return dashboard.windows("a run", records, run, matrix)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Server:
    """A visdom server of our own, without its page (which would need downloads)."""

    def __init__(self, home, **environment):
        self.home, self.environment, self.port = home, environment, free_port()
        self.options = ["-enable_login"] if environment else []

    def start(self):
        command = [sys.executable, "-c", "from visdom.server.run_server import main; main()", "-port", str(self.port)]
        self.process = subprocess.Popen(
            [*command, "-bind_local", "-env_path", str(self.home), *self.options],
            env={**os.environ, "HOME": str(self.home), **self.environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(300):
            if self.process.poll() is not None:
                break
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            time.sleep(0.1)
        raise RuntimeError("the visdom server does not start")

    def kill(self):
        self.process.kill()
        self.process.wait()

    def windows(self, env, names=WINDOWS, **login):
        """What the server holds, by window."""
        import visdom

        client = visdom.Visdom(port=self.port, env=env, raise_exceptions=True, use_incoming_socket=False, **login)
        found = {name: client.get_window_data(name) for name in names}
        held = {name: data for name, data in found.items() if data.startswith("{")}  # else "", or a page that says 404
        return {name: json.loads(data)["content"] for name, data in held.items()}

    @property
    def flags(self):
        return ["--visdom-port", self.port]


@pytest.fixture
def server(tmp_path):
    home = tmp_path / "visdom"
    home.mkdir()
    server = Server(home).start()
    yield server
    server.kill()


def curves(window):
    """The y of each trace, by its name."""
    return {trace["name"]: trace["y"] for trace in window["data"]}


# ------------------------------------------------------------------------------------------ what is shown


def test_every_window_holds_the_complete_curves_of_the_records():
    shown = windows([record(1), record(2), record(3)])
    assert set(shown) == WINDOWS
    assert curves(shown["learning_rate"]) == {"learning rate": [0.1] * 3}
    assert curves(shown["top1"]) == {"validation": [51.0, 52.0, 53.0], "training": [51.0, 52.0, 53.0]}
    assert all(trace["x"] == [1, 2, 3] for trace in shown["top1"]["data"])
    assert curves(shown["execution_rate"])["target"] == [pytest.approx(2.2 / 3)] * 3
    gates = {"block 2 (stage 1)": [0.4] * 3, "block 3 (stage 2)": [0.6] * 3}  # block 1 always runs
    assert curves(shown["gates"]) == {**gates, "target 0.5": [0.5] * 3, "target 0.7": [0.7] * 3}
    assert len({trace["line"]["color"] for trace in shown["gates"]["data"]}) == 3  # one a stage, and black
    assert curves(shown["classes"]) == {"bee": [0.8] * 3, "ant": [0.5] * 3}
    activations = shown["activations"]["data"][0]
    assert activations["z"] == [[1.0, 0.2, 0.4], [1.0, 0.6, 0.8]]
    assert (activations["x"], activations["y"]) == ([1, 2, 3], ["ant", "bee"])
    assert [line["x0"] for line in shown["activations"]["layout"]["shapes"]] == [2.5]  # between the stages
    assert curves(shown["modules"])["std / mean over the classes"] == pytest.approx([0, 0.5, 1 / 3])
    assert shown["executed_blocks"]["data"][0]["y"] == [0, 3, 4, 3]
    text = shown["summary"]["data"][0]["content"]
    for words in ("53.00 % (validation, epoch 3)", "3 of 5", "train.py --visdom"):
        assert words in text


def test_windows_are_json_and_do_not_change_what_they_are_made_from():
    records = [record(1), record(2)]
    before = json.dumps(records)
    shown = windows(records)
    assert json.dumps(records) == before
    assert json.loads(json.dumps(shown)) == shown


def test_whatever_terms_the_loss_has_are_shown_by_name():
    two = {f"{part} {name}" for part in ("validation", "training") for name in ("total", "classify", "target")}
    assert set(curves(windows([record(1)])["loss"])) == two
    third = [record(1), record(2)]  # a term that a resumed run adds, or that only training has
    third[1]["train"]["loss_distill"] = 0.25
    found = curves(windows(third)["loss"])
    assert set(found) == two | {"training distill"}
    assert np.isnan(found["training distill"][0])
    assert found["training distill"][1] == 0.25
    for one in third:
        one["val"]["loss_distill"] = 0.5
    assert curves(windows(third)["loss"])["validation distill"] == [0.5, 0.5]


def test_whatever_accuracies_the_records_have_are_shown():
    more = record(1)
    for part in (more["train"], more["val"]):
        part |= {"top3": 60.0, "top5": 70.0}
    shown = windows([more])
    assert set(shown) == WINDOWS | {"top3", "top5"}
    assert curves(shown["top5"]) == {"validation": [70.0], "training": [70.0]}
    assert shown["top3"]["layout"]["title"]["text"] == "Top-3 accuracy"


def test_of_many_classes_the_most_and_the_least_demanding_are_shown():
    wide = record(1)
    wide["val"]["classes"] = {f"c{k}": k / 100 for k in range(99)} | {"none": None}
    del wide["val"]["gates_by_class"]
    shown = windows([wide])
    assert list(curves(shown["classes"])) == [f"c{k}" for k in (*range(98, 89, -1), *range(7, -1, -1))] + ["none"]
    looks = {(trace["line"]["color"], trace["line"]["dash"]) for trace in shown["classes"]["data"]}
    assert len(looks) == len(shown["classes"]["data"])
    assert "activations" not in shown
    assert "activations" in windows([wide], matrix=np.zeros((100, 3)))


def test_a_run_of_an_older_version_is_shown_too():
    assert set(windows([record(1)], run={})) == WINDOWS


def test_a_budget_has_a_window_and_no_gate_a_target():
    records = [record(1), record(2)]
    for each in records:
        for part in (each["train"], each["val"]):
            part |= {"macs_fraction": 0.7 / each["epoch"], "macs_budget": 0.6}
    shown = windows(records, run={**RUN, "budget": 0.6})
    assert set(shown) == WINDOWS | {"macs"}
    assert curves(shown["macs"]) == {"validation": [0.7, 0.35], "training": [0.7, 0.35], "budget": [0.6, 0.6]}
    for name in ("gates", "execution_rate", "modules"):
        assert not [trace for trace in curves(shown[name]) if trace.startswith("target")]
        assert [trace for trace in curves(windows(records)[name]) if trace.startswith("target")]


def test_a_run_without_gates_and_a_run_of_nothing_finite(server):
    board = dashboard.Dashboard(server.home / "plain", port=server.port)
    runs.make_folder(board.folder)
    runs.write_json(board.folder / runs.ARGS, {**RUN, "block_rates": [1.0, 1.0, 1.0]})
    board.draw([record(1)])
    assert set(server.windows("plain")) == WINDOWS - {"gates"}
    nothing = record(1)
    for part in (nothing["train"], nothing["val"]):
        part |= dict.fromkeys(("loss", "loss_classify", "loss_target", "top1", "execution_rate"))
    nothing["val"] |= {"gates": [None] * 3, "classes": {"ant": None, "bee": None}, "gates_by_class": [[None] * 3] * 2}
    board.draw([nothing])
    assert "not finite" in server.windows("plain")["summary"]


def test_values_that_are_not_finite_leave_a_gap(server):
    broken = [record(1, loss=math.inf), record(2, loss=None), record(3, loss=math.nan), record(4)]
    broken[1]["val"]["gates_by_class"][0] = [None] * 3  # a class without images
    broken[1]["val"]["classes"]["ant"] = None
    for number in range(1, 5):
        folder = server.home / "broken"
        board = dashboard.Dashboard(folder, port=server.port)
        board.draw(broken[:number])
        shown = server.windows("broken")
        assert set(shown) == WINDOWS
        losses = curves(shown["loss"])["validation total"]
        assert [value is None or math.isnan(value) for value in losses] == [True, True, True, False][:number]


# ------------------------------------------------------------------------------------------ a real server


def assert_windows_are_the_records(server, env, folder):
    records = runs.read_records(folder)
    found, expected = server.windows(env), dashboard.windows_in(folder, records)
    assert set(found) == set(expected) == WINDOWS
    for name, window in expected.items():
        if name == "summary":
            assert found[name] == window["data"][0]["content"]
        else:
            assert found[name] | runs.nan_to_none(window) == found[name]  # to which a server may add
    assert curves(found["loss"])["training total"] == [record["train"]["loss"] for record in records]
    assert found["activations"]["data"][0]["z"] == records[-1]["val"]["gates_by_class"]
    assert found["executed_blocks"]["data"][0]["y"] == records[-1]["val"]["executed_blocks"]
    assert f"{len(records)} of" in found["summary"]


def write_run(folder, count=3):
    """A run folder with records made by hand."""
    folder.mkdir()
    runs.write_records(folder, [record(epoch) for epoch in range(1, count + 1)])
    runs.write_json(folder / runs.ARGS, RUN)
    return folder


def test_the_server_holds_exactly_the_windows(server, tmp_path):
    folder = write_run(tmp_path / "by hand")
    dashboard.Dashboard(folder, port=server.port).update(runs.read_records(folder))
    assert_windows_are_the_records(server, "by hand", folder)


def test_windows_have_their_size_and_titles_on_the_page(server, tmp_path):
    import visdom

    folder = write_run(tmp_path / "sized")
    dashboard.Dashboard(folder, port=server.port).draw(runs.read_records(folder))
    client = visdom.Visdom(port=server.port, env="sized", raise_exceptions=True, use_incoming_socket=False)
    held = {name: json.loads(client.get_window_data(name)) for name in WINDOWS}
    shown = dashboard.windows_in(folder, runs.read_records(folder))
    for name, window in shown.items():
        assert (held[name]["width"], held[name]["height"]) == (dashboard.WIDTH, dashboard.HEIGHT)
        assert held[name]["title"] == window["layout"]["title"]["text"]
        assert held[name]["type"] == ("text" if name == "summary" else "plot")


def test_a_training_shows_its_records_and_a_resumed_one_continues_the_curves(run, server, tmp_path):
    command = [*TINY, *server.flags, "--save", tmp_path, "--expname", "watched", "--epochs", 3]
    assert run(train.main, *command, "--stop-after", 2)[::2] == (0, "")
    folder = tmp_path / "watched"
    assert_windows_are_the_records(server, "watched", folder)
    resume = ["--resume", folder / "checkpoint.pth.tar", "--visdom", "--device", "cpu", *server.flags]
    assert run(train.main, *resume)[::2] == (0, "")
    assert [record["epoch"] for record in runs.read_records(folder)] == [1, 2, 3]
    assert_windows_are_the_records(server, "watched", folder)


def test_a_server_that_dies_and_comes_back_shows_everything_again(run, server, tmp_path, monkeypatch):
    states = iter(["up", "down", "down", "up"])
    draw = dashboard.Dashboard.update

    def update(self, records):
        if next(states) == "down":
            server.kill()
        elif server.process.poll() is not None:
            server.home = tmp_path / "fresh"  # it has forgotten everything
            server.home.mkdir()
            server.start()
        draw(self, records)

    monkeypatch.setattr(dashboard.Dashboard, "update", update)
    command = [*TINY, *server.flags, "--save", tmp_path, "--expname", "watched", "--epochs", 4, "--visdom-env", "mine"]
    status, _, err = run(train.main, *command)
    assert (status, err.count("visdom:"), err.count("\n")) == (0, 1, 1)
    assert_windows_are_the_records(server, "mine", tmp_path / "watched")


def test_a_server_with_a_login(tmp_path, monkeypatch, capsys):
    credentials = {"VISDOM_USERNAME": "ann", "VISDOM_PASSWORD": "secret"}
    home = tmp_path / "visdom"
    home.mkdir()
    (home / ".visdom").mkdir()
    server = Server(home, VISDOM_USE_ENV_CREDENTIALS="1", VISDOM_COOKIE="crumbs", **credentials).start()
    try:
        board = dashboard.Dashboard(tmp_path / "run", port=server.port)
        board.update([record(1)])
        assert "VISDOM_USERNAME" in capsys.readouterr().err
        monkeypatch.setenv("VISDOM_USERNAME", "ann")
        monkeypatch.setenv("VISDOM_PASSWORD", "wrong")
        board.warned = False
        board.update([record(1)])
        assert "VISDOM_PASSWORD" in capsys.readouterr().err
        monkeypatch.setenv("VISDOM_PASSWORD", "secret")
        board.update([record(1)])
        assert capsys.readouterr().err == ""
        assert set(server.windows("run", username="ann", password="secret")) == WINDOWS
    finally:
        server.kill()


def test_a_finished_run_is_replayed(run, server, tmp_path, contents):
    folder = write_run(tmp_path / "quiet", 2)
    before = contents(folder)
    status, out, err = run(dashboard.main, folder, *server.flags)
    assert (status, err, "2 epochs drawn" in out) == (0, "", True)
    assert_windows_are_the_records(server, "quiet", folder)
    assert contents(folder) == before


@pytest.mark.slow
def test_a_finished_run_is_drawn_as_an_image_for_each_window_and_a_sheet(run, tmp_path, contents):
    folder, images = write_run(tmp_path / "quiet", 2), tmp_path / "images"
    before = contents(folder)
    assert run(dashboard.main, folder, "--png", images)[::2] == (0, "")
    assert {path.stem for path in images.iterdir()} == WINDOWS | {"dashboard"}
    for path in images.iterdir():
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 2, path
    assert contents(folder) == before


def test_the_sheet_holds_every_window_in_its_place():
    shown = windows([record(1), record(2)])
    sheet = dashboard.figure(shown.values())
    places = sheet.subfigs[: len(shown)]  # the rest of the last row is empty
    titles = [place.axes[0].get_title() for place in places]
    assert titles == [window["layout"]["title"]["text"] for window in shown.values()]
    sheet.canvas.draw()
    boxes = [place.bbox for place in places]
    for index, box in enumerate(boxes):
        for other in boxes[:index]:
            width = min(box.x1, other.x1) - max(box.x0, other.x0)
            height = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert min(width, height) < 1, "two windows overlap by a pixel or more"


def test_an_image_shows_the_curves_of_its_window_under_awkward_names_too():
    odd = record(1)
    odd["val"]["classes"] = {"_ant": 0.5, "$bee": 0.8}
    window = windows([odd, odd])["classes"]
    axes = dashboard.figure([window]).subfigs[0].axes[0]
    assert {line.get_label(): line.get_ydata().tolist() for line in axes.get_lines()} == curves(window)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["$bee", "_ant"]


def test_what_cannot_be_shown_is_one_line_of_error(run, tmp_path):
    folder, images = write_run(tmp_path / "quiet"), tmp_path / "images"
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    runs.write_records(damaged, [{"epoch": 1}])
    for wrong, message in (
        ([damaged], "does not hold a run"),
        ([damaged, "--png", images], "does not hold a run"),
        ([folder, "--png", folder / "args.json"], "File exists"),
        ([tmp_path / "nothing"], "holds no records"),
        ([folder, "--visdom-port", free_port()], "no answer from"),
        ([folder, "--visdom-port", 0], "at least 1"),
        ([], "required: run"),
    ):
        status, _, err = run(dashboard.main, *wrong)
        assert (status, err.count("\n"), message in err) == (2, 1, True)


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_line(tmp_path):
    done = python("-m", "aig.dashboard", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("aig.dashboard: error: ")
    assert done.stderr.count("\n") == 1


def test_importing_the_module_does_not_import_what_draws():
    modules = ("visdom", "requests", "matplotlib")
    done = python("-c", f"import sys, aig.dashboard; print([name for name in {modules} if name in sys.modules])")
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


# ------------------------------------------------------------------------------------------ broken servers


def test_a_run_without_a_server_warns_once_and_is_not_changed(run, tmp_path):
    command = [*TINY[:-1], "--epochs", 3, "--save", tmp_path]
    status, _, err = run(train.main, *command, "--expname", "watched", "--visdom", "--visdom-port", free_port())
    assert (status, err.count("no answer from"), err.count("\n")) == (0, 1, 1)
    assert run(train.main, *command, "--expname", "alone")[0] == 0
    watched, alone = (runs.read_records(tmp_path / name) for name in ("watched", "alone"))
    assert [r["train"] for r in watched] == [r["train"] for r in alone]


def answer_slowly(listener, answer, seconds):
    """Accepts, and sends the answer to each request byte by byte."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.settimeout(0.2)
            try:
                while True:
                    connection.recv(1 << 20)
                    for byte in answer:
                        time.sleep(seconds)
                        connection.sendall(bytes([byte]))
            except OSError:
                pass


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.mark.parametrize("kind", ["never answers", "answers slowly", "refuses", "has an impossible name"])
def test_a_broken_server_costs_one_warning_and_two_seconds_an_epoch(kind, tmp_path, capsys, monkeypatch):
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    if kind == "answers slowly":
        threading.Thread(target=answer_slowly, args=(listener, OK, 0.2), daemon=True).start()
    if kind == "refuses":
        listener.close()
    assert dashboard.TIMEOUT < 2
    monkeypatch.setattr(dashboard, "TIMEOUT", 0.3)
    board = dashboard.Dashboard(tmp_path, "a..b" if kind == "has an impossible name" else "127.0.0.1", port)
    for _ in range(3):
        start = time.perf_counter()
        board.update([record(1)])
        assert time.perf_counter() - start < 2
    assert capsys.readouterr().err.count("visdom:") == 1
    listener.close()


def test_where_visdom_is_missing_the_command_says_so(monkeypatch, run, tmp_path):
    monkeypatch.setitem(sys.modules, "visdom", None)
    folder = write_run(tmp_path / "quiet")
    status, _, err = run(dashboard.main, folder)
    assert (status, err.count("\n"), "--png" in err) == (2, 1, True)
    assert run(dashboard.main, folder, "--png", tmp_path / "images")[::2] == (0, "")


# ------------------------------------------------------------------------------------------ size


def wide_records(epochs=100, classes=1000, blocks=50):
    random = np.random.default_rng(0)
    part = {"loss": 1.0, "loss_classify": 0.9, "loss_target": 0.1, "top1": 50.0, "top5": 70.0, "execution_rate": 0.7}
    rows = random.random((epochs, blocks)), random.random((epochs, classes))
    return [
        {"epoch": e + 1, "lr": 0.1, "seconds": 9.0, "train": part,
         "val": {**part, "gates": rows[0][e].tolist(), "executed_blocks": [1000] * (blocks + 1),
                 "classes": {f"n{k:08}": value for k, value in enumerate(rows[1][e].tolist())}}}
        for e in range(epochs)
    ]  # fmt: skip


def test_a_thousand_classes_and_fifty_gates_stay_small(server, tmp_path):
    records = wide_records()
    folder = tmp_path / "wide"
    folder.mkdir()
    np.save(folder / runs.MATRIX, np.random.default_rng(1).random((1000, 50)).round(4))
    runs.write_json(folder / runs.ARGS, {"block_rates": [0.7] * 50, "stages": [3, 8, 36, 3], "epochs": 100})
    board = dashboard.Dashboard(folder, port=server.port)
    sent, post = [], board.post
    board.post = lambda *message: (sent.append(len(json.dumps(message[-1]))), post(*message))
    board.draw(records)
    assert sum(sent) < 3e6
    assert set(server.windows("wide", WINDOWS | {"top5"})) == WINDOWS | {"top5"}
