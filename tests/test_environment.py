"""Seeds, devices and what is recorded of the machine."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from steps import small_net

from aig import environment
from aig.console import InputError
from aig.distributed import World

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def test_a_seed_is_a_function_of_its_key():
    keys = [(1, "noise", 1, 2), (1, "noise", 2, 1), (1, "noise", 12), (2, "noise", 1, 2), (1, "weights"), ("1",), (1,)]
    seeds = [environment.derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert environment.derive_seed(1, "noise", 1, 2) == seeds[0]
    torch.manual_seed(max(seeds))  # takes 64 bits
    # a change here would make every earlier training impossible to repeat
    assert environment.derive_seed(1, "weights") == 3057334639812886864


def test_a_device_that_is_not_there_is_an_input_error():
    assert environment.select_device("cpu") == CPU
    for kind, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if not there:
            with pytest.raises(InputError, match=f"--device {kind}: this machine or this build of torch has none"):
                environment.select_device(kind)


def test_auto_is_the_best_device_there_is(monkeypatch):
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert environment.select_device("auto").type == expected


def test_several_processes_take_a_gpu_each_or_the_cpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(environment.distributed, "world", lambda: World(1, 2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert environment.select_device("auto") == torch.device("cuda", 1)
    assert chosen == [1]
    assert environment.select_device("cpu") == CPU
    with pytest.raises(InputError, match="--device mps: several processes need CUDA"):
        environment.select_device("mps")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="this machine has 2 GPUs: use torchrun --nproc-per-node 2"):
        environment.select_device("auto")


def test_what_is_recorded_of_the_machine():
    found = environment.environment(small_net())
    assert found.keys() == {"git_commit", "versions", "hardware", "processes", "parameters"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == sys.version.split()[0]
    assert found["processes"] == 1
    assert found["parameters"] == sum(p.numel() for p in small_net().parameters())
    assert re.fullmatch(r"cpu \(.+, 1 threads\)", found["hardware"])


def test_the_commit_is_that_of_the_checkout_wherever_one_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    commit = environment.git_commit()
    there = ["git", "-C", str(ROOT), "rev-parse"]  # git may be missing, or refuse the checkout of another owner
    if shutil.which("git") and subprocess.run(there, capture_output=True).returncode == 0:
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", commit)
    monkeypatch.setenv("PATH", str(tmp_path))  # without git
    assert environment.git_commit() is None


def test_folders_made_for_nothing_are_removed(tmp_path):
    (tmp_path / "there").mkdir()
    with environment.without_empty_folders(tmp_path / "there" / "a" / "b"):
        (tmp_path / "there" / "a" / "b").mkdir(parents=True)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    with environment.without_empty_folders(tmp_path / "c" / "d"):
        (tmp_path / "c" / "d").mkdir(parents=True)
        (tmp_path / "c" / "file").touch()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["file"]


def test_deterministic_algorithms_are_asked_for(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.utils.deterministic.fill_uninitialized_memory
    try:
        environment.make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def test_keeping_memory_saves_the_page_faults_of_a_step():
    code = """
import resource, torch
from aig import environment

def faults():
    for step in range(4):
        if step == 2:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(2**20) for _ in range(20)]  # 4 MiB each, all of them freed at the end
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), int(environment.keep_memory()), faults())
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    returned, has_the_setting, kept = map(int, done.stdout.split())
    if not has_the_setting:
        pytest.skip("this C library has no such setting")
    assert kept < returned / 2


def test_a_compiler_that_does_not_work_is_an_input_error(monkeypatch, capsys):
    def broken(function):
        raise RuntimeError("no g++\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(InputError, match=r"--compile does not work here: no g\+\+; on a CPU it needs a C\+\+ compiler"):
        environment.try_compiler(CPU)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    environment.try_compiler(CPU)
    assert capsys.readouterr().out.count("compiling: the first step can take minutes") == 2
