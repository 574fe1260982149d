"""A rehearsal for a GPU on a machine without one: tensors without data that say they lie on "cuda".

    with on_a_gpu():                                shapes, types and devices alone, as PyTorch's FakeTensorMode
        model = moved(VisionTransformer(config))
        loss = step(model, torch.empty(8, 3, 224, 224, device="cuda"))
        gradients(loss, model.parameters())         in place of loss.backward(), which `on_a_gpu` also does
    written = compiled(step, model, images)         what torch.compile would give an H100: Triton's source

Not covered: any number, races, speed, what libraries refuse (cuDNN, cuBLAS, nvJPEG), launches of kernels.
"""

import copy
import logging
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config, scheduler
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.graph import get_gradient_edge
from torch.utils import _triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def gradients(outputs, inputs: Iterable[Tensor], grad_outputs=None, **_) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad`, node after node: PyTorch's engine asks the driver for streams."""
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    given = [torch.ones_like(out) for out in outputs] if grad_outputs is None else grad_outputs
    due: dict = defaultdict(dict)  # node -> number of its result in the forward pass -> gradient
    missing: dict = defaultdict(int)  # node -> how many nodes still owe it one

    def add(node, number: int, grad: Tensor | None) -> None:
        if grad is not None:
            like = node._input_metadata[number]
            assert grad.device == like.device, f"{node.name()}: {grad.device}, not {like.device}"
            grad = grad if grad.shape == like.shape else grad.sum_to_size(like.shape)
            grad = grad.to(like.dtype)
            due[node][number] = due[node][number] + grad if number in due[node] else grad

    with torch.no_grad():
        for out, grad in zip(outputs, [given] if isinstance(given, Tensor) else given, strict=True):
            edge = get_gradient_edge(out)
            add(edge.node, edge.output_nr, grad)
        todo = seen = set(due)
        while todo:
            reached = [node for each in todo for node, _ in each.next_functions if node]
            for node in reached:
                missing[node] += 1
            todo = set(reached) - seen
            seen = seen | todo
        ready = [node for node in [*due] if not missing[node]]
        while ready:
            node = ready.pop()
            found, edges = [None] * len(node.next_functions), node.next_functions
            if edges and due[node]:
                arguments = [due[node].get(i) for i in range(len(node._input_metadata))]
                in_python = hasattr(node, "needs_input_grad")  # and speaks of what is no tensor, too
                found = node.apply(*arguments) if in_python else node(*arguments)
                found = found if isinstance(found, tuple) else (found,)
                if in_python:
                    found = [grad for grad, asked in zip(found, node.needs_input_grad, strict=False) if asked]
                    edges = [edge for edge in edges if edge[0]]
            for (other, number), grad in zip(edges, found, strict=True):
                if other:
                    add(other, number, grad)
                    missing[other] -= 1
                    ready += [other] * (not missing[other])
        ends = map(get_gradient_edge, inputs)
        return tuple(due[end.node].get(end.output_nr) for end in ends)


def _backward(loss: Tensor) -> None:
    """`Tensor.backward`."""
    leaves, todo, seen = {}, [get_gradient_edge(loss).node], set()
    while todo:
        node = todo.pop()
        if node and node not in seen:
            seen.add(node)
            todo += [other for other, _ in node.next_functions]
            if hasattr(node, "variable"):
                leaves[node.variable] = None
    for leaf, grad in zip(leaves, gradients(loss, leaves), strict=True):
        leaf.grad = grad if leaf.grad is None or grad is None else leaf.grad + grad


@contextmanager
def on_a_gpu() -> Iterator[FakeTensorMode]:
    """Within, tensors have no data and may lie on "cuda"."""
    with ExitStack() as stack:
        for where, name, answer in (
            (Tensor, "backward", _backward),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),  # autocast
            (torch.cuda, "is_bf16_supported", lambda *_: True),
        ):
            stack.enter_context(mock.patch.object(where, name, answer))
        yield stack.enter_context(FakeTensorMode())


def moved(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The model with parameters and buffers on a GPU, in place; of another type, if one is given."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                empty = torch.empty(p.shape, dtype=dtype or p.dtype, device="cuda")
                module._parameters[name] = nn.Parameter(empty, p.requires_grad)
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else torch.empty(b.shape, dtype=b.dtype, device="cuda")
    return model


class Witness(TorchDispatchMode):
    """Tensors on the CPU are real; what lies on the GPU has no data. Each operator for which the host would wait
    until the GPU is done is noted, with the function of the package that asks for it: a number or a size made of
    values; a copy to the CPU, whose values then are ones; a copy from memory that is not pinned, or that is not
    told not to wait. Tensors of two devices in one operator raise, as ever."""

    BY_VALUE = ("nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount")

    def __init__(self):
        super().__init__()
        self.waits: Counter[str] = Counter()

    def note(self, what: str, *_) -> None:
        stack = traceback.extract_stack()
        lines = [f for f in stack if "/cpvt/" in f.filename and "/site-packages/" not in f.filename]
        where = Path(lines[-1].filename).stem + "." + lines[-1].name if lines else "test"
        self.waits[f"{where}: {what}"] += 1

    def _places(self, mask: Tensor) -> list[Tensor]:
        """Where a mask holds: of one on the GPU, everywhere."""
        with unset_fake_temporarily():
            return [*(torch.ones(mask.shape) if mask.is_cuda else mask).nonzero().unbind(1)]

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, operator.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        cuda, to = [t for t in given if t.is_cuda], kwargs.get("device")
        if not cuda and not (to is not None and torch.device(to).type == "cuda"):
            with unset_fake_temporarily():
                return operator(*args, **kwargs)
        if name == "_local_scalar_dense":
            self.note("number")
            return {torch.bool: True, torch.int64: 1}.get(given[0].dtype, 1.0)
        waits = name in self.BY_VALUE
        if name.startswith("index") and isinstance(args[1], list | tuple):
            chosen = [i for i in args[1] if i is not None]
            waits = any(i.dtype == torch.bool or not i.is_cuda for i in chosen)
            split = [[i] if i is None or i.dtype != torch.bool else self._places(i) for i in args[1]]
            args = args[0], [i for part in split for i in part], *args[2:]
        if waits:
            self.note(name)
        if name == "copy_" and not args[0].is_cuda or name == "_to_copy" and cuda and to is not None:
            if name == "copy_" or torch.device(to).type == "cpu":
                self.note("to the CPU")
                like = args[0]
                with unset_fake_temporarily():
                    return torch.ones(like.shape, dtype=kwargs.get("dtype") or like.dtype)
        elif name in ("copy_", "_to_copy") and len(cuda) < len(given):
            free = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            source = args[name == "copy_"]
            if not (free and getattr(source, "pinned", False)):
                self.note("from the CPU")
        return operator(*args, **kwargs)


def _pinned(tensor: Tensor) -> Tensor:
    """`Tensor.pin_memory`."""
    copy = tensor.clone()
    copy.pinned = True
    return copy


@contextmanager
def watched() -> Iterator[Witness]:
    """`on_a_gpu`, for whole programs: what is computed on the CPU is computed; -> who waited for the GPU."""
    witness, generator = Witness(), torch.Generator
    stream = SimpleNamespace(synchronize=lambda: witness.note("stream"))
    with on_a_gpu() as mode, ExitStack() as stack:
        mode.allow_non_fake_inputs = True
        for where, name, answer in (
            (Tensor, "pin_memory", _pinned),
            (nn.Module, "double", lambda model: moved(model, torch.float64)),
            (torch, "Generator", lambda *_: generator()),
            (torch.cuda, "current_stream", lambda *_: stream),
        ):
            stack.enter_context(mock.patch.object(where, name, answer))
        yield stack.enter_context(witness)


class Written(NamedTuple):
    """One graph, as Inductor would run it on a GPU."""

    source: str  # a module in Python: Triton's kernels, and the calls of these and of libraries
    bytes: int  # that all kernels and calls read and write

    @property
    def kernels(self) -> int:
        return self.source.count("async_compile.triton(")


# What Inductor asks of a card.
H100 = {"name": "NVIDIA H100", "major": 9, "minor": 0, "multi_processor_count": 132, "warp_size": 32}
H100 |= {"regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048, "total_memory": 80 << 30}
H100 |= {"max_threads_per_block": 1024, "shared_memory_per_block": 49152, "L2_cache_size": 50 << 20}
H100 |= {"shared_memory_per_block_optin": 232448, "gcnArchName": ""}


@contextmanager
def _pretended() -> Iterator[None]:
    """Inductor finds an H100; nothing is asked of a driver, nothing computed or timed in order to decide."""
    import triton.runtime
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 90, 32)
    driver = SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0)
    properties = {"get_device_properties": SimpleNamespace(**H100)}
    card = {"is_available": True, "device_count": 1, "current_device": 0, **properties}
    switched = {"_exchange_device": 0, "_maybe_exchange_device": 0}
    both = {"exchange_device": 0, "maybe_exchange_device": 0}
    switched |= {"get_device_capability": (9, 0), "get_rng_state": torch.zeros(16), "set_rng_state": None}
    parts = [(torch.cuda, card | switched)]
    parts += [(CudaInterface, card | both), (CudaInterface.Worker, properties)]
    parts += [(scheduler, {"has_triton": True}), (_triton, {"has_triton": True})]
    # Patterns for which examples are tried on the device, and constants that are computed on it.
    parts += [(torch._inductor.fx_passes.joint_graph, {"lazy_init": None})]
    with ExitStack() as stack:
        for where, answers in parts:
            for name, answer in answers.items():
                stack.enter_context(mock.patch.object(where, name, lambda *_, a=answer, **__: a))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))
        stack.enter_context(config.patch(joint_graph_constant_folding=False, force_disable_caches=True))
        stack.enter_context(mock.patch.object(torch.autograd, "grad", gradients))
        yield


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """`F.scaled_dot_product_attention` by the operators that a GPU chooses; it asks the driver which."""
    if q.dtype == torch.float64:
        return _in_steps(q, k, v, attn_mask)
    if attn_mask is None and q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    if attn_mask is not None:
        T = attn_mask.shape[-1]
        attn_mask = F.pad(attn_mask, (0, -T % 16))[..., :T].expand(*q.shape[:3], T)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True)[0]


_in_steps = F.scaled_dot_product_attention


class _Stop(BaseException):
    """The code is written; it is not to be run."""


def compiled(function: Callable, *arguments: Any) -> list[Written]:
    """`function` compiled for an H100, called within `on_a_gpu`: the code of its graph, and where something in it
    asks for gradients that of the backward pass. The function gives a tensor."""
    found: list[Written] = []

    def keep(graph: GraphLowering, code) -> None:
        moved = sum(node.get_read_write_buffers_sizes() for node in graph.scheduler.nodes)
        found.append(Written(code.value, moved))
        raise _Stop

    def inner(graph, examples, **options):
        own = copy.deepcopy(graph)  # Inductor changes the other; this one runs, on tensors without data
        lines = mock.patch.object(GraphLowering, "_compile_to_module_lines", keep)
        with _pretended(), lines, suppress(_Stop):
            compile_fx_inner(graph, examples, **options)
        return make_boxed_func(own.forward)

    def backend(graph, examples):
        with _pretended():
            return compile_fx(graph, examples, inner_compile=inner)

    torch._dynamo.reset()
    try:
        quiet = mock.patch.object(logging.getLogger("torch.__trace"), "handlers", [])  # or pytest has it all
        with quiet, mock.patch.object(F, "scaled_dot_product_attention", _attention):
            out = torch.compile(function, backend=backend, fullgraph=True)(*arguments)
            if out.requires_grad:
                _backward(out)
    finally:
        torch._dynamo.reset()
    return found
