"""What several test files use."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

import cli


@pytest.fixture
def run(capsys):
    """Runs a script's main as the shell would: `run(train.main, "--epochs", 1)` -> (status, stdout, stderr)."""

    def call(main, *argv):
        with pytest.raises(SystemExit) as end:
            cli.main(lambda: main([str(value) for value in argv]), "script")
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


@pytest.fixture
def contents():
    """The bytes of every file below a folder, to see that nothing changed."""

    def read(folder):
        return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}

    return read
