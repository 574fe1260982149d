"""Bytes that the kernels of one training step read and write, counted without a GPU.

The step is traced on shapes alone, for a CPU, with the branches that the model takes on a GPU; then every tensor
is said to lie on an H100, and PyTorch's compiler splits the graph in forward and backward pass and fuses it as it
would there, up to the point where it would write code. Each kernel, generated or called, counts what it must read
and write once. Not counted: what caches save or miss, loss and optimiser, sums within attention and the PEG.

Letters: B images of a batch, S side of an image in pixels.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import compile_fx
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.node import map_aggregate

from cpvt.config import ModelConfig
from cpvt.lab.timm_baseline import timm_model
from cpvt.model import fused_peg
from cpvt.model.vit import VisionTransformer
from cpvt.training.optim import add_up_biases

GPU = torch.device("cuda", 0)
H100 = {"name": "H100", "major": 9, "minor": 0, "multi_processor_count": 132, "warp_size": 32}
H100 |= {"regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048}
H100 |= {"max_threads_per_block": 1024, "total_memory": 85_000_000_000, "L2_cache_size": 50 << 20}
H100 |= {"shared_memory_per_block_optin": 232448, "shared_memory_per_multiprocessor": 233472}


def kernel_bytes(
    config: ModelConfig, batch_size: int, timm: bool = False, bf16_tokens: bool = False
) -> dict[str, int]:
    """-> bytes of the "forward" and of the "backward" pass of (B, 3, S, S) in bf16, drop path as configured.

    For use in a process of its own: PyTorch remembers that there is a GPU.
    """
    with torch.device("meta"):  # no first weights are drawn
        model = (timm_model if timm else VisionTransformer)(config).train()
    images = {"images": (batch_size, config.in_channels, *config.image_size)}
    if not timm:
        add_up_biases(model)
        model.bf16_tokens = bf16_tokens
        if config.drop_path:
            images["drop_path_scale"] = config.depth, 2, batch_size
    with FakeTensorMode() as fake:
        given = [torch.empty(shape) for shape in images.values()]
        joint = _trace(model, given)
        with V.set_fake_mode(fake):
            joint_graph_passes(joint)
            _move(joint)
            parts = min_cut_rematerialization_partition(joint, None, num_fwd_outputs=1)
            names = "forward", "backward"
            return {name: _count(graph, name == "backward") for name, graph in zip(names, parts, strict=True)}


def _trace(model: nn.Module, given: list[Tensor]) -> torch.fx.GraphModule:
    """The graph of forward and backward pass, decomposed as for the compiler."""
    names = [name for name, _ in model.named_parameters()]
    weights = [torch.empty(p.shape, requires_grad=p.requires_grad) for p in model.parameters()]
    buffers = {name: torch.empty(b.shape, dtype=b.dtype) for name, b in model.named_buffers()}

    def forward(*tensors: Tensor) -> tuple[Tensor]:
        parameters = dict(zip(names, tensors[len(given) :], strict=True))
        with torch.autocast("cpu", torch.bfloat16):
            return (functional_call(model, parameters | buffers, tensors[: len(given)]),)

    draw = lambda x, p, generator=None: (torch.rand_like(x, dtype=torch.float32) < p).to(x.dtype)  # noqa: E731
    table = select_decomp_table() | {torch.ops.aten.bernoulli.p: draw}
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.Tensor, "is_cuda", True, create=True))
        stack.enter_context(patch.object(fused_peg, "triton", True))
        return aot_export_joint_simple(forward, (*given, *weights), trace_joint=True, decompositions=table)


def _move(graph: torch.fx.GraphModule) -> None:
    """Says of every tensor in a graph that it lies on the GPU."""

    def moved(value):
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)
        return GPU if isinstance(value, torch.device) else value

    with V.fake_mode:
        for node in graph.graph.nodes:
            node.meta.pop("tensor_meta", None)
            node.meta["val"] = torch.utils._pytree.tree_map(moved, node.meta.get("val"))
            node.args, node.kwargs = map_aggregate(node.args, moved), map_aggregate(node.kwargs, moved)


def _count(graph: torch.fx.GraphModule, backward: bool) -> int:
    inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    with _pretended_gpu():
        compile_fx.view_to_reshape(graph)
        compile_fx.fake_tensor_prop(graph, inputs)
        compile_fx._recursive_post_grad_passes(graph, is_inference=False)
        lowered = GraphLowering(graph, example_inputs=inputs, is_backward=backward)
        with V.set_graph_handler(lowered), V.set_debug_handler(DebugContext()), V.set_extern_kernel_nodes([]):
            lowered.run(*inputs)
            lowered._update_scheduler()
            return sum(node.get_read_write_buffers_sizes() for node in lowered.scheduler.nodes)


@contextmanager
def _pretended_gpu() -> Iterator[None]:
    said = {"is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": (9, 0)}
    said |= {"get_device_properties": SimpleNamespace(**H100), "is_bf16_supported": True}
    answers = {name: staticmethod(lambda *_, answer=answer, **__: answer) for name, answer in said.items()}
    own = {name: answers[name] for name in ("is_available", "device_count", "current_device")}
    properties = {"get_device_properties": answers["get_device_properties"]}
    capability = {"get_compute_capability": staticmethod(lambda *_: 90)}
    with (
        patch.multiple(torch.cuda, **answers),
        patch.multiple(CudaInterface, **own, **properties, **capability),
        patch.multiple(CudaInterface.Worker, **properties),
    ):
        yield
