"""An ONNX model of a stranger, opened so that it can only compute, and only so much."""

import functools
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import AttributeProto, TensorProto

from lightning_modules.errors import InputError

# Weights and activations together. The largest backbone here takes a quarter of it.
MAX_MEMORY_BYTES = 4 * 2**30

_SAME_AS_REQUESTED = 1  # the arena would double its size otherwise, and meet the limit early

_FATAL = 4  # onnxruntime logs errors to stderr as well, beside the one line that says it


def open_session(model: bytes) -> onnxruntime.InferenceSession:
    """Open a model for computing on CPUs.

    Refused is what a network never needs and could do harm with: weights in other files (any path
    of the machine), operators outside the standard, and loops, which need not end. What its
    operators allocate is bounded by ``MAX_MEMORY_BYTES``, for all sessions of the process.

    Args:
        model: The contents of a ``.onnx`` file.

    Raises:
        InputError: If it is no such model; the message does not name it.
    """
    try:
        proto = onnx.load_model_from_string(model)
    except Exception as error:  # protobuf's DecodeError, whose module depends on its version
        raise InputError("is not an ONNX model") from error
    _check_graph(proto)
    _bound_memory()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    options.add_session_config_entry("session.use_env_allocators", "1")
    try:
        return onnxruntime.InferenceSession(
            model,
            options,
            providers=["CPUExecutionProvider"],
            # It would compute while the model is opened, outside the bounded memory.
            disabled_optimizers=["ConstantFolding"],
            enable_fallback=0,  # it would say on stdout that it tries the same again
        )
    except Exception as error:  # onnxruntime's own exceptions share no base class
        raise InputError(f"is not an ONNX model that can be run; {_reason(error)}") from error


def run_session(
    session: onnxruntime.InferenceSession, intensities: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Return what a model makes of its one input.

    Raises:
        InputError: If it fails; the message does not name it.
    """
    [node] = session.get_inputs()
    try:
        (result,) = session.run(None, {node.name: intensities})
    except Exception as error:  # as above
        raise InputError(f"fails on an image; {_reason(error)}") from error
    return np.asarray(result)


@functools.cache
def _bound_memory() -> None:
    onnxruntime.set_default_logger_severity(_FATAL)
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    arena = onnxruntime.OrtArenaCfg(
        {"max_mem": MAX_MEMORY_BYTES, "arena_extend_strategy": _SAME_AS_REQUESTED}
    )
    onnxruntime.create_and_register_allocator(memory, arena)


def _check_graph(model: onnx.ModelProto) -> None:
    graph = model.graph
    domains = {node.domain for node in graph.node} - {"", "ai.onnx"}
    if domains or model.functions:
        raise InputError("has operators outside ONNX's own")
    tensors: list[TensorProto] = list(graph.initializer)
    for sparse in graph.sparse_initializer:
        tensors += [sparse.values, sparse.indices]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
                raise InputError(f"has a loop or a branch ({node.op_type:.40})")
            tensors += _tensors_of(attribute)
    if any(tensor.external_data or tensor.data_location for tensor in tensors):
        raise InputError("has weights in other files")


def _tensors_of(attribute: AttributeProto) -> Iterable[TensorProto]:
    yield from (attribute.t, *attribute.tensors)
    for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
        yield from (sparse.values, sparse.indices)


def _reason(error: BaseException) -> str:
    """Return the start of what onnxruntime says, in one printable line."""
    text = " ".join(str(error).split())[:200]
    return "".join(character if character.isprintable() else "?" for character in text)
