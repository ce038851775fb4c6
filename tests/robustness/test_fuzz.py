"""Random command lines and damaged checkpoints: they work, or they are an InputError; nothing else ever happens."""

import contextlib
import io
import os

import pytest
import torch
from faults import same

import train
import train_img
import utils
from aig import runs
from aig.checkpoint import load_checkpoint
from aig.console import InputError

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("FUZZ_SECONDS", 3))  # for each test, about
DIGITS = ["--dataset", "digits", "--depth", 8, "--batch-size", 256, "--epochs", 1, "--target", 0.7, "--device", "cpu"]
PARSERS = {"train": (train.make_parser, ("depth",)), "train_img": (train_img.make_parser, ("arch",))}


def fuzzed(per_second):
    """Hypothesis' settings for a test that tries this many examples a second."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=int(SECONDS * per_second), deadline=None, suppress_health_check=checks)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one epoch, done."""
    root = tmp_path_factory.mktemp("fuzz")
    train.main([str(value) for value in [*DIGITS, "--save", root, "--expname", "run"]])
    return root / "run"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flags_of(parser):
    return [option for action in parser._actions for option in action.option_strings if option not in ("-h", "--help")]


WORDS = ["", "0", "-1", "0.5", "nan", "inf", "1e999", "x", "a/b", "..", "cpu", "off", "auto", "\0", "--", 300 * "x"]
VALUES = st.one_of(st.sampled_from(WORDS), st.integers().map(str), st.floats().map(str), st.text(max_size=8))


@pytest.mark.parametrize("script", PARSERS)
@fuzzed(per_second=100)
@given(data=st.data())
def test_any_command_line_is_parsed_or_refused(folder, script, data):
    make_parser, architecture = PARSERS[script]
    flags = st.sampled_from(flags_of(make_parser()))
    argv = data.draw(st.lists(st.one_of(flags, VALUES, st.tuples(flags, VALUES).map("=".join)), max_size=8))
    with contextlib.suppress(InputError):
        args, checkpoint = utils.parse(make_parser(), argv, architecture)
        assert checkpoint is None  # there is none to be found
        assert args.epochs >= args.start_epoch >= 1
    assert not list(folder.iterdir())


def outcome(argv):
    """The exit status of train.py, without a process of its own: 0 or 2."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            train.main([str(value) for value in argv])
        except InputError:
            return 2
    return 0


def goes_on(path):
    """What becomes of resuming, for no more epochs than are done."""
    return outcome(["--resume", path, "--device", "cpu", "--epochs", 1])


def loaded(path):
    """The tensors and numbers of a checkpoint, or None if it is refused."""
    try:
        return load_checkpoint(path)
    except InputError:
        return None


@fuzzed(per_second=200)
@given(data=st.data())
def test_damaged_bytes_are_refused_or_harmless(finished, folder, data):
    original = (finished / runs.CHECKPOINT).read_bytes()
    content = bytearray(original)
    # most of a file is weights: aim at the head and at the directory at the end, too
    ends = [(0, len(content)), (0, 2000), (len(content) - 6000, len(content))]
    places = st.one_of([st.integers(low, high - 1) for low, high in ends])
    for _ in range(data.draw(st.integers(1, 3))):
        place, kind = data.draw(places) % len(content), data.draw(st.sampled_from(["flip", "set", "cut", "insert"]))
        if kind == "flip":
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "set":
            content[place : place + 4] = data.draw(st.binary(min_size=1, max_size=4))
        elif kind == "insert":
            content[place:place] = data.draw(st.binary(min_size=1, max_size=16))
        else:
            del content[place : place + data.draw(st.integers(1, 1000))]
    path = folder / "damaged.pth.tar"
    path.write_bytes(content)
    checkpoint = loaded(path)
    assert checkpoint is None or same(checkpoint, loaded(finished / runs.CHECKPOINT))


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
NUMBERS = [torch.zeros(()), torch.zeros(3), torch.ones(2, 2), torch.tensor([1]), torch.tensor(torch.nan)]
TENSORS = st.sampled_from(NUMBERS)
THINGS = st.recursive(
    st.one_of(SCALARS, TENSORS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


def places(value, path=()):
    """The ways to all values in nested dicts and lists."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


@fuzzed(per_second=16)
@given(data=st.data())
def test_a_checkpoint_with_anything_anywhere_is_refused_or_works(finished, folder, data):
    checkpoint = torch.load(finished / runs.CHECKPOINT, weights_only=True)
    # the names of weights are many, and one is like the other: mostly draw from the rest
    everywhere = places(checkpoint)
    others = [path for path in everywhere if path[0] not in ("state_dict", "optimizer")]
    path = data.draw(st.one_of(st.sampled_from(others), st.sampled_from(everywhere)))
    value = checkpoint
    for key in path[:-1]:
        value = value[key]
    if data.draw(st.booleans()):
        value[path[-1]] = data.draw(THINGS)
    else:
        del value[path[-1]]
    run = folder / "run"
    run.mkdir(exist_ok=True)
    (run / runs.METRICS).write_bytes((finished / runs.METRICS).read_bytes())
    torch.save(checkpoint, run / runs.CHECKPOINT)
    assert goes_on(run / runs.CHECKPOINT) in (0, 2)


@fuzzed(per_second=250)
@given(content=st.one_of(st.binary(max_size=200), THINGS))
def test_anything_for_a_checkpoint_is_refused(folder, content):
    path = folder / "any.pth.tar"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert outcome(["--test", "--resume", path, "--device", "cpu"]) == 2
