"""The entry points of torch.hub, from a checkout."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import aig
import hubconf
from aig import networks
from convnet_aig import ResNet50_ImageNet

ROOT = Path(__file__).parent.parent


def hub(name, **options):
    return torch.hub.load(str(ROOT), name, source="local", **options)


def entry_points():
    return {name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")}


RELEASED = {
    "aig_resnet20_cifar10_jpeg": "aig20-cifar10-jpeg-floor",
    "resnet20_cifar10_jpeg": "resnet20-cifar10-jpeg-s1",
}


@pytest.mark.parametrize(("name", "folder"), RELEASED.items())
def test_the_trained_networks_are_those_in_the_repository(name, folder):
    found, wanted = hub(name), aig.load(ROOT / "results" / "model" / folder)
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        (logits, gates), (others, opened) = found(images), wanted(images)
    assert torch.equal(logits, others)
    assert all(map(torch.equal, gates, opened))
    with pytest.raises(ValueError, match="this is the trained network"):
        hub(name, pretrained=False)


def test_there_is_an_entry_for_each_network_and_its_twin():
    pairs = {f"{kind}_{depth}" for kind in ("convnet_aig", "resnet") for depth in (50, 101, 152)}
    assert entry_points() == RELEASED.keys() | pairs
    assert all(getattr(hubconf, name).__doc__ for name in entry_points())


def top_level_imports(source):
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_torch_hub_asks_for_what_the_entry_points_need():
    files = "print(*{getattr(module, '__file__', None) for module in sys.modules.values()}, sep='\\n')"
    command = [sys.executable, "-c", f"import sys, hubconf; {files}"]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    own = [file for file in map(Path, loaded) if file.parent in (ROOT, ROOT / "aig")]
    imported = {name.split(".")[0] for file in own for name in top_level_imports(file.read_text(encoding="utf-8"))}
    needed = imported - sys.stdlib_module_names - {file.stem for file in own} - {"aig"}
    assert "torch" in needed <= set(hubconf.dependencies)
    listed = re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert {{"PIL": "pillow"}.get(name, name) for name in hubconf.dependencies} <= set(listed)


def test_gates_are_where_the_target_rates_ask_for_them():
    assert hub("convnet_aig_50").num_gates == 16
    assert hub("convnet_aig_101", num_classes=5, target_rates=0.4).target_rates == [0.4] * 33
    assert hub("convnet_aig_50", target_rates=[1.0] * 12 + [0.5] * 4).num_gates == 4
    assert hub("resnet_152").num_gates == 0
    torch.manual_seed(0)
    found = hub("convnet_aig_50", num_classes=7)
    torch.manual_seed(0)
    wanted = ResNet50_ImageNet(7, [0.7] * 16)
    assert all(map(torch.equal, found.state_dict().values(), wanted.state_dict().values()))


def test_no_weights_are_claimed_that_there_are_not(monkeypatch):
    with pytest.raises(ValueError, match="no trained weights of convnet_aig_101"):
        hub("convnet_aig_101", pretrained=True)
    wanted = dict(hub("resnet_50").state_dict())
    monkeypatch.setattr(networks, "download", lambda source, arch: wanted if arch == "resnet50" else {})
    found = hub("resnet_50", pretrained=True)
    assert all(map(torch.equal, found.state_dict().values(), wanted.values()))


def test_a_hostile_file_in_the_place_of_the_weights_is_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    shutil.copy(ROOT / "hubconf.py", tmp_path)
    place = Path("results", "model", "aig20-cifar10-jpeg-floor")
    model = shutil.copytree(ROOT / place, tmp_path / place)
    torch.save(Hostile(), model / "model.safetensors")
    with pytest.raises(aig.networks.InputError, match="cannot be read as safetensors"):
        torch.hub.load(str(tmp_path), "aig_resnet20_cifar10_jpeg", source="local")
    assert not (tmp_path / "executed").exists()
