"""Functions of tensors as graphs of tensor operations: traced from the code that defines them, and compiled."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch._inductor
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)

Graph = Callable[..., Sequence[Tensor]]
Table = Mapping[Any, Callable[..., Any]]
"""Operations to trace as others, by what does them instead."""


class Untraceable(RuntimeError):
    """A function that could not be traced or compiled here, and why."""


class Spec(NamedTuple):
    """What a graph is specialised to in one input."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def specs_of(tensors: Sequence[Tensor]) -> tuple[Spec, ...]:
    """What a graph of these inputs is specialised to."""
    return tuple(Spec(tuple(x.shape), x.dtype, x.device) for x in tensors)


def examples_of(specs: Sequence[Spec]) -> list[Tensor]:
    """Inputs to trace with."""
    return [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in specs]


def graph_of(
    function: Callable[..., tuple[Tensor, ...]], examples: Sequence[Tensor], compiled: bool, table: Table | None = None
) -> Graph | Untraceable:
    """The operations that a function does on tensors laid out as the examples, its results laid out by rows too.

    Where there is no such graph, what a choice's own code or the compiler had against it.
    """
    try:
        with unwatched():
            return compiled_graph(function, examples, compiled, table)
    except Exception as error:
        return Untraceable(f"{type(error).__name__}: {error}".splitlines()[0])


@contextmanager
def unwatched() -> Generator[None]:
    """Within it, no hook of somebody's sees what is saved for a backward pass: tracing is none of their forward pass.

    Gradient checkpointing's would otherwise stop the trace, or take what it saves for the model's.
    """
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        yield


def trace(function: Callable[..., Any], examples: Sequence[Tensor], table: Table | None = None) -> GraphModule:
    """The operations of a function, with the shapes of all of them in one world.

    Without it `make_fx` makes a world for each, which takes more time than all else.
    """
    with torch.no_grad(), tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        return make_fx(function, dict(table or {}))(*examples)


def made(graph: Graph | Untraceable) -> Graph:
    """The graph, if there is one. Raises Untraceable."""
    if isinstance(graph, Untraceable):
        raise graph
    return graph


def compiled_graph(
    function: Callable[..., tuple[Tensor, ...]], examples: Sequence[Tensor], compiled: bool, table: Table | None = None
) -> Graph:
    """The same, where there is nothing else to do: raises whatever the tracer or the compiler does."""
    with torch.no_grad():
        traced = trace(lambda *flat: tuple(x.contiguous() for x in function(*flat)), examples, table)
        traced.graph.eliminate_dead_code()
        _turn_products(traced.graph)
        # What was turned, or stands in for an operation of the table, is laid out otherwise than the tracer saw, and what
        # was a view of the one may be none of the other.
        for node in traced.graph.nodes:
            if node.target in VIEWS:
                node.target = torch.ops.aten.reshape.default
        traced.recompile()
        if not compiled:
            return traced
        for node in traced.graph.nodes:
            # Shapes of the tracer's world, where the compiler makes its own.
            node.meta.pop("val", None)
        # Past dynamo, which has nothing to trace here and whose guards would be checked at every call; called from C++,
        # since from Python the calls of some fifty kernels a window take a tenth of its time; and with inputs that their
        # makers lay out as the examples.
        options = {"size_asserts": False, "cpp_wrapper": True}
        return cast(Graph, torch._inductor.compile(traced, list(examples), options=options))


def _turn_products(graph: FxGraph) -> None:
    """Make of every (a b)^T whose a b nothing else reads b^T a^T: the same numbers, laid out as they are read.

    The pull-back of x^T g gives its gradient in x transposed, and what is fused with it would turn all it reads.
    """
    aten = torch.ops.aten
    for product in graph.find_nodes(op="call_function", target=aten.bmm.default):
        last, size = product, product.meta["val"].shape[-2:]
        while (user := _only_user(last)) is not None and user.target in VIEWS and user.meta["val"].shape[-2:] == size:
            last = user
        if user is None or user.target is not aten.transpose.int:
            continue
        shape = user.meta["val"].shape
        if {cast(int, axis) % len(shape) for axis in user.args[1:]} != {len(shape) - 2, len(shape) - 1}:
            continue
        with graph.inserting_before(product):
            a, b = (graph.call_function(aten.transpose.int, (x, 1, 2)) for x in product.args)
            turned = graph.call_function(aten.bmm.default, (b, a))
            user.replace_all_uses_with(graph.call_function(aten.view.default, (turned, list(shape))))
    graph.eliminate_dead_code()


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
