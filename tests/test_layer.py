"""MemoryLayer alone: what it computes, its sizes and names, its gates, its cache, what it shows, its errors."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from miras.bias import L2, Huber, Robust
from miras.design import Design, Pattern
from miras.engine import memorize
from miras.engine.chunk import run_chunks
from miras.inputs import Constant, Inputs, LogDecay, Output, Sigmoid, Softplus
from miras.layer import LayerState, MemoryLayer, default_map
from miras.learning import GradientDescent, Momentum, MultiStep, NonParametric
from miras.memory import MLP, Matrix, Vector
from miras.modules import initial_values
from miras.retention import KL, Lq, Retention, SignedKL
from miras.retention import L2 as Decay

torch.set_num_threads(1)


def design(**changed: Any) -> Design:
    base = Design(memory=MLP(), bias=L2(), retention=Decay(), learning=GradientDescent(), refresh=4)
    return replace(base, **changed)


def layer(chosen: Design, **kwargs: Any) -> MemoryLayer:
    torch.manual_seed(0)
    return MemoryLayer(**{"hidden_size": 16, "num_heads": 2, "design": chosen, **kwargs}).double()


def states(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@dataclass
class Cache:
    """The smallest cache that a layer accepts."""

    state: LayerState | None = None

    def read(self, layer_idx: int) -> LayerState | None:
        return self.state

    def write(self, layer_idx: int, state: LayerState, num_tokens: int) -> None:
        self.state = state


def test_forward_written_out() -> None:
    """The layer against its own formula, from its parameters, with torch's convolution."""
    gates = {"delta": Softplus(0.5, rank=3)}
    mix = layer(design(bias=Huber("norm"), inputs=Inputs(gates=gates, decay=LogDecay(8.0, per_channel=True))))
    x = states(2, 9, 16)

    def stream(name: str) -> Tensor:
        weight = getattr(mix, f"{name}_conv1d").weight
        y = F.conv1d((x @ getattr(mix, f"{name}_proj").weight.T).mT, weight, padding=3, groups=16)[..., :9].mT
        return F.silu(y).view(2, 9, 2, 8)

    q, k, v = (stream(name) for name in "qkv")
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    lr = torch.sigmoid(x @ mix.b_proj.proj.weight.T + mix.b_proj.bias)
    decay = F.logsigmoid((x @ mix.a_proj.proj.weight.T).view(2, 9, 2, 8) + mix.a_proj.bias)
    low = x @ mix.gate_projs["delta"].proj[0].weight.T @ mix.gate_projs["delta"].proj[1].weight.T
    delta = F.softplus(low + mix.gate_projs["delta"].bias)
    weights = {"up": mix.memory.up, "down": mix.memory.down}
    weights |= {"norm.weight": mix.memory.norm_weight, "norm.bias": mix.memory.norm_bias}
    out, _ = memorize(q, k, v, design=mix.design, weights=weights, lr=lr, log_decay=decay, gates={"delta": delta})
    out = out * (out.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * mix.o_norm.weight
    want = (out.flatten(2) * F.silu(x @ mix.g_proj.weight.T)) @ mix.o_proj.weight.T
    got, nothing, cache = mix(x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert nothing is None
    assert cache is None


def test_every_option_of_the_inputs_changes_the_output() -> None:
    x = states(1, 9, 16)
    base = Inputs()
    outputs = [layer(design(inputs=base))(x)[0]]
    for name, value in {
        "conv_size": 2,
        "activation": None,
        "weight_std": 0.1,
        "norm_gain": 0.5,
        "output": Output(norm=None),
        "decay": None,
        "rate": Constant(0.1),
        "features": __import__("miras.inputs").inputs.Positive(),
    }.items():
        outputs.append(layer(design(inputs=replace(base, **{name: value})))(x)[0])
    for i, a in enumerate(outputs):
        assert all(not torch.allclose(a, b) for b in outputs[i + 1 :])


def test_parameter_names_and_shapes() -> None:
    mix = layer(design(learning=MultiStep(3), memory=Matrix(), refresh=1), num_heads=2, head_dim=4)
    shapes = {name: tuple(p.shape) for name, p in mix.named_parameters()}
    assert shapes == {
        "q_proj.weight": (8, 16),
        "k_proj.weight": (24, 16),
        "v_proj.weight": (24, 16),
        "q_conv1d.weight": (8, 1, 4),
        "k_conv1d.weight": (24, 1, 4),
        "v_conv1d.weight": (24, 1, 4),
        "o_norm.weight": (4,),
        "g_proj.weight": (8, 16),
        "o_proj.weight": (16, 8),
        "memory.W": (2, 4, 4),
        "b_proj.proj.weight": (6, 16),
        "b_proj.bias": (2,),
        "a_proj.proj.weight": (2, 16),
        "a_proj.bias": (2,),
    }
    attention = layer(Design(memory=None, bias=L2(), retention=None, learning=NonParametric()))
    assert not any(name.startswith(("memory", "a_proj", "b_proj")) for name, _ in attention.named_parameters())


def test_no_weight_decay_marks() -> None:
    mix = layer(design(learning=Momentum()))
    marked = {name for name, p in mix.named_parameters() if getattr(p, "_no_weight_decay", False)}
    memory = {"memory.up", "memory.down", "memory.norm_weight", "memory.norm_bias"}
    assert marked == memory | {"a_proj.bias", "b_proj.bias", "gate_projs.mu.bias"}


@pytest.mark.parametrize("retention", [Decay(), Lq(4.0), SignedKL(), KL()])
def test_initial_memory(retention: Retention) -> None:
    """W_0 has the spread that the inputs ask for; where A holds logits, A_0 has."""
    torch.manual_seed(0)
    mix = MemoryLayer(64, 2, design(retention=retention, inputs=Inputs(weight_std=2.0, norm_gain=0.7)))
    unit = 1.0 if retention.logits else 32**-0.5
    for name in ("up", "down"):
        dual = getattr(mix.memory, name).detach()
        drawn = dual if retention.logits else retention.link(dual)
        assert 1.8 < float(drawn.std()) / unit < 2.2
        assert abs(float(drawn.mean())) < 0.1
    torch.testing.assert_close(mix.memory.norm_weight.detach(), torch.full((2, 32), 0.7 * 32**-0.5))
    assert bool((mix.memory.norm_bias == 0).all())


def test_initial_gates() -> None:
    """Rates, decays and further gates start at what their maps or the choices say."""
    inputs = Inputs(rate=Sigmoid(0.3), decay=LogDecay(64.0))
    mix = layer(design(bias=Robust(), learning=Momentum(), inputs=inputs))
    for gate in (mix.a_proj, mix.b_proj, *mix.gate_projs.values()):
        torch.nn.init.zeros_(gate.proj.weight)
    seen = mix.inspect(states(1, 3, 16))
    for name, value in {"lr": 0.3, "log_decay": -1 / 64, "Delta": 0.1, "mu": 0.5}.items():
        torch.testing.assert_close(seen[name], torch.full((1, 3, 2), value, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert {gate.name: default_map(gate).kind for gate in mix.design.gates} == {"Delta": "Softplus", "mu": "Sigmoid"}


def test_half_precision_gates_are_float32() -> None:
    mix = layer(design()).bfloat16()
    seen = mix.inspect(states(1, 3, 16).bfloat16())
    assert seen["lr"].dtype == seen["log_decay"].dtype == seen["drift"].dtype == torch.float32
    assert mix(states(1, 3, 16).bfloat16())[0].dtype == torch.bfloat16


def test_autocast_leaves_the_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return run_chunks(*args, **kwargs)

    monkeypatch.setattr("miras.engine.dispatch.run_chunks", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _, _ = layer(design()).float()(states(1, 5, 16).float())
    assert seen == [False]
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("conv_size", [0, 1, 4])
@pytest.mark.parametrize("kind", ["mlp", "two_steps", "attention"])
def test_mask_packing_and_splits(conv_size: int, kind: str) -> None:
    """Convolution tails cross calls shorter than the convolution, packed borders do not."""
    inputs = Inputs(conv_size=conv_size)
    attention = Design(memory=None, bias=L2(), retention=None, learning=NonParametric(3), inputs=inputs)
    steps = design(inputs=inputs, memory=Matrix(), learning=MultiStep(2), refresh=3)
    mix = layer({"mlp": design(inputs=inputs), "two_steps": steps, "attention": attention}[kind], layer_idx=0)
    x = states(2, 7, 16)
    alone = [mix(x[:1])[0], mix(x[1:, 2:])[0]]
    packed, _, _ = mix(torch.cat((x[0], x[1, 2:]))[None], cu_seqlens=torch.tensor([0, 7, 12]))
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=0, atol=1e-12)
    mask = torch.tensor([[1] * 7, [0] * 2 + [1] * 5])
    masked, _, _ = mix(x, attention_mask=mask)
    torch.testing.assert_close(masked[0], alone[0][0], rtol=0, atol=1e-12)
    torch.testing.assert_close(masked[1, 2:], alone[1][0], rtol=0, atol=1e-12)
    for borders in ([0, 1, 2, 7], [0, 3, 4, 5, 6, 7]):
        cache, pieces = Cache(), []
        for a, b in itertools.pairwise(borders):
            pieces.append(mix(x[:, a:b], mask[:, :b], cache, use_cache=True)[0])
        torch.testing.assert_close(torch.cat(pieces, 1), masked, rtol=0, atol=1e-9)
        assert cache.state is not None
        assert cache.state.seen.tolist() == [7, 5]


def test_state_moves_and_detaches() -> None:
    mix, cache = layer(design(), layer_idx=0), Cache()
    mix(states(2, 5, 16), past_key_values=cache, use_cache=True)
    assert cache.state is not None
    assert cache.state.memory.slots["up"].requires_grad
    free = cache.state.detach().to("cpu")
    assert free.rows == 2
    assert free.nbytes == cache.state.nbytes > 0
    assert not any(x.requires_grad for x in (*free.conv, *free.memory.tensors()))


@pytest.mark.parametrize(
    "chosen",
    [
        design(bias=Huber("switch"), inputs=Inputs(gates={"delta": Softplus(0.5)})),
        design(retention=SignedKL(), link_at="refresh", anchor="origin", inputs=Inputs(decay=None)),
        design(memory=Matrix(), learning=MultiStep(2), refresh=1),
        design(memory=Vector(), learning=Momentum()),
    ],
)
def test_inspect(chosen: Design) -> None:
    mix, x = layer(chosen), states(2, 6, 16)
    seen = mix.inspect(x)
    n = chosen.learning.micro_steps
    names = {"lr", "loss_before", "loss_after", "drift", *(gate.name for gate in chosen.gates)}
    assert set(seen) == names | ({"log_decay"} if chosen.inputs.decay is not None else set())
    assert all(not value.requires_grad and bool(value.isfinite().all()) for value in seen.values())
    for name in ("loss_before", "loss_after", "drift", "log_decay"):
        assert name not in seen or seen[name].shape == (2, 6, 2)
    assert seen["lr"].shape == (2, 6 * n, 2)
    assert bool((seen["drift"] > 0).all())
    # An idle memory: no step, no change of loss, no drift.
    idle = layer(replace(chosen, inputs=replace(chosen.inputs, rate=Constant(0.0), decay=None))).inspect(x)
    torch.testing.assert_close(idle["loss_before"], idle["loss_after"])
    assert float(idle["drift"].max()) < 1e-12


def test_inspect_shows_learning() -> None:
    """The same pair again and again: each write lowers its loss, and the next token finds what the last one left."""
    inputs = Inputs(conv_size=0, decay=None, rate=Constant(0.3), weight_std=0.0)
    mix = layer(design(memory=Matrix(), refresh=1, inputs=inputs))
    seen = mix.inspect(states(1, 1, 16).expand(1, 6, 16))
    assert bool((seen["loss_after"] < seen["loss_before"]).all())
    torch.testing.assert_close(seen["loss_before"][:, 1:], seen["loss_after"][:, :-1])
    # With a unit key the delta rule leaves (1 - eta)^2 of the loss.
    torch.testing.assert_close(seen["loss_after"], 0.49 * seen["loss_before"], rtol=1e-4, atol=0)


def test_explain() -> None:
    assert "path" in str(layer(design()).explain())
    assert "keys of 12, values of 12" in layer(design(), head_dim=12).explain().refusals["triton"]
    channelwise = Inputs(decay=LogDecay(per_channel=True))
    found = layer(design(refresh=16, inputs=channelwise)).explain()
    assert (found.path, found.tile) == ("frozen", 16)
    assert "per channel" in found.refusals["native"]


def test_every_initial_value_is_restored() -> None:
    mix = layer(design())
    for module in mix.modules():
        if hasattr(module, "initial_values"):
            shapes = {name: tuple(x.shape) for name, x in initial_values(module).items()}
            assert shapes == {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_ratio": 0.3}, "key_ratio=0.3 times head_dim=8 is 2.4; it must be a whole number"),
        ({"key_heads": 3}, "key_heads=3 must divide num_heads=2"),
        ({"output": Output(groups=3)}, "groups=3 must divide num_heads=2"),
        ({"value_ratio": 2.0}, "key width 8 must equal value width 16"),
    ],
)
def test_illegal_widths(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(design(inputs=Inputs(**change)))


def test_meta_device() -> None:
    with torch.device("meta"):
        mix = MemoryLayer(16, 2, design(retention=SignedKL()))
    assert all(p.is_meta for p in mix.parameters())


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"num_heads": 3}, ValueError, "hidden_size=16 is not divisible by num_heads=3"),
        ({"num_heads": 0}, ValueError, "at least 1 each"),
        ({"head_dim": 0}, ValueError, "head_dim=0; must be at least 1"),
        ({"design": Pattern((design(),))}, TypeError, "a Pattern arranges the layers"),
        ({"design": design(inputs=Inputs(gates={"mu": Sigmoid()}))}, ValueError, "reads no further gates"),
        (
            {"design": design(learning=Momentum(), inputs=Inputs(gates={"mu": Sigmoid(per_channel=True)}))},
            ValueError,
            "one number a head",
        ),
        (
            {"design": design(memory=MLP(depth=3), inputs=Inputs(rate=Sigmoid(per_channel=True)))},
            ValueError,
            "weight 'hidden1'.*no axis of 8 channels, the key width",
        ),
    ],
)
def test_illegal_layers(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MemoryLayer(**{"hidden_size": 16, "num_heads": 2, "design": design(), **kwargs})


def test_illegal_calls() -> None:
    mix, x = layer(design()), states(2, 5, 16)
    with pytest.raises(ValueError, match="needs a cache"):
        mix(x, use_cache=True)
    with pytest.raises(ValueError, match="set layer_idx"):
        mix(x, past_key_values=Cache(), use_cache=True)
    with pytest.raises(ValueError, match="batch must be 1, got 2"):
        mix(x, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="rise strictly"):
        mix(x[:1], cu_seqlens=torch.tensor([0, 2, 2, 5]))
    with pytest.raises(ValueError, match="one-dimensional integer"):
        mix(x[:1], cu_seqlens=torch.tensor([0.0, 5.0]))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 3\)"):
        mix(x, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="nothing to inspect"):
        layer(Design(memory=None, bias=L2(), retention=None, learning=NonParametric())).inspect(x)
