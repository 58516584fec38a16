"""Compiled decoding: the one-token step of a block as one compiled graph, opted into by `compile_decoding`.

The graph is traced from the block itself, so that no formula is written a second time. It is made once for each way in
which a token can stand in its window (at its end or not), each batch size and dtype; blocks that are alike share it, with
parameters and states as its inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from miras.choice import require
from miras.design import Design, LayerDesign
from miras.engine.chunk import Run, plan_runs
from miras.engine.dispatch import plan
from miras.engine.problem import MemoryState, State
from miras.kernels.fused import has_compiler
from miras.kernels.graph import Untraceable, compiled_graph
from miras.layer import LayerState, MemoryLayer
from miras.lm.backbone import MirasBlock
from miras.mixer import LayerCache


def compile_decoding(model: nn.Module) -> None:
    """From now on, one-token steps of the blocks of `model` run compiled wherever they can.

    They can in evaluation mode, without gradients and outside of autocast, with a cache that has seen the prompt, where all
    rows of the batch or none of them end a window. Elsewhere, and in blocks with softmax attention, everything runs as
    before, and so does a copy of the model. The first step of a kind is compiled for some seconds, fewer once it is in
    torch's cache on disk: it pays for thousands of tokens (docs/results/decode.md). Results are equal to rounding.

    >>> miras.compile_decoding(model)
    >>> model.generate(input_ids, max_new_tokens=4000)

    Raises:
        ValueError: `model` has no block that could be compiled, or the machine no C++ compiler.
    """
    blocks = [block for block in model.modules() if isinstance(block, MirasBlock)]
    reasons = [unfit(_design(block)) for block in blocks]
    able = [block for block, reason in zip(blocks, reasons, strict=True) if reason is None]
    shown = "; ".join(sorted({reason for reason in reasons if reason is not None})) or "the model has no MirasBlock"
    require(len(able) > 0, f"no one-token steps to compile: {shown}")
    on_cpu = any(parameter.device.type == "cpu" for block in able for parameter in block.parameters())
    require(not on_cpu or has_compiler(), "no C++ compiler (g++ or clang++, or the one in $CXX), which torch.compile needs")
    groups: list[tuple[LayerDesign, str, Graphs]] = []
    for block in able:
        design, shown = _design(block), repr(block)
        graphs = next((graphs for *kind, graphs in groups if kind == [design, shown]), None)
        if graphs is None:
            graphs = {}
            groups.append((design, shown, graphs))
        block.step = CompiledStep(block, graphs)


def _design(block: MirasBlock) -> LayerDesign:
    return block.config.layer_design(block.places[0])


def unfit(design: LayerDesign) -> str | None:
    """Why one-token steps of a block of this design cannot be compiled; None where they can."""
    if not isinstance(design, Design):
        return f"{design.kind} is a memory and softmax attention together"
    if not design.parametric:
        return "softmax attention has a state that grows or slides"
    return None if design.learning.linear else f"learning {design.learning.kind} gives no block matrices"


@dataclass(frozen=True)
class Graph:
    """A compiled step: its results are the hidden state, the tensors of the states and the `made` ones for later layers.

    `same` has, for each of them, the place of the input that it is, or None for one that the graph returns.
    """

    run: Callable[..., Sequence[Tensor]]
    same: tuple[int | None, ...]
    made: tuple[str, ...]


Graphs = dict[tuple[Any, ...], Graph]


class Slots:
    """A cache of a few states, for tracing."""

    def __init__(self, states: dict[int, State]) -> None:
        self.states = states

    def read(self, layer_idx: int) -> State | None:
        return self.states[layer_idx]

    def write(self, layer_idx: int, state: State, num_tokens: int) -> None:
        self.states[layer_idx] = state


class CompiledStep:
    """The one-token steps of a block; `graphs` are shared with the blocks that are like it."""

    def __init__(self, block: MirasBlock, graphs: Graphs) -> None:
        assert isinstance(block.attn, MemoryLayer)
        self.block, self.graphs, self.design = block, graphs, block.attn.design
        self.tile = plan(self.design, per_channel=self.design.inputs.per_channel, work=0).tile
        self.names: list[str] = []
        self.places: list[tuple[dict[str, Any], str]] = []
        for prefix, module in block.named_modules():
            for group in (module._parameters, module._buffers):
                self.names += [f"{prefix}.{name}" if prefix else name for name, x in group.items() if x is not None]
                # Where each stands and not itself, as loading may put another there.
                self.places += [(group, name) for name, x in group.items() if x is not None]

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or pickled block is not compiled: the graphs are this process's, the places this block's.
        return type(None), ()

    def __call__(self, hidden: Tensor, cache: LayerCache, shared: dict[str, Tensor] | None) -> Tensor | None:
        """What the block gives for hidden [B, 1, hidden_size], moving the cache on; None where it cannot run compiled."""
        if hidden.shape[1] != 1 or torch.is_grad_enabled() or torch.is_autocast_enabled(hidden.device.type):
            return None
        states = [cache.read(place) for place in self.block.places]
        first = states[0]
        if not isinstance(first, LayerState) or first.rows != len(hidden) or self.block.training:
            return None
        assert isinstance(first.memory, MemoryState)
        phase, shared = first.memory.phase, {} if shared is None else shared
        runs = {self._runs(place) for place in set(phase.tolist())}
        if len(runs) > 1:
            return None
        known = [state for state in states if state is not None]
        old = [x for state in known for x in state.tensors() if x is not phase]
        flat = [hidden, *old, *shared.values(), *(group[name] for group, name in self.places)]
        flat = [x.contiguous() for x in flat]
        key = (*runs, hidden.device, len(hidden), tuple(x.dtype for x in flat), tuple(shared))
        graph = self.graphs.get(key)
        if graph is None:
            graph = self.graphs[key] = self._traced(known, phase, list(shared), flat)
        made = iter(graph.run(*flat))
        results = iter([next(made) if place is None else flat[place] for place in graph.same])
        out = next(results)
        moved = (phase + self.design.learning.micro_steps) % self.design.refresh
        for place, state in zip(self.block.places, known, strict=True):
            cache.write(place, state.map(lambda x: moved if x is phase else next(results)), 1)
        shared.update(zip(graph.made, results, strict=True))
        return out

    def _runs(self, phase: int) -> tuple[Run, ...]:
        return _runs(self.design.learning.micro_steps, phase, self.design.refresh, self.tile)

    def _traced(self, states: list[State], phase: Tensor, shared: list[str], flat: list[Tensor]) -> Graph:
        """The graph for inputs like `flat`."""
        # All rows are at places in their windows that come to the same: a number, which is not traced.
        constant = torch.full_like(phase, int(phase[0]))
        same: list[int | None] = []
        made: list[str] = []

        def step(*flat: Tensor) -> tuple[Tensor, ...]:
            inputs = iter(flat)
            hidden = next(inputs)
            before = [state.map(lambda x: constant if x is phase else next(inputs)) for state in states]
            slots = Slots(dict(zip(self.block.places, before, strict=True)))
            handed = {name: next(inputs) for name in shared}
            parameters = dict(zip(self.names, inputs, strict=True))
            out = functional_call(
                self.block, parameters, (hidden,), {"past_key_values": slots, "use_cache": True, "shared": handed}
            )
            made[:] = [name for name in handed if name not in shared]
            after = [slots.states[place] for place in self.block.places]
            moved = after[0].memory.phase  # type: ignore[attr-defined]
            results = [out, *(x for state in after for x in state.tensors() if x is not moved), *(handed[x] for x in made)]
            same[:] = [next((place for place, y in enumerate(flat) if y is x), None) for x in results]
            return tuple(x for x, place in zip(results, same, strict=True) if place is None)

        own, self.block.step = self.block.step, None
        try:
            with torch.inference_mode(False), torch.no_grad():
                graph = compiled_graph(step, [torch.zeros_like(x) for x in flat], compiled=True)
        except Exception as error:
            raise Untraceable(f"the one-token step of {self.design} cannot be compiled here: {error}") from error
        finally:
            self.block.step = own
        return Graph(graph, tuple(same), tuple(made))


@functools.lru_cache(maxsize=4096)
def _runs(num_steps: int, phase: int, refresh: int, tile: int) -> tuple[Run, ...]:
    return tuple(plan_runs(num_steps, phase, refresh, tile))
