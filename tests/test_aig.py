"""The library's face is lazy: nobody waits for what they do not use."""

import subprocess
import sys
from pathlib import Path

import pytest

import aig

ROOT = Path(__file__).parent.parent


def imported_by(statement):
    """The top-level packages that a fresh Python has imported after a statement."""
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_library_imports_no_torch():
    assert not imported_by("import aig; dir(aig)") & {"torch", "torchvision", "numpy", "PIL", "convnet_aig", "utils"}


def test_the_scripts_import_nothing_that_only_some_runs_need():
    loaded = imported_by("import train, train_img; train.make_parser(); train_img.make_parser()")
    assert "torch" in loaded
    assert not loaded & {"torchvision", "sklearn", "scipy", "visdom", "matplotlib"}


def test_every_name_it_offers_is_there():
    assert set(aig.__all__) == set(aig.PLACES) <= set(dir(aig))
    for name in aig.__all__:
        assert callable(getattr(aig, name))
    with pytest.raises(AttributeError, match="module 'aig' has no attribute 'accelerated'"):
        aig.accelerated  # noqa: B018
