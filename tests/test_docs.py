"""README.md and docs/: their commands parse, the short ones run, their Python runs, their links lead somewhere.

What runs does so in a copy of the checkout. `docs/extending.md` is followed step by step.
"""

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch

import aig
import train
import train_img
from aig import data
from aig.analysis.__main__ import make_parser as make_analysis_parser
from aig.demo import make_parser as make_demo_parser
from aig.export import make_parser as make_export_parser

ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
MARKDOWN = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "results").rglob("*.md")]
OTHERS = {"venv", "visdom.server"}  # programs that are not ours
RUNNABLE = re.compile("--dataset digits|runs/digits|--image docs/images|results/runs/.* --png")


def name_of(page):
    return str(page.relative_to(ROOT))


def commands(page):
    """The command lines in the code blocks of a page, as words, loops with the first value of their variable."""
    lines, fenced = [], False
    for line in re.sub(r" *\\\n *", " ", page.read_text()).splitlines():
        fenced ^= line.startswith("```")
        if fenced or line.startswith("    "):
            lines.append(line.strip())
    loops = dict(re.findall(r"^for (\w+) in (\S+)", "\n".join(lines), re.MULTILINE))
    for line in lines:
        if re.match(r"(python3?|torchrun|tail) ", line):
            yield [loops.get(word.removeprefix("$"), word) for word in shlex.split(line, comments=True)]


def program(words):
    """Which program of ours a command runs, and with which arguments; (None, []) for another one."""
    for index, word in enumerate(words):
        if word.endswith(".py"):
            return word, words[index + 1 :]
        if word == "-m":
            return words[index + 1] if words[index + 1] not in OTHERS else None, words[index + 2 :]
    return None, []


def main_of(name):
    if name.endswith(".py"):
        return importlib.import_module(name.removesuffix(".py")).main
    place = f"{name}.__main__" if name == "aig.analysis" else name
    return importlib.import_module(place).main


def snippets(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


# ---------------------------------------------------------------------------------------------- what is written


class Parsed(BaseException):
    """Ends a program once its command line is parsed."""


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


def test_commands_are_found_on_every_page_that_has_some():
    found = {name_of(page) for page, _ in COMMANDS}
    assert found >= {"README.md", *(f"docs/{name}.md" for name in ("training", "analysis", "dashboard", "extending"))}
    assert {program(words)[0] for _, words in COMMANDS} >= {"train.py", "train_img.py", "aig.analysis", "aig.dashboard"}


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{name_of(page)}: {' '.join(w)}" for page, w in COMMANDS])
def test_the_flags_of_a_command_exist(page, words, monkeypatch):
    name, argv = program(words)
    if name is None:
        pytest.skip("not a program of ours")
    monkeypatch.setattr(sys, "argv", [name, *argv])
    if name == "train.py" and "svhn" in argv:  # of docs/extending.md
        monkeypatch.setitem(data.DATASETS, "svhn", data.DATASETS["digits"])
    if name == "train_img.py" and "resnet26" in argv:
        monkeypatch.setitem(train_img.ARCHS, "resnet26", train_img.ARCHS["resnet50"])
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    with pytest.raises(Parsed):
        main_of(name)()


def rows(page):
    """Of each table row with flags in its first cell: those flags, and the second cell."""
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 3 and (flags := re.findall(r"(?<![\w-])--?[a-z][\w-]*", cells[0])):
            yield flags, cells[1]


def says(cell, default):
    """Whether a cell gives the default, as one of several words or numbers."""
    for word in re.split(r"[\s`,]+", cell):
        try:
            same = float(word) == default
        except ValueError:
            same = word == str(default)
        if same:
            return True
    return False


@pytest.mark.parametrize(
    ("make_parser", "page"),
    [
        (train.make_parser, "flags"),
        (train_img.make_parser, "flags"),
        (make_analysis_parser, "analysis"),
        (make_export_parser, "inference"),
        (make_demo_parser, "sharing"),
    ],
)
def test_the_table_has_every_flag_with_its_default(make_parser, page):
    cells = {flag: cell for flags, cell in rows(DOCS / f"{page}.md") for flag in flags}
    for action in make_parser().flags.values():
        names = [name for name in action.option_strings if not name.startswith("--no-") or name == "--no-cuda"]
        assert set(names) <= cells.keys()
        plain = isinstance(action.default, (str, int, float)) and not isinstance(action.default, bool)
        if page == "flags" and plain and action.default != "" and action.dest != "workers":
            assert says(cells[names[0]], action.default), (names, action.default, cells[names[0]])


def test_the_table_has_no_flag_that_is_gone():
    known = {flag for module in (train, train_img) for flag in module.make_parser()._option_string_actions}
    assert {flag for flags, _ in rows(DOCS / "flags.md") for flag in flags} <= known
    for make_parser, page in ((make_analysis_parser, "analysis"), (make_export_parser, "inference")):
        known = make_parser()._option_string_actions.keys()
        assert {flag for flags, _ in rows(DOCS / f"{page}.md") for flag in flags} <= known


def anchors(page):
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", MARKDOWN, ids=name_of)
def test_links_inside_the_repository_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text()):
        target, _, anchor = "".join(link).partition("#")
        if target.startswith(("http:", "https:")):
            continue
        path = page.parent / target if target else page
        assert path.exists(), f"{name_of(page)}: {target}"
        assert not anchor or anchor in anchors(path), f"{name_of(page)}: {target}#{anchor}"


def test_the_readme_is_short_and_leads_to_every_page():
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    assert all(f"(docs/{page.name})" in text for page in DOCS.glob("*.md"))


def test_the_readme_has_the_numbers_of_the_runs():
    """Error, branches run and multiply-accumulates of the trainings on all images, the means over the seeds."""

    def of_runs(mode, *names):
        found = [json.loads((ROOT / "results" / "runs" / name / "test.json").read_text())[mode] for name in names]
        each = [(100 - result["top1"], result["execution_rate"], result["macs_fraction"]) for result in found]
        error, rate, fraction = map(fmean, zip(*each, strict=True))
        return f"{error:.2f}", f"{rate:.3f}", f"{fraction:.3f}"

    def of_both_seeds(mode, arm):
        return of_runs(mode, f"pays-{arm}-s1", f"pays-{arm}-s2")

    text = README.read_text()
    rows = [
        of_runs("argmax", "full-plain"),
        of_runs("argmax", "full-aig-t0.7"),
        of_runs("sample", "full-aig-t0.7"),
        of_both_seeds("argmax", "teacher"),
        of_both_seeds("argmax@budget=0.6", "budget0.6"),
        of_both_seeds("argmax@budget=0.6", "floor"),
    ]
    for numbers in rows:
        assert f"| {' | '.join(numbers)} |".replace("1.000", "1") in text
    for arm in ("control", "resnet14"):
        without, taught = (of_both_seeds("argmax", f"{arm}{kind}")[0] for kind in ("", "-taught"))
        assert f"| {without} / {taught} |" in text
    (error, _, fraction), (other, _, less) = (of_runs("argmax", f"pays-majority-floor-s{seed}") for seed in (1, 2))
    assert f"have {error} and {other} % at {fraction} and {less}." in " ".join(text.split())


def test_the_readme_has_the_numbers_of_the_five_seeds():
    text, results = README.read_text(), (ROOT / "results" / "README.md").read_text()
    arms = re.findall(r"\| ([\w.-]+) \| (\S+) \| 5 of 5 \| (.*?) \| ([\d.]+) ± \S+ \| ([\d.]+) ± ", results)
    wanted = {("plain", "–"), ("aig-t0.7", "argmax"), ("aig-t0.7", "sample"), ("aig-t0.5", "sample")}
    found = [numbers for arm, mode, *numbers in arms if (arm, mode) in {*wanted, ("stochastic-depth", "–")}]
    assert len(found) == 5
    for numbers in found:
        assert f"| {' | '.join(numbers)} |".replace("1.000", "1") in text


# ---------------------------------------------------------------------------------------------- what runs


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a user has: `checkout.run(words)` runs a command there and returns what it printed."""
    for path in [*ROOT.glob("*.py"), README]:
        shutil.copy(path, tmp_path)
    for name in ("aig", "docs", "results/model", "results/runs/full-aig-t0.7"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))

    def run(*words):
        words = [sys.executable if word == "python" else word for word in words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def edit(name, change):
        path = tmp_path / name
        path.write_text(change(path.read_text()))

    return SimpleNamespace(path=tmp_path, run=run, edit=edit)


def runnable(page):
    return [words for words in commands(page) if RUNNABLE.search(" ".join(words))]


RUNS = [page for page in PAGES if page.stem != "extending" and runnable(page)]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNS, ids=name_of)
def test_the_short_commands_of_a_page_run_in_their_order(page, checkout):
    if page.stem == "analysis":  # goes on where training.md ends
        checkout.run(*next(commands(DOCS / "training.md")))
    for words in runnable(page):
        printed = checkout.run(*words)
        if "--image" in words:
            assert all(f"    {line}\n" in page.read_text() for line in printed.splitlines())
        if words[0] == "tail":
            assert printed.endswith("ended: done\n")
    if page.stem == "training":
        assert json.loads((checkout.path / "runs/digits/test.json").read_text()).keys() == {"argmax", "argmax@0.7"}


@pytest.mark.engine
@pytest.mark.parametrize("page", [README, DOCS / "inference.md"], ids=name_of)
def test_python_on_a_page_runs(page, tmp_path, monkeypatch, capsys):
    for name in ("docs", "results"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)  # where an exported file goes
    if page != README:
        pytest.importorskip("onnxruntime")
    names = {}
    for snippet in snippets(page):
        exec(snippet, names)
    if page != README:
        printed = capsys.readouterr().out.splitlines()[-3:]
        assert printed[0].startswith("docs/images/dog.jpg: dog ")
        assert all(f"    {line}\n" in page.read_text() for line in printed)
    images, fast = names["x" if page == README else "images"], names["fast"]
    gates = torch.stack(names["gates"], dim=1)
    assert torch.equal(gates, torch.stack(fast(images)[1], dim=1))
    torch.testing.assert_close(names["logits"], fast(images)[0], atol=1e-3, rtol=1e-3)
    if page == README:
        assert names["net"].classes[names["logits"].argmax()] == "dog"
        assert f"# dog {[int(z) for z in names['gates']]}\n" in page.read_text()
        assert f"# {capsys.readouterr().out}" in page.read_text()
    assert (names["cost"].executed(gates) < names["cost"].dense).any()


def test_sharing_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    for snippet in snippets(DOCS / "sharing.md"):
        exec(snippet, names)
    assert names["net"].num_gates == 9
    assert names["new"].target_rates == [0.6] * 16


# ---------------------------------------------------------------------------------------------- extending.md

GATE, GATE_LINES, GATE_CHECK, BACKBONES, DATASET, LOSS_LINES = snippets(DOCS / "extending.md")


def replace_lines(lines, count):
    """A change of a text: of each of these lines, the one that begins alike, up to `count` characters, becomes it."""

    def change(text):
        for line in lines.splitlines():
            text, found = re.subn(f"^{re.escape(line[:count])}.*$", lambda _, line=line: line, text, flags=re.MULTILINE)
            assert found == 1, line
        return text

    return change


@pytest.mark.slow
def test_extending_by_a_gate(checkout):
    pytest.importorskip("onnxruntime")
    checkout.edit("convnet_aig.py", lambda text: text.replace("class GatedBlock", f"{GATE}\n\nclass GatedBlock", 1))
    checkout.edit("convnet_aig.py", replace_lines(GATE_LINES, len("GATE_LAYERS")))
    training, testing = (words for words in commands(DOCS / "extending.md") if any("linear-gate" in w for w in words))
    checkout.run(*training)
    assert "execution rate" in checkout.run(*testing)
    assert checkout.run("python", "-c", GATE_CHECK).startswith("1.000 decide alike, ")
    checkout.run("python", "-c", (
        "import aig, torch; torch.manual_seed(0)  # one draw in ten has no gate that varies\n"
        "net = aig.load('runs/linear-gate'); x = torch.randn(64, 3, 8, 8)\n"
        "blocks = list(net.blocks()); net.threshold = torch.sigmoid(blocks[1].fc2.bias.diff()).item()\n"
        "for block in blocks: block.fc2.weight.data.normal_()\n"
        "with torch.no_grad(): (a, g), (b, h) = net(x), aig.accelerate(net)(x)\n"
        "opened = torch.stack(g); assert 0 < opened.mean() < 1 and torch.equal(opened, torch.stack(h))\n"
        "torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)\n"
        "assert aig.count_macs(net, 8).gates == (16, 16, 32)\n"
        "aig.export_onnx(net, 'linear-gate.onnx', 'any', 8)"
    ))


@pytest.mark.slow
def test_extending_by_backbones(checkout, image_folder):
    start = "ARCHS: dict[str, tuple] = {\n"
    checkout.edit("convnet_aig.py", lambda text: text.replace(start, start + BACKBONES))
    image_folder(checkout.path / "images", train=4, val=2)
    for arch, groups in (("resnet26", ()), ("resnext26_32x4d", (32, 4))):
        checkout.run(*f"python train_img.py --arch {arch} --image-size 32 --workers 0 --batch-size 4 --lr 0.001 "
                     f"--epochs 1 --expname {arch} images".split())
        checkout.run("python", "train_img.py", "--test", "--resume", f"runs/{arch}")
        checkout.run("python", "-c", (
            f"import aig; net = aig.load('runs/{arch}')\n"
            "from torchvision.models.resnet import Bottleneck, ResNet\n"
            f"theirs = ResNet(Bottleneck, [2] * 4, 2, False, *{groups})\n"
            "sizes = [p.numel() for name, p in net.named_parameters() if '.fc' not in name]\n"
            "assert sum(sizes) == sum(p.numel() for p in theirs.parameters())"
        ))


def test_extending_by_a_data_set(tmp_path, monkeypatch):
    class SVHN:
        """Random images in the layout of torchvision's."""

        def __init__(self, root, split, download):
            random = torch.Generator().manual_seed(0)
            count = {"train": 96, "test": 32}[split]
            self.data = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=random).numpy()
            self.labels = torch.randint(10, (count,), generator=random).numpy()

    monkeypatch.setattr("torchvision.datasets.SVHN", SVHN)
    monkeypatch.setitem(data.DATASETS, "svhn", None)  # so that it is taken out again
    exec(DATASET, vars(data) | {"__name__": "aig.data"})
    monkeypatch.chdir(tmp_path)
    words = next(words for words in commands(DOCS / "extending.md") if "svhn" in words)
    train.main([*program(words)[1], "--depth", "8", "--epochs", "1", "--batch-size", "32"])
    assert aig.load("runs/svhn").preprocess.size == 32


@pytest.mark.slow
def test_extending_by_a_term_of_the_loss(checkout):
    line = "        return terms\n"  # the last one is of `of_rates`
    assert LOSS_LINES.startswith(line.rstrip())
    checkout.edit("aig/losses.py", lambda text: LOSS_LINES.rstrip().join(text.rsplit(line.rstrip(), 1)))
    checkout.run("python", *shlex.split("train.py --dataset digits --depth 8 --epochs 1 --expname loss"))
    record = json.loads((checkout.path / "runs/loss/metrics.jsonl").read_text())
    for part in (record["train"], record["val"]):
        assert part["loss_open"] == pytest.approx(0.1 * part["execution_rate"])
        assert part["loss"] == pytest.approx(sum(value for name, value in part.items() if name.startswith("loss_")))
    assert "open" in checkout.run("python", "train.py", "--test", "--resume", "runs/loss")
