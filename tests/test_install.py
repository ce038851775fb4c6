"""`pip install .` brings the library, and puts nothing else beside other people's code."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import aig

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "results" / "model"
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def run(*words, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=cwd, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built from a copy because building leaves files behind, without the network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in [*ROOT.glob("*.py"), *(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE"))]:
        shutil.copy(path, source)
    for name in ("aig", "benchmarks", "tests", "docs", "results/model"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", target, ".", cwd=source)
    (built,) = target.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"convnet_aig.py", "gumbelmodule.py", "aig"}
    assert wheel.name.startswith(f"convnet_aig-{aig.__version__}-")
    own = {str(path.relative_to(ROOT)) for path in (ROOT / "aig").rglob("*.py")}
    model = {f"aig/released/{path.relative_to(MODELS)}" for path in MODELS.glob("aig20-cifar10-jpeg-floor/*")}
    examples = {f"aig/examples/{path.name}" for path in (ROOT / "docs" / "images").glob("*.jpg")}
    assert {name for name in names if name.startswith("aig/")} == own | model | examples


@pytest.mark.slow
def test_the_library_works_from_anywhere(wheel, tmp_path):
    run(*PIP, "install", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel, cwd=tmp_path)
    program = f"""
import importlib.util, json, sys
sys.path.insert(0, {str(tmp_path / "site")!r})
import aig, convnet_aig, torch
from convnet_aig import ResNet50_ImageNet
net = ResNet50_ImageNet(10).eval()
x = torch.randn(2, 3, 64, 64)
with torch.no_grad():
    torch.testing.assert_close(aig.accelerate(net)(x)[0], net(x)[0], atol=1e-3, rtol=1e-3)
found = [name for name in ("utils", "train", "train_img", "cli", "benchmarks") if importlib.util.find_spec(name)]
print(json.dumps([aig.__file__, convnet_aig.__file__, found]))
"""
    *files, found = json.loads(run(sys.executable, "-c", program, cwd=tmp_path))
    assert all(file.startswith(str(tmp_path)) for file in files)
    assert found == []
    run(sys.executable, "-m", "aig.dashboard", "--help", cwd=tmp_path / "site")


def test_the_requirements_say_the_same_twice():
    """requirements.txt, which says why, and pyproject.toml with its extra."""
    text = (ROOT / "pyproject.toml").read_text()
    wanted = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert len(wanted) > 5
    assert all(f'"{requirement}"' in text for requirement in wanted)
