"""Products in 8 bits: what a normalisation's large features and single massive tokens leave of the others."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from trsp_deploy.tools.graphs.nodes import MICROSOFT
from trsp_deploy.tools.graphs.products import Activations, signal_to_noise
from trsp_deploy.tools.graphs.quantize import quantize_int8
from trsp_deploy.tools.graphs.smoothing import smooth_norms

TOKENS, FEATURES, OUTPUTS = 40, 32, 24


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def decoder(norm: str, opset: int = 21) -> ir.Model:
    """A normalisation that two products read, with one feature a hundred times the others, which counts no more than
    they do, and a third product after.
    """
    scale = 1 + 0.1 * random(1, FEATURES)
    scale[3] = 100
    constants = {
        "scale": scale,
        "shift": random(2, FEATURES) * scale,
        "first": random(3, FEATURES, OUTPUTS),
        "second": random(4, FEATURES, OUTPUTS),
        "third": random(5, OUTPUTS, OUTPUTS),
    }
    for name in ("first", "second"):
        constants[name][3] /= 100
    domain = MICROSOFT if norm.startswith("Skip") else ""
    inputs = {
        "LayerNormalization": ["x", "scale", "shift"],
        "SimplifiedLayerNormalization": ["x", "scale"],
        "SkipLayerNormalization": ["x", "x", "scale", "shift"],
        "SkipSimplifiedLayerNormalization": ["x", "x", "scale"],
    }[norm]
    nodes = [
        helper.make_node(norm, inputs, ["normed"], name="norm", domain=domain),
        helper.make_node("MatMul", ["normed", "first"], ["a"], name="one"),
        helper.make_node("MatMul", ["normed", "second"], ["b"], name="two"),
        helper.make_node("Mul", ["a", "b"], ["c"], name="gate"),
        helper.make_node("MatMul", ["c", "third"], ["y"], name="three"),
    ]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "tokens", FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "tokens", OUTPUTS])],
        [
            numpy_helper.from_array(array, name)
            for name, array in constants.items()
            if name in {*inputs} or len(name) > 4
        ],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def run(model: ir.Model, *names: str, x: np.ndarray) -> list[np.ndarray]:
    """Outputs `y` and values of the graph by their names."""
    proto = ir.to_proto(model)
    proto.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(found) for found in session.run(["y", *names], {"x": x})]


def read_by(model: ir.Model, x: np.ndarray) -> dict[str, Activations]:
    normed, third = run(model, "normed", "c", x=x)[1:]
    seen = {name: Activations.of(normed, symmetric=False, keep=True) for name in ("one", "two")}
    return {**seen, "three": Activations.of(third, symmetric=False, keep=True)}


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Of the median token: of its root mean square."""
    lost = np.square(found - wanted).mean(axis=-1) / np.square(wanted).mean(axis=-1)
    return float(np.sqrt(np.median(lost)))


NORMS = ["LayerNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization"]
NORMS += ["SkipSimplifiedLayerNormalization"]


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_divided_in_the_norm_is_multiplied_in_the_weights(norm: str) -> None:
    x, model = random(7, 2, TOKENS, FEATURES), decoder(norm)
    wanted, before = run(model, "normed", x=x)
    factors, found = smooth_norms(model, "", read_by(model, x))
    assert {*factors} == {"one", "two"} and np.array_equal(factors["one"], factors["two"])
    for name in ("first", "second"):
        weight = model.graph.initializers[name]
        weight.const_value = ir.tensor(weight.const_value.numpy() * factors["one"][:, None])
    after, smoothed = run(model, "normed", x=x)
    np.testing.assert_allclose(after, wanted, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(smoothed, before / factors["one"], rtol=1e-4, atol=1e-4)
    assert np.abs(smoothed[..., 3]).max() < 10 < 100 < np.abs(before[..., 3]).max()
    told = found["one"]
    assert (told.lowest, told.highest) == (
        pytest.approx(smoothed.min(), rel=1e-3),
        pytest.approx(smoothed.max(), rel=1e-3),
    )
    assert found["three"].decibels == read_by(decoder(norm), x)["three"].decibels
    assert told.decibels == pytest.approx(signal_to_noise(smoothed), abs=0.1)


@pytest.mark.parametrize(("head", "kept"), [("two", ()), ("", ("one",))])
def test_a_norm_is_left_where_a_product_behind_it_stays_in_floats(head: str, kept: tuple[str, ...]) -> None:
    x, model = random(7, 1, TOKENS, FEATURES), decoder("LayerNormalization")
    before = run(model, "normed", x=x)
    factors, _ = smooth_norms(model, head, read_by(model, x), kept)
    assert not factors and all(map(np.array_equal, run(model, "normed", x=x), before))


def test_a_norm_is_left_where_something_else_reads_it_too() -> None:
    x, model = random(7, 1, TOKENS, FEATURES), decoder("SimplifiedLayerNormalization")
    activations = read_by(model, x)
    normed = next(node for node in model.graph if node.name == "norm").outputs[0]
    model.graph.outputs.append(normed)
    assert not smooth_norms(model, "", activations)[0]


def test_smoothed_products_in_8_bits_lose_less() -> None:
    x = random(7, 2, TOKENS, FEATURES)
    (wanted,) = run(decoder("LayerNormalization"), x=x)
    lost = []
    for smoothed in (False, True):
        model = decoder("LayerNormalization")
        activations = read_by(model, x)
        fine = {name: Activations(found.lowest, found.highest, 100.0, ()) for name, found in activations.items()}
        factors = smooth_norms(model, "", activations)[0] if smoothed else {}
        (found,) = run(quantize_int8(model, 32, "", fine, factors=factors), x=x)
        lost.append(error(found, wanted))
    assert lost[1] < lost[0] / 3, lost


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("reduced", [False, True])
def test_a_massive_token_costs_the_others_nothing_where_each_has_a_scale(opset: int, reduced: bool) -> None:
    x = random(7, 2, TOKENS, FEATURES)
    x[0, 0, 5] = 3000  # of attention's sink
    x[1, 2] = 0  # padding
    model = decoder("LayerNormalization", opset)
    model.graph.remove([node for node in model.graph if node.name == "norm"], safe=False)
    for node in [node for node in model.graph if node.name in ("one", "two")]:
        node.replace_input_with(0, model.graph.inputs[0])
    (wanted,) = run(model, x=x)
    lost = {}
    for decibels in (100.0, 0.0):  # one scale for all, and one a token
        proto = ir.from_proto(ir.to_proto(model))
        activations = {name: Activations(-1.0, 1.0, decibels, ()) for name in ("one", "two", "three")}
        (found,) = run(quantize_int8(proto, 32, "", activations, reduced=reduced), x=x)
        assert np.isfinite(found).all()
        assert decibels or (found[1, 2] == 0).all(), "a token of zeros"
        lost[decibels] = error(np.delete(found[1], 2, axis=0), np.delete(wanted[1], 2, axis=0))
    assert lost[0.0] < 0.05 < lost[100.0], lost


def test_a_scale_for_each_token_makes_an_answer_its_own() -> None:
    """What stands beside a text in its batch changes nothing of it."""
    x = random(7, 2, TOKENS, FEATURES)
    model = decoder("LayerNormalization")
    activations = {name: Activations(-1.0, 1.0, 0.0, ()) for name in ("one", "two", "three")}
    model = quantize_int8(model, 32, "", activations)
    together, alone = run(model, x=x)[0], run(model, x=x[1:])[0]
    np.testing.assert_allclose(together[1:], alone, rtol=1e-5, atol=1e-5)
