"""Tensors without data on a GPU, and the bytes they would take there.

CPU tensors stay real. A tensor on the GPU is a FakeTensor: shape, type and place, no data; integer
and boolean ones keep their true values on the side, so that what a program reads from them (masks,
lengths, places) is what a real run would read.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from itertools import count
from weakref import ref

import torch
from bitsandbytes.backends.cuda import ops as bnb_cuda
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

GB = 1024**3
SMALL = 2**24  # elements: a factory's integers are kept up to here


class Ledger(TorchDispatchMode):
    """Counts the bytes of live storages on the GPU, by the part of the run that made them.

    Used as a context. `phase(name)` begins a phase; `peak(name)` gives the highest sum in it, and
    what was alive then by part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.values = WeakIdKeyDictionary()  # a fake integer tensor: its real values
        self.parts: dict[int, str] = {}  # of an allocation: what it belongs to
        self.part = "model"
        self._held: dict[int, tuple] = {}  # a storage's address: (weak reference, number)
        self._events: list[tuple[int, int]] = []  # (number, bytes); freed: negative
        self._phases: list[tuple[str, int]] = []
        self._now = ""
        self._numbers = count()

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is a copy
        return super().__enter__()

    # What was allocated.

    def phase(self, name: str) -> None:
        """What follows counts as `name`, which may have come before."""
        if name != self._now:
            self._now = name
            self._phases.append((name, len(self._events)))

    @contextmanager
    def belongs(self, part: str):
        """What is made in here belongs to `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def relabel(self, tensor: torch.Tensor, part: str) -> None:
        """Say that what `tensor` lies in belongs to `part`."""
        self.parts[self._held[tensor.untyped_storage()._cdata][1]] = part

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._held or not storage.nbytes():
            return
        size = -(-storage.nbytes() // 512) * 512  # torch's allocator rounds so
        number = next(self._numbers)
        self._events.append((number, size))
        self.parts[number] = self.part
        gone = lambda _, address=address, size=size: self._gone(address, size)  # noqa: E731
        self._held[address] = (ref(storage, gone), number)

    def _gone(self, address: int, size: int) -> None:
        self._events.append((self._held.pop(address)[1], -size))

    def workspace(self, size: int) -> None:
        """Bytes that a kernel takes and gives back within one operation."""
        number = next(self._numbers)
        self.parts[number] = "workspace"
        self._events += [(number, size), (number, -size)]

    # What comes of it.

    def _spans(self, phase: str) -> list[tuple[int, int]]:
        ends = [start for _, start in self._phases[1:]] + [len(self._events)]
        spans = zip(self._phases, ends, strict=True)
        return [(start, end) for (name, start), end in spans if name == phase]

    def peak(self, phase: str) -> dict[str, float]:
        """GB by part when most is alive in `phase`; `paged` memory, which torch does not count,
        decides nothing and is added."""
        inside = {i for span in self._spans(phase) for i in range(*span)}
        now = most = at = 0
        for index, (number, size) in enumerate(self._events):
            now += 0 if self.parts[number] == "paged" else size
            if index in inside and now > most:
                most, at = now, index + 1
        parts = Counter()
        for number, size in self._events[:at]:
            parts[self.parts[number]] += size / GB
        return dict(parts)

    # How operations are answered.

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves, _ = tree_flatten((args, kwargs))
        here = any(isinstance(x, FakeTensor) for x in leaves)
        to = kwargs.get("device")
        if not here and (to is None or torch.device(to).type != "cuda"):
            return func(*args, **kwargs)
        if special := SPECIAL.get(func.name().split(".")[0]):
            out = special(self, func, args, kwargs)
            if out is not NotImplemented:
                return out
        args, kwargs = self._real_masks(args, kwargs)
        known = self._known(func, args, kwargs)
        with self.fake:
            out = func(*args, **kwargs)
        self._keep(out, known)
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor) and tensor.device.type == "cuda":
                self._note(tensor)
        return out

    def _real_masks(self, args, kwargs):
        """Boolean indices as the places that they mean: how many there are is in their values."""

        def places(x):
            if not isinstance(x, (list, tuple)):
                return x
            found = []
            for one in x:
                if isinstance(one, torch.Tensor) and one.dtype == torch.bool:
                    real = self.values[one] if isinstance(one, FakeTensor) else one
                    found += [self.on_gpu(i) for i in real.nonzero(as_tuple=True)]
                else:
                    found.append(one)
            return found

        return tuple(map(places, args)), kwargs

    def on_gpu(self, real: torch.Tensor) -> torch.Tensor:
        """A fake like `real`, and with its values if they are integers."""
        with self.fake:
            tensor = torch.empty(real.shape, dtype=real.dtype, device="cuda")
        if not real.is_floating_point():
            self.values[tensor] = real
        self._note(tensor)
        return tensor

    def _known(self, func, args, kwargs):
        """The operation's result on real values, where all that goes in is known and whole."""
        leaves = tree_leaves((args, kwargs))
        fakes = [x for x in leaves if isinstance(x, FakeTensor)]
        reals = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)]
        if any(x not in self.values for x in fakes) or any(x.is_floating_point() for x in reals):
            return None
        if not fakes and not reals:  # a factory
            sizes = args[0] if args and isinstance(args[0], (list, tuple)) else ()
            if "empty" in func.name() or torch.Size(sizes).numel() > SMALL:
                return None
        to_real = lambda x: self.values[x] if isinstance(x, FakeTensor) else x  # noqa: E731
        args, kwargs = tree_map(to_real, (args, kwargs))
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)

    def _keep(self, out, known) -> None:
        """Remember the values of integers; what is known no longer is forgotten."""
        fakes = tree_leaves(out)
        for fake, real in zip(fakes, tree_leaves(known) or [None] * len(fakes), strict=False):
            if not isinstance(fake, FakeTensor):
                continue
            if isinstance(real, torch.Tensor) and not fake.is_floating_point():
                self.values[fake] = real
            else:
                self.values.pop(fake, None)


def _read(ledger, func, args, kwargs):
    """`.item()`: the value, or 1."""
    tensor = args[0]
    if tensor in ledger.values:
        return ledger.values[tensor].item()
    return 1.0 if tensor.is_floating_point() else 1


def _copy(ledger, func, args, kwargs):
    """To the CPU: the values, or ones. From the CPU: a fake."""
    tensor, to = args[0], kwargs.get("device")
    if to is None or isinstance(tensor, FakeTensor) == (torch.device(to).type == "cuda"):
        return NotImplemented
    dtype = kwargs.get("dtype") or tensor.dtype
    if isinstance(tensor, FakeTensor):
        known = ledger.values.get(tensor)
        return (
            torch.ones(tensor.shape, dtype=dtype) if known is None else known.to(dtype, copy=True)
        )
    return ledger.on_gpu(tensor.to(dtype, copy=True))


def _gemm_4bit(ledger, func, args, kwargs):
    """bitsandbytes' own choice: its kernel, or the whole weight dequantized and torch's product."""
    x, (rows, columns) = args[0], args[2]
    tokens = x.numel() // x.shape[-1]
    few = tokens <= bnb_cuda._gemm_4bit_custom_max_m
    if few and bnb_cuda._gemm_4bit_use_custom_fn(0, x.dtype, tokens, rows, columns):
        return NotImplemented
    with ledger:
        return bnb_cuda._dequant_linear_fallback(*args, **kwargs)


def _flash_backward(ledger, func, args, kwargs):
    """The kernel sums the queries' gradient in float32 and keeps a float a query and head."""
    query = args[1]
    pairs, heads, tokens, size = query.shape
    padded = -(-tokens // 128) * 128
    ledger.workspace(4 * pairs * heads * padded * (size + 1))
    return NotImplemented


def _efficient_backward(ledger, func, args, kwargs):
    """This one, too, sums the queries' gradient in float32."""
    ledger.workspace(4 * args[1].numel())
    return NotImplemented


SPECIAL = {
    "aten::_local_scalar_dense": _read,
    "aten::_to_copy": _copy,
    "bitsandbytes::gemm_4bit": _gemm_4bit,
    "bitsandbytes::optimizer_update_32bit": lambda *x: None,
    "bitsandbytes::optimizer_update_8bit_blockwise": lambda *x: None,
    "aten::_scaled_dot_product_flash_attention_backward": _flash_backward,
    "aten::_scaled_dot_product_efficient_attention_backward": _efficient_backward,
}
