"""A bundle predicts what it was exported to predict; one that was made to harm ends in one line."""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from lightning_modules import bundle as bundle_module
from lightning_modules import onnx_session
from lightning_modules.bundle import MODEL_FILES, Bundle, load_bundle
from lightning_modules.errors import InputError

SIZE_PX = 8
EMPTY_SAFETENSORS = struct.pack("<Q", 2) + b"{}"

# Logits are 4 m - 2 and 2 - 4 m, for a mean intensity of m.
NODES = (
    helper.make_node("GlobalAveragePool", ["intensities"], ["pooled"]),
    helper.make_node("Flatten", ["pooled"], ["mean"]),
    helper.make_node("Gemm", ["mean", "weight", "bias"], ["logits"]),
)


def onnx_model(
    nodes: Sequence[onnx.NodeProto] = NODES,
    tensors: Sequence[onnx.TensorProto] = (),
    weight: Sequence[float] = (4.0, -4.0),
) -> onnx.ModelProto:
    shape = ["batch", 1, SIZE_PX, SIZE_PX]
    graph = helper.make_graph(
        list(nodes),
        "bundle",
        [helper.make_tensor_value_info("intensities", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [
            helper.make_tensor("weight", TensorProto.FLOAT, [1, 2], weight),
            helper.make_tensor("bias", TensorProto.FLOAT, [2], [-2.0, 2.0]),
            *tensors,
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def write(
    folder: Path,
    model: onnx.ModelProto | bytes | None = None,
    safetensors: bytes = EMPTY_SAFETENSORS,
    **changes: Any,
) -> Path:
    """A bundle whose digests are right, whatever its files hold."""
    model = onnx_model() if model is None else model
    data = model if isinstance(model, bytes) else model.SerializeToString()
    files = dict(zip(MODEL_FILES, (data, b"never opened", safetensors), strict=True))
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    config = {
        "format": 2,
        "classes": ["bright", "dark"],
        "input": {"image_size_px": SIZE_PX},
        "temperature": 2.0,
        "digests": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def images(*greys: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.stack([np.full((SIZE_PX, SIZE_PX), grey, np.uint8) for grey in greys])


def message_of(function: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        function()
    line = str(caught.value)
    assert line.isprintable()  # no line break is
    return line


def loading(folder: Path) -> str:
    return message_of(lambda: load_bundle(folder))


# What it predicts


def test_logits_are_raw_and_probabilities_are_calibrated(tmp_path: Path) -> None:
    bundle = load_bundle(write(tmp_path / "b"))
    assert bundle.temperature == 2.0
    np.testing.assert_allclose(bundle.logits(images(255, 0)), [[2, -2], [-2, 2]], atol=1e-6)
    # Divided by 2: logits 1 and -1.
    high = 1 / (1 + math.exp(-2))
    expected = [[high, 1 - high], [1 - high, high]]
    np.testing.assert_allclose(bundle.predict(images(255, 0)), expected, atol=1e-6)


def test_any_number_of_images_is_computed_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_module, "_BATCH_PIXELS", 3 * SIZE_PX**2)
    bundle = load_bundle(write(tmp_path / "b"))
    assert bundle.batch_size == 3
    greys = list(range(0, 70, 10))
    expected = [[4 * grey / 255 - 2, 2 - 4 * grey / 255] for grey in greys]
    np.testing.assert_allclose(bundle.logits(images(*greys)), expected, atol=1e-5)
    assert bundle.logits(np.zeros((0, SIZE_PX, SIZE_PX), np.uint8)).shape == (0, 2)


# Files that are not the exported ones


@pytest.mark.parametrize("name", MODEL_FILES)
@pytest.mark.parametrize("change", ["one byte", "gone", "a link", "a folder"])
def test_every_model_file_is_checked(tmp_path: Path, name: str, change: str) -> None:
    path = write(tmp_path / "b") / name
    data = path.read_bytes()
    path.unlink()
    if change == "one byte":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif change == "a link":
        (tmp_path / "elsewhere").write_bytes(data)
        path.symlink_to(tmp_path / "elsewhere")
    elif change == "a folder":
        path.mkdir()
    assert f"{path} is missing or changed: export it again" in loading(tmp_path / "b")


def test_a_model_file_that_has_no_digest_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "b", digests={})
    assert "model.onnx is missing or changed" in loading(tmp_path / "b")


def test_a_file_of_any_size_is_not_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "b")
    monkeypatch.setattr(bundle_module, "MAX_MODEL_BYTES", 11)  # model.pt2 has 12
    assert "is missing or changed" in loading(tmp_path / "b")


# Descriptions


@pytest.mark.parametrize(
    "change",
    [
        {"format": 1},
        {"format": "\x1b[31m2\n"},
        {"classes": ["a", "b", "c"]},
        {"classes": ["a", "a"]},
        {"classes": ["a", "\x1b[2J"]},
        {"classes": ["a", "b" * 101]},
        {"classes": ["a", ""]},
        {"classes": []},
        {"classes": "ab"},
        {"input": {"image_size_px": 16}},
        {"input": {"image_size_px": 10**9}},
        {"input": {"image_size_px": True}},
        {"input": {"image_size_px": "8"}},
        {"input": {}},
        {"input": []},
        {"temperature": 0},
        {"temperature": -1.0},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"temperature": "2"},
        {"temperature": None},
        {"digests": []},
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    line = loading(write(tmp_path / "b", **change))
    assert "config.json must describe a bundle; " in line or "size and classes of config" in line


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 200_000, b'{"format": ' + b"9" * 5000 + b"}"],
)
def test_a_description_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "b") / "config.json"
    path.write_bytes(content)
    assert loading(tmp_path / "b").startswith(f"{path} must describe a bundle; ")


def test_a_description_that_is_huge_or_a_link_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "b") / "config.json"
    (tmp_path / "elsewhere").write_bytes(path.read_bytes())
    path.write_bytes(path.read_bytes() + b" " * 2**20)
    assert "it is not a plain file of at most 1048576 bytes" in loading(tmp_path / "b")
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    assert "config.json must describe a bundle; " in loading(tmp_path / "b")


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    line = loading(tmp_path / "none")
    assert line.startswith(f"a bundle must hold config.json; none in {tmp_path / 'none'}: give the")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(key=st.sampled_from(["format", "classes", "input", "temperature", "digests"]), value=JSON)
def test_any_description_opens_or_ends_in_one_line(tmp_path: Path, key: str, value: Any) -> None:
    folder = write(tmp_path / "b", **{key: value})
    try:
        opened: Bundle | str = load_bundle(folder)
    except InputError as error:
        opened = str(error)
    assert isinstance(opened, Bundle) or opened.isprintable()


# Models


def lying_safetensors(begin: int, end: int, num_bytes: int = 4) -> bytes:
    header = json.dumps(
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [begin, end]}}
    ).encode()
    return struct.pack("<Q", len(header)) + header + bytes(num_bytes)


@pytest.mark.parametrize(
    "data",
    [
        lying_safetensors(0, 2**40),
        lying_safetensors(-4, 0),
        lying_safetensors(0, 8),
        lying_safetensors(0, 4, num_bytes=0),
        struct.pack("<Q", 2**60) + b"{}",
        b"",
    ],
)
def test_safetensors_with_lying_offsets_are_refused(tmp_path: Path, data: bytes) -> None:
    line = loading(write(tmp_path / "b", safetensors=data))
    assert "model.safetensors must be a safetensors file; " in line


def test_honest_safetensors_are_taken(tmp_path: Path) -> None:
    load_bundle(write(tmp_path / "b", safetensors=lying_safetensors(0, 4)))


def test_weights_in_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(8))
    for tensor_name in ("weight", "unused"):
        model = onnx_model(
            tensors=[helper.make_tensor("unused", TensorProto.FLOAT, [2], [0.0, 0.0])]
        )
        [tensor] = [t for t in model.graph.initializer if t.name == tensor_name]
        tensor.ClearField("float_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../secret")
        assert "model.onnx has weights in other files" in loading(write(tmp_path / "b", model))


def test_weights_of_constants_in_other_files_are_refused(tmp_path: Path) -> None:
    tensor = helper.make_tensor("t", TensorProto.FLOAT, [2], [0.0, 0.0])
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    inner = node.attribute[0].t
    inner.data_location = TensorProto.EXTERNAL
    inner.external_data.add(key="location", value="../secret")
    line = loading(write(tmp_path / "b", onnx_model([node, *NODES])))
    assert "has weights in other files" in line


def test_loops_and_branches_are_refused(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    constant = helper.make_node(
        "Constant", [], ["y"], value=helper.make_tensor("t", TensorProto.FLOAT, [1], [0.0])
    )
    body = helper.make_graph([constant], "body", [], [value])
    for kind, attributes in (
        ("If", {"then_branch": body, "else_branch": body}),
        ("Loop", {"body": body}),
    ):
        node = helper.make_node(kind, ["bias"], ["z"], **attributes)
        line = loading(write(tmp_path / "b", onnx_model([*NODES, node])))
        assert f"model.onnx has a loop or a branch ({kind})" in line


def test_operators_outside_the_standard_are_refused(tmp_path: Path) -> None:
    node = helper.make_node("Gelu", ["mean"], ["z"], domain="com.microsoft")
    line = loading(write(tmp_path / "b", onnx_model([*NODES, node])))
    assert "model.onnx has operators outside ONNX's own" in line
    model = onnx_model()
    model.functions.append(
        helper.make_function("mine", "f", ["x"], ["y"], [], [helper.make_opsetid("", 17)])
    )
    assert "has operators outside ONNX's own" in loading(write(tmp_path / "b", model))


@pytest.mark.parametrize("data", [b"", b"junk", b"\x08" * 1000])
def test_a_model_that_is_none_is_refused(tmp_path: Path, data: bytes) -> None:
    assert "model.onnx is not an ONNX model" in loading(write(tmp_path / "b", data))


def test_a_model_whose_names_are_no_text_is_refused(tmp_path: Path) -> None:
    data = onnx_model().SerializeToString().replace(b"intensities", b"intensit\xffes")
    assert "model.onnx must have names in UTF-8" in loading(write(tmp_path / "b", data))


def test_a_model_with_other_inputs_or_outputs_is_refused(tmp_path: Path) -> None:
    renamed = onnx_model()
    renamed.graph.input[0].name = renamed.graph.node[0].input[0] = "images"
    assert "must turn intensities into logits; it takes ['images']" in loading(
        write(tmp_path / "b", renamed)
    )
    second = onnx_model()
    second.graph.output.append(helper.make_tensor_value_info("mean", TensorProto.FLOAT, None))
    assert "must turn intensities into logits; " in loading(write(tmp_path / "b", second))


def test_logits_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    for weight in ((math.nan, 0.0), (math.inf, 0.0)):
        bundle = load_bundle(write(tmp_path / "b", onnx_model(weight=weight)))
        line = message_of(lambda bundle=bundle: bundle.logits(images(255)))
        assert line.startswith("the bundle's model.onnx must give (1, 2) finite logits; ")


def test_a_model_that_asks_for_all_memory_is_stopped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    numbers = 3 * onnx_session.MAX_MEMORY_BYTES // 4  # of four bytes each: three times the limit
    size = helper.make_tensor("size", TensorProto.INT64, [1], [numbers])
    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["ones"]),
        helper.make_node("ReduceMax", ["ones"], ["one"], keepdims=0),
        *NODES[:2],
        helper.make_node("Gemm", ["mean", "weight", "bias"], ["raw"]),
        helper.make_node("Add", ["raw", "one"], ["logits"]),
    ]
    bundle = load_bundle(write(tmp_path / "b", onnx_model(nodes, [size])))
    line = message_of(lambda: bundle.logits(images(255)))
    assert line.startswith("the bundle's model.onnx fails on an image; ")
    captured = capfd.readouterr()
    assert captured.err == ""  # onnxruntime logs in C++
