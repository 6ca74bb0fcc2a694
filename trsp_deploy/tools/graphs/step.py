r"""One step of a decoder whose caller sends tokens alone: the rest of what its graph asks for is state, or made of it.

The state is the KV cache, in buffers of a fixed length, and the number of tokens so far. Mask, positions and the place
of the last logits are made from that number inside the graph:

    input_ids (batch, new)      ------------------------------- engine's graph -- logits (batch, vocabulary), last token
    length_in (batch, 1)        -- mask, positions, last place --/     |
    kv_in_00_key (batch, heads, length, head_size) -------------------/ \-- kv_out_00_key, ..., length_out

A server that keeps state between requests (Triton's implicit state) hands every output of it back as the next request's
input. A sequence begins with a length of 0, and what its cache holds then is not read. The batch is of one sequence.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trsp_deploy.recipe import Strict
from trsp_deploy.tools.graphs import decoder_io
from trsp_deploy.tools.graphs.nodes import NoMatch, Writer

LENGTH_IN, LENGTH_OUT = "length_in", "length_out"  # (batch, 1) int64: tokens so far


class State(Strict):
    """A tensor that one request leaves for the next."""

    input_name: str
    output_name: str
    dtype: str  # as numpy names it
    dims: tuple[int, ...]  # without the batch

    @property
    def size_bytes(self) -> int:
        """Bytes of the state of one sequence."""
        return int(np.prod(self.dims)) * np.dtype(self.dtype).itemsize


def keep_state(model: ir.Model, length: int) -> list[State]:
    """Rewrite an engine's graph as a step with state and return the states, in the order of their names.

    model: changed in place. length: tokens that a sequence may have; a step past it fails in the graph, at a node whose
    name says so, before anything is written. Raises NoMatch for a graph with inputs that do not follow from the number
    of tokens, or with a cache of fixed length; the model is then unchanged.
    """
    caches = _caches(model.graph)
    writer = Writer(model, "step")
    lengths = _Lengths(writer, length)
    _derive_inputs(model.graph, lengths)
    in_place = decoder_io.IN_PLACE in model.metadata_props
    width = max(2, len(str(len(caches) // 2 - 1)))
    states = []
    for name, value in caches.items():
        layer, part = name.removeprefix(decoder_io.PAST).split(".")
        label = f"{int(layer):0{width}d}_{part}"  # Triton pairs states by the order of their names
        states.append(_keep_cache(writer, lengths, value, label, in_place))
    _last_logits(writer)
    model.graph.outputs.append(lengths.after)
    states.append(State(input_name=LENGTH_IN, output_name=LENGTH_OUT, dtype="int64", dims=(1,)))
    writer.finish()
    return sorted(states, key=lambda state: state.input_name)


def _caches(graph: ir.Graph) -> dict[str, ir.Value]:
    """The cache's inputs (batch, heads, past, head_size) by name; raises NoMatch."""
    tokens = ("input_ids", "attention_mask", decoder_io.POSITIONS, decoder_io.LOGITS_POSITIONS)
    caches = {value.name or "": value for value in graph.inputs if (value.name or "").startswith(decoder_io.PAST)}
    for value in graph.inputs:
        if value.name not in caches and (value.name not in tokens or value.dtype != ir.DataType.INT64):
            raise NoMatch(f"input '{value.name}' ({value.dtype}) is none that follows from the number of tokens")
    for name, value in caches.items():
        shape = value.shape
        if shape is None or len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
            raise NoMatch(f"{name}: heads and head size are not fixed")
        if isinstance(shape[2], int):
            raise NoMatch(f"{name}: holds {shape[2]} tokens, a length that is fixed already")
    return caches


class _Lengths:
    """Values (1,) int64 of the graph that follow from the number of tokens so far and the new tokens."""

    def __init__(self, writer: Writer, most: int) -> None:
        self.most = most
        one, integers = writer.one, writer.integers
        graph = writer.graph
        ids = next(value for value in graph.inputs if value.name == "input_ids")
        before = ir.Value(name=LENGTH_IN, shape=ir.Shape(["batch", 1]), type=ir.TensorType(ir.DataType.INT64))
        graph.inputs.append(before)
        self.past = one("Squeeze", [before, integers(1)], name="past")
        shape = one("Shape", [ids], name="tokens_shape")  # (2,): batch, new
        self.new = one("Gather", [shape, integers(1)], {"axis": 0}, name="new")
        self.total = one("Add", [self.past, self.new], name="total")
        self.after = one("Add", [before, self.new], name="length_after")  # (batch, 1)
        self.after.name, self.after.shape, self.after.type = LENGTH_OUT, before.shape, before.type
        room = one("Sub", [integers(most), self.total], name="room")
        ones = {"value": ir.tensor(np.ones(1, dtype=np.int64))}
        places = one("ConstantOfShape", [integers(1, most)], ones, name="places")
        # The mask is a part of as many ones as a sequence may have, and a part of less than none is an error: Split
        # looks at its sizes on the host, so that it is one on every device, where Gather clamps an index on CUDA.
        sizes = one("Concat", [self.total, room], {"axis": 0}, name="sizes")
        name = f"a_sequence_has_at_most_{most}_tokens"
        self.mask, _ = writer.emit("Split", [places, sizes], {"axis": 1}, outputs=2, name=name)  # (1, total)
        start, end = (one("Squeeze", [value], name="scalar") for value in (self.past, self.total))
        positions = one("Range", [start, end, writer.constant(np.array(1))], name="positions")
        self.positions = one("Unsqueeze", [positions, integers(0)], name="position_ids")  # (1, new)
        self.last = one("Sub", [self.new, integers(1)], name="last")


def _derive_inputs(graph: ir.Graph, lengths: _Lengths) -> None:
    """Feed every input but tokens and cache from inside the graph."""
    made = {
        "attention_mask": lengths.mask,
        decoder_io.POSITIONS: lengths.positions,
        decoder_io.LOGITS_POSITIONS: lengths.last,
    }
    for value in [value for value in graph.inputs if value.name in made]:
        ir.convenience.replace_all_uses_with(value, made[value.name or ""])
        graph.inputs.remove(value)


def _keep_cache(writer: Writer, lengths: _Lengths, past: ir.Value, label: str, in_place: bool) -> State:
    """Give one input of the cache, and the output that follows it, the fixed length and the state's names."""
    graph, shape, dtype = writer.graph, past.shape, past.dtype
    assert shape is not None and dtype is not None  # _caches has looked
    number = next(n for n, value in enumerate(graph.outputs) if value.name == decoder_io.present(past.name or ""))
    present = graph.outputs[number]
    fixed = ir.Shape([shape[0], shape[1], lengths.most, shape[3]])
    if not in_place:
        present = _grow_within(writer, lengths, past, present)
        graph.outputs[number] = present
    past.name, past.shape = f"kv_in_{label}", fixed
    present.name, present.shape, present.type = f"kv_out_{label}", fixed, past.type
    heads, size = shape[1], shape[3]
    assert isinstance(heads, int) and isinstance(size, int)
    dims = (heads, lengths.most, size)
    return State(input_name=past.name, output_name=present.name, dtype=str(dtype.numpy()), dims=dims)


def _grow_within(writer: Writer, lengths: _Lengths, past: ir.Value, present: ir.Value) -> ir.Value:
    """For a graph that makes a longer cache at every step: let it read the live part of the buffer, and put what it
    makes in front of the rest of the buffer."""
    one, axis = writer.one, writer.integers(2)
    live = one("Slice", [past, writer.integers(0), lengths.past, axis], name="live")
    live.shape, live.type = past.shape, past.type
    ir.convenience.replace_all_uses_with(past, live)
    reader = live.producer()
    assert reader is not None
    reader.replace_input_with(0, past)
    rest = one("Slice", [past, lengths.total, writer.integers(lengths.most), axis], name="rest")
    return one("Concat", [present, rest], {"axis": 2}, name="buffer")


def _last_logits(writer: Writer) -> None:
    """Let `logits` be those of the last token alone, (batch, vocabulary)."""
    graph = writer.graph
    number = next(n for n, value in enumerate(graph.outputs) if value.name == "logits")
    every = graph.outputs[number]  # (batch, positions, vocabulary)
    last = writer.one("Gather", [every, writer.constant(np.array(-1))], {"axis": 1}, name="last_logits")
    assert every.shape is not None
    last.shape, last.type = ir.Shape([every.shape[0], every.shape[2]]), every.type
    every.name, last.name = "logits_of_each", "logits"
    graph.outputs[number] = last
