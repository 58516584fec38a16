"""A design in symbols: its choices with their formulas and sources, and the recurrence that they add up to.

Formulas come from the choices (`symbols`), sources from their docstrings; nothing here knows a class by name.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from miras.choice import Choice
from miras.cost import Cost, measure, state_formula
from miras.design import Design
from miras.engine import PATHS, explain
from miras.inputs import GateMap
from miras.models import NAMED, named
from miras.modules import default_map

NOTATION = {
    "x W": "row vectors, x W a matrix product",
    "LN(": "LN layer normalisation",
    "RMS(": "RMS root-mean-square normalisation",
    "_in ": "sum_in and mean_in over the n inputs of each output unit",
    "NS(": "NS Newton-Schulz iterations",
}
"""What signs in formulas mean, said where they occur."""


class Line(NamedTuple):
    """A named formula, a line an equation, and its source if it has one."""

    name: str
    text: str
    source: str | None = None


class Section(NamedTuple):
    """Lines under a title."""

    title: str
    lines: tuple[Line, ...]


def describe_named(
    name: str, overrides: Mapping[str, Any], head_dim: int = 64, width: int = 100, device: str = "cpu"
) -> str:
    """`describe` for each distinct layer of a named model, with overrides as `miras.models.named` takes them.

    Raises:
        ValueError: unknown name, kind or field.
    """
    model, function = named(name, **overrides), NAMED[name]
    changed = ", ".join(f"{field}={value}" for field, value in overrides.items())
    head = [f"{name} with {changed}" if changed else name]
    if not changed:
        # What the docstring says need not hold of a model that was changed.
        origin = source(function)
        head += [f"  {summary(function).partition(' Source:')[0]}", *([f"  Source: {origin}"] if origin else [])]
    blocks = ["\n".join(textwrap.fill(line, width, subsequent_indent="    ") for line in head)]
    for place, design in parts(model):
        blocks.append((f"Layer {place}\n\n" if place else "") + describe(design, head_dim, width, device))
    return "\n\n".join(blocks)


def describe(design: Design, head_dim: int = 64, width: int = 100, device: str = "cpu") -> str:
    """A design's recurrence in symbols with its sources, the path that runs it, and its sizes for heads of `head_dim`."""
    shown = sections(design, head_dim, device)
    return "\n".join(part for section in shown for part in (*_lay_out(section, width), "")).rstrip()


def sections(design: Design, head_dim: int = 64, device: str = "cpu") -> tuple[Section, ...]:
    """What `describe` writes, as data."""
    cost = measure(design, head_dim)
    return (
        Section("Choices", _choices(design)),
        Section("At each token t", _recurrence(design) if design.parametric else _attention(design)),
        Section("Inputs, from the hidden state x_t", _inputs(design)),
        Section("Engine", _path(design, head_dim, device)),
        Section(f"A head of {head_dim} channels", _sizes(design, cost)),
    )


def parts(model: Choice) -> list[tuple[str, Design]]:
    """The distinct designs of a model and where they are: "" for a design, "1/2" for the first of two layers in turn."""
    found: list[tuple[list[str], Design]] = []
    for place, design in _walk(model):
        same = [places for places, other in found if other == design]
        if same:
            same[0].append(place)
        else:
            found.append(([place], design))
    return [(", ".join(places), design) for places, design in found]


def formula(choice: Choice) -> str:
    """A choice's symbols; the first line of its docstring where its own class gives none (an inherited one may be wrong)."""
    return choice.symbols if has_formula(choice) else summary(type(choice))


def has_formula(choice: Choice) -> bool:
    """Whether the choice's own class gives its symbols."""
    return "symbols" in vars(type(choice))


def label(choice: Choice) -> str:
    """A short name: the kind, its first field, and what else is not as by default, such as "MLP(2, residual=False)"."""
    fields = sorted(dataclasses.fields(choice), key=lambda field: bool(field.kw_only))
    values = [getattr(choice, field.name) for field in fields]
    told = [value != field.default for field, value in zip(fields, values, strict=True)]
    if fields and values[0] is not None and not isinstance(values[0], bool):
        told[0] = True
    shown = [
        _short(value) if all(told[:place]) and not field.kw_only else f"{field.name}={_short(value)}"
        for place, (field, value) in enumerate(zip(fields, values, strict=True))
        if told[place]
    ]
    return f"{choice.kind}({', '.join(shown)})" if shown else choice.kind


def summary(documented: object) -> str:
    """First line of a docstring."""
    return inspect.cleandoc(documented.__doc__ or "").partition("\n")[0]


def source(documented: object) -> str | None:
    """What a docstring says after "Source:", up to the end of its paragraph; None if it says nothing."""
    found = re.search(r"Source: (.+?)(?=\n\s*\n|\Z)", inspect.cleandoc(documented.__doc__ or ""), re.DOTALL)
    return " ".join(found[1].split()) if found else None


def decays(design: Design) -> bool:
    """Whether the state decays, by a gate or by the features."""
    return design.inputs.decay is not None or design.inputs.features.makes_decay


def _walk(model: Choice, place: str = "") -> Iterator[tuple[str, Design]]:
    """Every design in a model, by the fields that lead to it."""
    if isinstance(model, Design):
        yield place, model
        return
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if isinstance(value, Choice):
            yield from _walk(value, f"{place} {field.name}".strip())
        elif isinstance(value, tuple):
            for index, item in enumerate(value, start=1):
                if isinstance(item, Choice):
                    yield from _walk(item, f"{place} {index}/{len(value)}".strip())


def _choices(design: Design) -> tuple[Line, ...]:
    chosen = [c for c in (design.memory, design.bias, design.retention, design.learning) if c is not None]
    lines = [_line(c.family, f"{label(c)}:{_under(formula(c))}", c) for c in chosen]
    used = [meaning for sign, meaning in NOTATION.items() if any(sign in line.text for line in lines)]
    return (*lines, *([Line("with", ";  ".join(used))] if used else []))


def _under(text: str) -> str:
    """One equation goes on in the line, several have one each."""
    return f"\n{text}" if "\n" in text else f"  {text}"


def _recurrence(design: Design) -> tuple[Line, ...]:
    """What happens at a token; with several gradient steps a token these are numbered j."""
    memory, retention, n = design.memory, design.retention, design.learning.micro_steps
    assert memory is not None and retention is not None
    at = "t" if n == 1 else "tj"
    reads = {**{name: f"{name}_{at}" for name in "yvelg"}, "s_t": f"s_{at}", "eta_t": f"eta_{at}", "k_t": f"k_{at}"}
    reads |= {f"{gate.name}_t": f"{gate.name}_{at}" for gate in design.bias.gates}
    loss = {_put(name, reads): _put(text, reads) for name, text in _equations(design.bias).items()}
    rest = [f"{name} = {text}" for name, text in loss.items() if name not in (f"l_{at}", f"g_{at}")]
    if any(re.search(rf"\be_{at}\b", text) for text in loss.values()):
        rest.append(f"e_{at} = y_{at} - v_{at}")
    opaque = f"l(y_{at}, v_{at}): {formula(design.bias)}"
    slope = f" = {loss[f'g_{at}']}" if f"g_{at}" in loss else ""
    back = f"back-propagated from g_{at} to {', '.join(memory.weights(64, 64))}"
    return (
        Line("gradient at", _point(design)),
        Line("prediction", f"y_{at} = M(W'; k_{at}){_applied(design, f'k_{at}', chr(39))}"),
        Line("loss", "\n".join((f"l_{at} = {loss.get(f'l_{at}', opaque)}", *rest))),
        Line("gradient", f"g_{at} = dl_{at}/dy_{at}{slope}"),
        Line("", f"G_{at} = k_{at}^T g_{at}" if memory.linear else f"G_{at} = dl_{at}/dW at W', {back}"),
        Line("step", f"u_{at} = -eta_{at} G_{at}" + ("" if n == 1 else f",  j = 1 .. {n}")),
        *_steps(design),
        *(Line("settling", text) for text in formula(retention).splitlines()[1:] if has_formula(retention)),
        Line("link", _link(design)),
        Line("read-out", f"o_t = M(W_t; q_t){_applied(design, 'q_t', '_t')}"),
    )


def _attention(design: Design) -> tuple[Line, ...]:
    return (Line("read-out", formula(design.learning)),)


def _point(design: Design) -> str:
    """Which weights W' the gradient is taken at."""
    memory, retention, several = design.memory, design.retention, design.learning.micro_steps > 1
    assert memory is not None and retention is not None
    if memory.linear and design.bias.slope == "constant":
        return "any W': the gradient does not depend on the weights"
    before = "W' = W_{t-1}"
    if design.gradient_at == "decayed":
        alpha = "alpha_t " if decays(design) else ""
        dual = f"{alpha}A_{{t-1}}" if design.anchor == "origin" else f"A_0 + {alpha}(A_{{t-1}} - A_0)"
        before = f"W' = {dual}" if retention.identity else f"W' = link({dual})"
    if design.refresh == 1:
        return f"{before} for the first step, then where the step before led" if several else before
    step = "gradient step" if several else "token"
    return f"W' = W_r, r the last {step} before the window of {design.refresh} that t is in"


def _steps(design: Design) -> Iterator[Line]:
    """The learner's updates, in A where D is A, without a decay that there is not."""
    text = formula(design.learning)
    if has_formula(design.learning):
        text = text if decays(design) else text.replace("alpha_t ", "")
        text = re.sub(r"\bD_", "A_", text) if design.anchor == "origin" else text
    yield Line("", text)
    anchored = design.anchor == "initial"
    yield Line("", ("A_t = A_0 + D_t,  D_0 = 0,  " if anchored else "") + "A_0 the learned initial memory")


def _link(design: Design) -> str:
    assert design.retention is not None
    text = formula(design.retention).partition("\n")[0]
    if not has_formula(design.retention):
        return f"W_t = link(A_t): {text}"
    text = _put(text, {"W": "W_t", "A": "A_t"})
    if design.link_at == "token" or design.retention.identity or design.refresh == 1:
        return text
    return f"{text} at window ends,  W_r + kappa_r (A_t - A_r) in between, kappa_r the link's slope at A_r"


def _applied(design: Design, x: str, mark: str) -> str:
    """The memory's formula at x, its weights marked; nothing without one."""
    memory = design.memory
    assert memory is not None
    if not has_formula(memory):
        return f": {formula(memory)}"
    marked = {name: f"{name}{mark}" for name in memory.weights(64, 64)}
    return f" = {_put(memory.symbols, {'x': x, **marked})}"


def _inputs(design: Design) -> tuple[Line, ...]:
    inputs = design.inputs
    made = "proj(x_t)"
    made = f"conv{inputs.conv_size}({made})" if inputs.conv_size > 0 else made
    made = f"{inputs.activation}({made})" if inputs.activation else made
    features = formula(inputs.features) + ("\nq <- q / sqrt(K)" if inputs.features.scaled else "")
    shift = [Line("token shift", "x_t <- x_t + m * (x_{t-1} - x_t), m learned for each use")] if inputs.token_shift else []
    lines = [*shift, Line("q, k, v", f"each {made}"), _line("features", features, inputs.features)]
    if not design.parametric:
        return tuple(lines)
    lines.append(_gate("rate", "eta_t", inputs.rate, "b_proj"))
    if inputs.decay is not None:
        lines.append(_gate("decay", "log alpha_t", inputs.decay, "a_proj"))
    elif decays(design):
        lines.append(Line("decay", "log alpha_t made by the features"))
    made = inputs.features.supplies
    for gate in (*(gate for gate in design.gates if gate.name not in made), *inputs.features.gates(first=False)):
        chosen = inputs.gates.get(gate.name) or default_map(gate)
        lines.append(_gate("gate", f"{gate.name}_t", chosen, f"gate_projs.{gate.name}"))
    if design.slow_names(64) and inputs.norm_gain is not None:
        lines.append(Line("norm", f"gain and bias learned, one a channel, gain {inputs.norm_gain:g} / sqrt(d) at first"))
    return tuple(lines)


def _gate(name: str, symbol: str, gate: GateMap, projection: str) -> Line:
    text = _put(formula(gate), {"x": f"{projection}(x_t)"}) if has_formula(gate) else f"{label(gate)}: {formula(gate)}"
    number = "one a channel" if gate.per_channel else "one a head"
    rank = f" of rank {gate.rank}" if gate.projected and gate.rank is not None else ""
    kind = f"data dependent{rank}" if gate.projected else "not data dependent"
    return _line(name, f"{symbol} = {text},  {number}, {kind}", gate)


def _path(design: Design, head_dim: int, device: str) -> tuple[Line, ...]:
    """The path that runs long sequences on a device of this machine, and why each faster one refuses."""
    per_channel, widths = design.parametric and design.inputs.per_channel, design.inputs.memory_widths(head_dim)
    plan = explain(design, device=device, per_channel=per_channel, widths=widths)
    runs = plan.path + (f", in blocks of {plan.tile} gradient steps" if plan.tile > 1 else "")
    faster = PATHS[: PATHS.index(plan.path)]
    return (Line("path", runs), *(Line(f"not {name}", plan.refusals[name]) for name in faster))


def _sizes(design: Design, cost: Cost) -> tuple[Line, ...]:
    if not cost.weights:
        each = " for each token of context" if cost.grows else ""
        return (Line("state", f"{cost.state:,} numbers{each}"), Line("FLOPs", f"{cost.flops:,.0f} a token{each}"))
    shapes = ",  ".join(f"{name} {d_in} x {d_out}" for name, (d_in, d_out) in cost.weights.items())
    held = state_formula(design)
    copies = "one copy" if cost.copies == 1 else f"{cost.copies} copies"
    point = ", one of them the gradient point" if design.refresh > 1 else ""
    return (
        Line("fast weights", shapes),
        Line("state", f"{cost.state:,} numbers{f' = {held}' if held else ''}: {copies} of the fast weights{point}"),
        Line("FLOPs", f"{cost.flops:,.0f} a token"),
    )


def _line(name: str, text: str, choice: Choice) -> Line:
    return Line(name, text, source(type(choice)))


def _equations(choice: Choice) -> dict[str, str]:
    """{left side: right side} of the equations among a choice's symbols; empty where its own class gives none."""
    sides = (line.partition(" = ") for line in choice.symbols.splitlines()) if has_formula(choice) else ()
    return {left: right for left, equal, right in sides if equal}


def _put(text: str, names: Mapping[str, str]) -> str:
    """A formula with whole names replaced, all at once."""
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.sub(rf"(?<![\w.])({pattern})(?!\w)", lambda found: names[found[1]], text)


def _short(value: object) -> str:
    if isinstance(value, Choice):
        return label(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _lay_out(section: Section, width: int) -> Iterator[str]:
    yield section.title
    indent = 4 + max(len(line.name) for line in section.lines)
    for line in section.lines:
        start = f"  {line.name}".ljust(indent)
        for text in (*line.text.splitlines(), *([f"Source: {line.source}"] if line.source else [])):
            yield from textwrap.wrap(
                text, width, initial_indent=start, subsequent_indent=" " * (indent + 2), break_on_hyphens=False
            )
            start = " " * indent
