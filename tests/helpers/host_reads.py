"""Counts where a program would wait for a GPU: each value of a tensor that the host reads, or that a shape depends on."""

from collections import Counter

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "equal", "allclose")
FUNCTIONS = {getattr(Tensor, name): name for name in READS} | {torch.equal: "equal", torch.allclose: "allclose"}
OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal")


class HostReads(TorchFunctionMode):
    """Inside, `found` counts reads by operator; `launches` all operators that reach a backend, but views."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self._operators = _Operators(self)

    def __enter__(self) -> "HostReads":
        self._operators.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._operators.__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore
        name = FUNCTIONS.get(function)
        if name is None or name in ("item", "__bool__", "__int__", "__float__", "__index__"):  # operators see these
            return function(*args, **(kwargs or {}))
        self.found[name] += 1
        with torch._C.DisableTorchFunction():
            return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, reads: HostReads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore
        name = function._schema.name.split("::")[1]
        is_by_mask = name == "index" and any(
            isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in args[1]
        )
        if name in OPERATORS or is_by_mask or (name == "repeat_interleave" and len(args) == 1 and not kwargs):
            self.reads.found["index by mask" if is_by_mask else name] += 1
        if not function.is_view:
            self.reads.launches[name] += 1
        return function(*args, **(kwargs or {}))
