"""Weights in 4 bits: less lost on a text than by rounding to the nearest, in bytes that ONNX Runtime reads as meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from trsp_deploy.errors import EngineSpecError
from trsp_deploy.tools.graphs import costs, qdq, quantize, rounding
from trsp_deploy.tools.graphs.nodes import NoMatch
from trsp_deploy.tools.graphs.products import Activations, check_finite
from trsp_deploy.tools.graphs.rounding import Rounded, round_weight
from trsp_deploy.tools.graphs.stored import stored_by
from trsp_deploy.tools.library import load_engine_spec


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def together(tokens: int, inputs: int, rank: int = 8) -> np.ndarray:
    """(tokens, inputs) of which a few directions carry most."""
    return numbers(tokens, rank) @ numbers(rank, inputs, seed=1) + 0.1 * numbers(tokens, inputs, seed=2)


def value_of(rounded: Rounded, block_size: int) -> np.ndarray:
    scales, zeros = (
        np.repeat(each, block_size, axis=0)[: len(rounded.codes)] for each in (rounded.scales, rounded.zeros)
    )
    return (rounded.codes.astype(np.float32) - zeros) * scales


def lost(weight: np.ndarray, rounded: Rounded, block_size: int, read: np.ndarray) -> float:
    wanted = read @ weight
    return float(np.square(read @ value_of(rounded, block_size) - wanted).sum() / np.square(wanted).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("together_at_most", [1024, 64])
def test_what_one_input_loses_the_others_make_up_for(
    symmetric: bool, together_at_most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "MOST_TOGETHER", together_at_most)
    weight, read = numbers(128, 48, seed=3), together(512, 128)
    moments = Activations.of(read[:400], symmetric=False).moments
    assert [len(part) for part in moments] == ([128] if together_at_most > 128 else [64, 64])
    nearest = round_weight(weight, 32, None, symmetric=symmetric)
    learned = round_weight(weight, 32, moments, symmetric=symmetric)
    assert lost(weight, learned, 32, read[400:]) < 0.5 * lost(weight, nearest, 32, read[400:])
    if symmetric:
        assert (learned.zeros == 8).all()


def test_without_a_text_every_weight_goes_to_its_nearest_number() -> None:
    weight = numbers(64, 16)
    rounded = round_weight(weight, 16, None, symmetric=False)
    inside = (rounded.codes > 0) & (rounded.codes < 15)  # the others may lie beyond the range, which is narrowed
    steps = np.repeat(rounded.scales, 16, axis=0)
    assert inside.mean() > 0.5
    assert (np.abs(value_of(rounded, 16) - weight)[inside] <= 0.5001 * steps[inside]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_zeros_and_inputs_that_nothing_reads(dtype: type) -> None:
    weight = np.zeros((32, 4), dtype)
    weight[16:] = numbers(16, 4)
    read = together(64, 32)
    read[:, 20] = 0
    rounded = round_weight(weight, 16, Activations.of(read, symmetric=False).moments, symmetric=True)
    assert rounded.scales.dtype == dtype and np.isfinite(rounded.scales).all() and (rounded.scales > 0).all()
    assert (value_of(rounded, 16)[:16] == 0).all()
    assert lost(weight.astype(np.float32), rounded, 16, read) < 0.02


def test_a_massive_token_counts_as_any_other() -> None:
    read = together(100, 32)
    massive = read.copy()
    massive[0] *= 1000
    plain, with_massive = (Activations.of(each, symmetric=False) for each in (read, massive))
    np.testing.assert_allclose(with_massive.moments[0], plain.moments[0], rtol=1e-3, atol=1e-3)
    assert with_massive.decibels < plain.decibels


def test_texts_read_one_after_the_other_are_one_text() -> None:
    read = together(90, 32)
    whole, *parts = (Activations.of(each, symmetric=False) for each in (read, read[:30], read[30:]))
    joined = parts[0].joined(parts[1])
    np.testing.assert_allclose(joined.moments[0], whole.moments[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(joined.power, np.diag(whole.moments[0]), rtol=1e-4)
    assert (joined.lowest, joined.highest) == (whole.lowest, whole.highest)
    assert joined.decibels == min(part.decibels for part in parts)


def of_one_product(weight: np.ndarray) -> ir.Model:
    """A graph of 5 rows x times a weight (inputs, outputs); the node is called `product`."""
    kind = ir.TensorType(ir.tensor(weight).dtype)
    x = ir.Value(name="x", shape=ir.Shape([5, len(weight)]), type=kind)
    constant = ir.Value(name="w", shape=ir.Shape(weight.shape), type=kind, const_value=ir.tensor(weight))
    product = ir.node("MatMul", [x, constant], name="product")
    product.outputs[0].name, product.outputs[0].type = "y", kind
    graph = ir.Graph([x], product.outputs, nodes=[product], initializers=[constant], opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(("head", "bits"), [("none", 4), ("product", 8)])
def test_products_run_in_integers(head: str, bits: int) -> None:
    """At ONNX Runtime's own accuracy level they are of floats: as exact as before, and slower than unrounded ones."""
    (product,) = quantize.quantize_int4(of_one_product(numbers(64, 24)), 32, head, {}).graph
    assert product.op_type == "MatMulNBits" and product.attributes["bits"].as_int() == bits
    assert product.attributes["accuracy_level"].as_int() == 4


@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("inputs", [64, 96, 100])  # an even number of blocks, an odd one, and a block that is shorter
def test_onnx_runtime_reads_the_bytes_as_they_are_meant(inputs: int, zero_points: bool, tmp_path: Path) -> None:
    weight, read = numbers(inputs, 24), numbers(5, inputs, seed=4)
    quantised = quantize.quantize_int4(of_one_product(weight), 32, "none", {}, zero_points=zero_points)
    ir.save(quantised, tmp_path / "int4.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "int4.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(["y"], {"x": read})
    wanted = read @ value_of(round_weight(weight, 32, None, symmetric=not zero_points), 32)
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()  # it rounds activations to 8 bits


def bytes_of_a_weight(model: ir.Model, weights: int) -> float:
    """What a graph of one product keeps of each of its weights."""
    constants = [value.const_value for value in model.graph.initializers.values()]
    return sum(tensor.nbytes for tensor in constants if tensor is not None and tensor.size > 1) / weights


@pytest.mark.parametrize("head", ["none", "product"])
@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("ort-cpu-int4", {}),
        ("ort-cpu-int4", {"zero_points": True, "block_size": 64}),
        ("ort-cpu-int4-accurate", {}),
        ("ort-cpu-int8", {}),
        ("ort-cpu-int8", {"block_size": 16}),
        ("tensorrt-int4", {}),
        ("tensorrt-int8", {}),
    ],
)
def test_what_is_counted_of_a_weight_is_what_is_written(name: str, changed: dict[str, Any], head: str) -> None:
    """Limits, and what an engine needs of memory and disk, go by it; one below the bytes would make no upper bound."""
    spec = load_engine_spec(name).model_copy(update=changed)
    inputs, outputs = 2048, 64
    weight = numbers(inputs, outputs).astype(np.float16 if spec.graph_precision == "fp16" else np.float32)
    model = of_one_product(weight)
    found = {"product": Activations.of(numbers(8, inputs, seed=1), symmetric=True)}
    if spec.backend == "tensorrt":
        qdq.quantize_products(model, 4 if spec.precision == "int4" else 8, spec.block_size, head, found)
    elif spec.precision == "int4":
        bits, zero_points = spec.head_bits, spec.zero_points
        model = quantize.quantize_int4(model, spec.block_size, head, found, head_bits=bits, zero_points=zero_points)
    else:
        model = quantize.quantize_int8(model, spec.block_size, head, found)
    kept = stored_by(spec)
    counted = kept.head if head == "product" else kept.layers
    assert 0 <= counted - bytes_of_a_weight(model, inputs * outputs) + 0.002 < 0.012


@pytest.mark.parametrize("width", [4, 8])
def test_a_list_that_is_looked_up_is_no_table_of_tokens(width: int, tmp_path: Path) -> None:
    table, numbers_of = numbers(20, 48), np.arange(20, dtype=np.float32)
    ids = ir.Value(name="input_ids", shape=ir.Shape([3]), type=ir.TensorType(ir.DataType.INT64))
    constants = [
        ir.Value(
            name=name, shape=ir.Shape(value.shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=ir.tensor(value)
        )
        for name, value in (("table", table), ("list", numbers_of))
    ]
    nodes = [ir.node("Gather", [constant, ids]) for constant in constants]
    for node, name in zip(nodes, ("row", "number"), strict=True):
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(ir.DataType.FLOAT)
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([ids], outputs, nodes=nodes, initializers=constants, opset_imports={"": 21}, name="g")
    quantised = quantize.quantize_int4(ir.Model(graph, ir_version=10), 32, "none", {}, embedding_bits=width)
    ir.save(quantised, tmp_path / "int4.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "int4.onnx", providers=["CPUExecutionProvider"])
    row, number = session.run(["row", "number"], {"input_ids": np.array([2, 19, 0])})
    np.testing.assert_array_equal(number, [2, 19, 0])
    assert 0 < np.abs(row - table[[2, 19, 0]]).max() < np.abs(table).max() / (2 ** (width - 1) - 2)


def products(*inputs: int) -> ir.Model:
    """A graph of products, each with so many inputs, 16 outputs and the name `in_` and that number."""
    values, nodes, constants = [], [], []
    for size in inputs:
        kind, weight = ir.TensorType(ir.DataType.FLOAT), numbers(size, 16, seed=size)
        x = ir.Value(name=f"x_{size}", shape=ir.Shape([5, size]), type=kind)
        w = ir.Value(name=f"w_{size}", shape=ir.Shape(weight.shape), type=kind, const_value=ir.tensor(weight))
        node = ir.node("MatMul", [x, w], name=f"in_{size}")
        node.outputs[0].name, node.outputs[0].type = f"y_{size}", kind
        values.append(x)
        nodes.append(node)
        constants.append(w)
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph(values, outputs, nodes=nodes, initializers=constants, opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


READ = {f"in_{size}": Activations.of(together(40, size), symmetric=True) for size in (96, 576, 1536)}


def nearest_costs(weight: np.ndarray, power: np.ndarray, block: int) -> float:
    """What rounding to the nearest of 15 numbers loses, block after block; the last may be shorter."""
    noise = 0.0
    for begin in range(0, len(weight), block):
        part, counts = weight[begin : begin + block], power[begin : begin + block, None]
        scale = np.abs(part).max(axis=0) / 7
        noise += float((counts * np.square(np.rint(part / scale) * scale - part)).sum())
    return noise / float((power[:, None] * np.square(weight)).sum())


@pytest.mark.parametrize(
    ("engine", "blocks"),
    [("ort-cpu-int4", {96: 128, 576: 128, 1536: 128}), ("tensorrt-int4", {576: 64, 1536: 128})],
)
def test_a_product_costs_what_it_loses_in_the_blocks_that_are_built(engine: str, blocks: dict[int, int]) -> None:
    """ONNX Runtime fills the last block up; TensorRT takes smaller ones, or 8 bits, which are asked for no more."""
    spec = load_engine_spec(engine).model_copy(update={"block_size": 128, "keep_high_precision": 3})
    model = products(96, 576, 1536)
    found = costs.chosen(model, "head", READ, spec)
    assert found == pytest.approx(
        {
            f"in_{size}": nearest_costs(numbers(size, 16, seed=size), READ[f"in_{size}"].power, block)
            for size, block in blocks.items()
        }
    )
    assert list(found.values()) == sorted(found.values(), reverse=True)
    if engine.startswith("tensorrt"):
        qdq.quantize_products(model, 4, 128, "head", READ)
        made = [node.attributes.get_int("block_size", 0) for node in model.graph if node.op_type == "DequantizeLinear"]
        assert sorted(made) == [0, *blocks.values()]
    else:
        made = [
            node.attributes.get_int("block_size", 0) for node in quantize.quantize_int4(model, 128, "head", READ).graph
        ]
        assert made == [*blocks.values()]


def test_a_product_that_has_more_bits_anyway_may_be_named() -> None:
    spec = load_engine_spec("tensorrt-int4").model_copy(update={"block_size": 128})
    asked = spec.model_copy(update={"keep_high_precision": ("in_96", "in_576")})
    assert list(costs.chosen(products(96, 576, 1536), "head", READ, asked)) == ["in_576"]
    wrong = spec.model_copy(update={"keep_high_precision": ("in_97",)})
    with pytest.raises(EngineSpecError, match="no product 'in_97' in the graph; did you mean 'in_96'"):
        costs.chosen(products(96, 576, 1536), "head", READ, wrong)


def test_what_reads_no_numbers_is_refused() -> None:
    broken = together(10, 32)
    broken[3, 4] = np.inf
    with np.errstate(invalid="ignore"), pytest.raises(NoMatch, match="'down' reads numbers beyond the range of fp32"):
        check_finite({"down": Activations.of(broken, symmetric=False)}, "fp32")
