"""Functions of tensors as graphs of tensor operations: traced from the code that defines them, and compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch._inductor
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

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
        return compiled_graph(function, examples, compiled, table)
    except Exception as error:
        return Untraceable(f"{type(error).__name__}: {error}".splitlines()[0])


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
        traced = make_fx(lambda *flat: tuple(x.contiguous() for x in function(*flat)), dict(table or {}))(*examples)
        if table:
            # What stands in for an operation may lay its result out otherwise, where a view would be none.
            for node in traced.graph.nodes:
                if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
                    node.target = torch.ops.aten.reshape.default
        traced.graph.eliminate_dead_code()
        traced.recompile()
        if not compiled:
            return traced
        # Past dynamo, which has nothing to trace here and whose guards would be checked at every call.
        # Its inputs are laid out as the examples by their makers.
        return cast(Graph, torch._inductor.compile(traced, list(examples), options={"size_asserts": False}))
