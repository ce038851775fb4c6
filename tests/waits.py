"""What would have the host wait for a GPU, noticed without one: its operators at the dispatcher, and three methods that
on a CPU never get there."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

VALUES = {"_local_scalar_dense", "equal", "allclose", "_linalg_check_errors"}  # the host is given a number, or a bool
SIZES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}  # it learns a shape
COPIES = {"lift_fresh"}  # what torch.tensor and its like end with: pageable memory of the host goes to the device
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


def waits(operator, args, kwargs):
    """Whether a call of an operator of ATen needs a value of the device before it returns, or copies to it."""
    name = operator.overloadpacket.__name__
    if name in INDEXING:  # a mask is an index once its True values are counted
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name in VALUES | SIZES | COPIES


class Watching(TorchDispatchMode):
    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if waits(operator, args, kwargs or {}):
            self.note(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


@contextmanager
def watching(note):
    """Calls `note(name)` for each wait inside the block."""

    def noting(name, original):
        def method(self, *args, **kwargs):
            note(name)
            return original(self, *args, **kwargs)

        return method

    with pytest.MonkeyPatch.context() as patch, Watching(note):
        for name in ("tolist", "cpu", "numpy"):
            patch.setattr(torch.Tensor, name, noting(name, getattr(torch.Tensor, name)))
        yield
