"""Reading and changing an ONNX graph through onnx_ir: the few moves that the passes have in common."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from trsp_deploy.errors import named, passes_through

STANDARD = "ai.onnx"  # another name of the domain ""
MICROSOFT = "com.microsoft"  # domain of ONNX Runtime's own operators


class NoMatch(Exception):
    """The graph does not have the form that a pass knows; the message says where it differs."""


LOWEST_OPSET = 18  # that onnxscript's converter begins at; ONNX Runtime's quantiser converts nothing at all


def check_opset(model: ir.Model) -> None:
    """Raise NoMatch for a graph older than LOWEST_OPSET, which a higher opset would make invalid as it stands."""
    opset = model.graph.opset_imports.get("", 0)
    if opset < LOWEST_OPSET:
        raise NoMatch(
            f"the graph is of opset {opset}, and {LOWEST_OPSET} is the lowest that can be: export.opset={LOWEST_OPSET}"
        )


def load(path: Path) -> ir.Model:
    """A graph with its weights left in their files, in one of the forms that ONNX has for the same; raises NoMatch for
    a damaged file.

    Initializers are no inputs, and the standard operators' domain is called "".
    """
    try:
        model = ir.load(path)
    except FileNotFoundError:
        raise
    except Exception as problem:  # whatever the parser stumbles over
        raise NoMatch(f"onnx_ir cannot read it ({type(problem).__name__})") from problem
    inputs, weights = model.graph.inputs, model.graph.initializers
    inputs[:] = [value for value in inputs if value.name not in weights]
    opsets = model.graph.opset_imports
    if STANDARD in opsets:
        opsets.setdefault("", opsets.pop(STANDARD))
        for node in model.graph:
            node.domain = "" if node.domain == STANDARD else node.domain
    return model


SMALL_BYTES = 1 << 20  # of a weight that is loaded: what passes read are factors, shapes and vectors


def leave_in_files(model: ir.Model) -> dict[str, ir.ExternalTensor]:
    """Load the small weights, and return the matrices, which stay in their files: together they are the model."""
    found = {}
    for name, value in model.graph.initializers.items():
        if isinstance(tensor := value.const_value, ir.ExternalTensor):
            if tensor.nbytes > SMALL_BYTES:
                found[name] = tensor
            else:
                value.const_value = ir.tensor(tensor.numpy().copy(), name=name)
    return found


def put_down(model: ir.Model, path: Path) -> ir.Model:
    """Write a graph, weights beside it in `<name>.data`, and return it as it lies there: no matrix is in memory.

    model: of no use from then on: its weights go.
    """
    ir.save(model, path, external_data=f"{path.name}.data")
    for value in model.graph.initializers.values():  # a graph is full of cycles: it would go at some later time
        value.const_value = None
    return ir.load(path)


def constant(value: ir.Value | None) -> np.ndarray | None:
    """What a value holds when it never changes; None otherwise."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """A constant single number; None otherwise."""
    if value is None or (value.shape is not None and value.shape.is_static() and np.prod(value.shape.numpy()) != 1):
        return None  # without reading the numbers: they may be a weight of gigabytes
    array = constant(value)
    return None if array is None or array.size != 1 else float(array.reshape(()))


def readers(value: ir.Value, *, without: Sequence[str] = ()) -> list[ir.Node]:
    """Nodes that read a value, each once, but for some operators."""
    return [node for node in dict.fromkeys(use.node for use in value.uses()) if node.op_type not in without]


def only_reader(value: ir.Value, *, without: Sequence[str] = ()) -> ir.Node | None:
    """The one node that reads a value; None when there are several or none."""
    found = readers(value, without=without)
    return found[0] if len(found) == 1 else None


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes a value, when it is of this operator."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def permutes(node: ir.Node | None, *permutation: int) -> bool:
    """Whether a node is a Transpose by this permutation."""
    return (
        node is not None and node.op_type == "Transpose" and tuple(node.attributes.get_ints("perm", ())) == permutation
    )


class Part:
    """What makes a value of a graph out of some of the graph's inputs, to be computed for a few of them."""

    def __init__(self, model: ir.Model, value: ir.Value, inputs: Sequence[str]) -> None:
        """Take what lies between some inputs and the value.

        inputs: names; those that the graph lacks are left out. Raises NoMatch when the value needs others too, or
        what onnx does not compute.
        """
        import onnx.reference

        given = [found for found in model.graph.inputs if found.name in inputs]
        try:
            graph = ir.convenience.extract(model.graph, given, [value])
        except ValueError as problem:
            raise NoMatch(f"'{value.name}' does not depend on {' and '.join(inputs)} alone") from problem
        part = ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
        ir.external_data.load_to_model(part)
        self._dtypes = {found.name or "": (found.dtype or ir.DataType.INT64).numpy() for found in given}
        self.needs = {value.name or "" for value in graph.inputs if value.uses()}  # of those inputs
        self._what = f"'{value.name}' cannot be computed here"
        with self._no_match():
            self._evaluator = onnx.reference.ReferenceEvaluator(ir.to_proto(part))

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """The value for these inputs; those that are not needed are ignored. Raises NoMatch where it has none."""
        with self._no_match():
            (found,) = self._evaluator.run(None, self._cast(feeds))
        array: np.ndarray = found
        return array

    def _cast(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: feeds[name].astype(of) for name, of in self._dtypes.items()}

    def bytes_of_pairs(self, longer: int, length: int, feeds: Mapping[str, np.ndarray]) -> int:
        """Bytes of what is made on the way for every pair of tokens of a text of `longer`, by these inputs of one of
        `length`, for which every dimension of that length is taken. Raises NoMatch as a call does.
        """
        with self._no_match():
            found = self._evaluator.run(None, self._cast(feeds), intermediate=True)
        arrays = [array for array in found.values() if isinstance(array, np.ndarray)]
        return sum(
            array.itemsize * math.prod(longer if size == length else size for size in array.shape)
            for array in arrays
            if array.shape.count(length) > 1
        )

    @contextlib.contextmanager
    def _no_match(self) -> Iterator[None]:
        try:
            yield
        except Exception as problem:  # operators that are ONNX Runtime's own, lengths that the graph is not for
            if passes_through(problem):
                raise
            raise NoMatch(f"{self._what} ({named(problem)})") from problem


class Writer:
    """Adds nodes and constants to a graph under names of their own; `finish` puts everything in order."""

    def __init__(self, model: ir.Model, prefix: str) -> None:
        """prefix: of the new names; one pass, one prefix."""
        self.model = model
        self.graph = model.graph
        self._prefix = prefix
        self._taken = {value.name for node in model.graph for value in node.outputs} | set(model.graph.initializers)
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def emit(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
        name: str = "",
    ) -> list[ir.Value]:
        """Append a node and return its outputs."""
        if domain:
            self.graph.opset_imports.setdefault(domain, 1)
        label = self._free(name or op_type)
        node = ir.node(op_type, inputs, attributes or {}, domain=domain, num_outputs=outputs, name=label)
        for number, value in enumerate(node.outputs):
            value.name = f"{label}_output_{number}"
        self.graph.append(node)
        return list(node.outputs)

    def one(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any] | None = None, **more: Any
    ) -> ir.Value:
        """Append a node with a single output and return that."""
        return self.emit(op_type, inputs, attributes, **more)[0]

    def constant(self, array: np.ndarray, name: str = "") -> ir.Value:
        """A constant; equal small ones are one."""
        key = (str(array.dtype), array.shape, array.tobytes() if array.size <= 16 else b"")
        if array.size <= 16 and key in self._constants:
            return self._constants[key]
        tensor = ir.tensor(array, name=self._free(name or "constant"))
        value = ir.Value(
            name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        self._constants[key] = value
        return value

    def integers(self, *numbers: int) -> ir.Value:
        """A constant vector (count,) int64."""
        return self.constant(np.array(numbers, dtype=np.int64))

    def replace_output(self, old: ir.Value, new: ir.Value) -> None:
        """Let `new` be what `old` was to its readers and to the graph's outputs, under its name."""
        new.shape, new.type = old.shape, old.type
        if old.is_graph_output():
            name = old.name
            old.name = self._free(f"{name}_before")
            new.name = name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)

    def finish(self) -> None:
        """Sort the nodes, say nothing twice, and drop what is no longer read."""
        from onnx_ir.passes import common

        self.graph.sort()
        common.CommonSubexpressionEliminationPass()(self.model)
        self.drop_unread()

    def drop_unread(self) -> None:
        """Drop the nodes that nothing reads any more."""
        from onnx_ir.passes import common

        common.RemoveUnusedNodesPass()(self.model)

    def _free(self, name: str) -> str:
        label = f"{self._prefix}/{name}"
        number = 1
        while label in self._taken:
            number += 1
            label = f"{self._prefix}/{name}_{number}"
        self._taken.add(label)
        return label
