"""What several test files use."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aig import console

# One thread here and in the processes that tests start: results repeat, and small nets are faster so
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # where the servers of tests are
torch.set_num_threads(1)


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request, monkeypatch):
    """The CPU, and a GPU where there is one; its convolutions in float32 and not in TF32, to compare them closely."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device(request.param)


@pytest.fixture
def run(capsys):
    """Runs a script's main as the shell would: `run(train.main, "--epochs", 1)` -> (status, stdout, stderr)."""

    def call(main, *argv):
        with pytest.raises(SystemExit) as end:
            console.run_command(lambda: main([str(value) for value in argv]), "script")
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


@pytest.fixture(scope="session")
def image_folder():
    """Writes random images in class folders: `image_folder(root, train=8, val=3)` -> root, that many in each class."""

    def write(root, classes=("ant", "bee"), size=(32, 32), suffix="png", **counts):
        random = np.random.default_rng(0)
        for split, count in counts.items():
            for name in classes:
                folder = Path(root) / split / name
                folder.mkdir(parents=True)
                for number in range(count):
                    pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{number}.{suffix}")
        return root

    return write


@pytest.fixture
def contents():
    """The bytes of every file below a folder, to see that nothing changed."""

    def read(folder):
        return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}

    return read
