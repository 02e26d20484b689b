"""Readers of files that strangers made, fed with damaged and invented ones.

Each target may refuse what it is given by one class of error alone; what it takes must mean what it says. Two readers
of safetensors look at the same bytes: what ours takes, the library must take too, and see the same tensors in.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from safetensors.numpy import save

from cbtm._folder import load_parts
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.errors import CbtmError, CheckpointRejected, IntegrityError, InvalidArgument
from cbtm_common.files import FileSpec, safe_join
from cbtm_common.recipe import OptimizerRecipe
from cbtm_common.safetensors_header import SafetensorsHeader, read_header
from cbtm_common.shards import read_shard, write_shard
from cbtm_coordinator.services.context import checked_files
from cbtm_coordinator.structure.architecture import Architecture, Size, TensorSpec
from cbtm_coordinator.structure.inspection import Expectation, Inspection
from cbtm_coordinator.structure.manifest import check_paths
from cbtm_coordinator.structure.stream import SafetensorsStream


@dataclass(frozen=True, kw_only=True)
class Target:
    """`check` raises when a reader does what it must not. `examples` once failed, or are likely to."""

    inputs: SearchStrategy[Any]
    check: Callable[[Any], None]
    examples: tuple[Any, ...] = ()


def in_file(check: Callable[[Path], None]) -> Callable[[bytes], None]:
    def on_data(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file.safetensors"
            path.write_bytes(data)
            check(path)

    return on_data


def built(header: object, payload: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


# What is put in

_MODEL = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(2, np.int8)})


def _shard(offsets: list[int]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard"
        write_shard(path, np.array([5, 6, 0, 7, 0]), np.array(offsets), vocab_size=10, eos_token_id=0)
        return path.read_bytes()


_SHARD = _shard([0, 3])
_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=12,
)
_lengths = st.lists(st.one_of(st.integers(-2, 8), st.integers(-(2**65), 2**65), st.booleans()), max_size=4)
_entry = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(["F32", "F64", "I64", "U16", "U8", "BF16", "F8_E4M3", "BOOL"]), _json),
        "shape": st.one_of(_lengths, _json),
        "data_offsets": st.one_of(st.tuples(st.integers(0, 24), st.integers(0, 24)).map(list), _lengths, _json),
    }
)
_names = st.sampled_from(["a", "b", "tokens", "document_offsets", "__metadata__", "", "\n"])
_headers = st.dictionaries(st.one_of(_names, st.text(max_size=4)), st.one_of(_entry, _json), max_size=4)


@st.composite
def _tiled(draw: st.DrawFn) -> bytes:
    """A whole file of a few tensors, valid but perhaps in one offset."""
    sizes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    header, at = {}, 0
    for number, size in enumerate(sizes):
        header[f"t{number}"] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    if draw(st.booleans()):
        header["t0"]["data_offsets"][draw(st.integers(0, 1))] += draw(st.integers(-2, 2))
    return built(header, draw(st.binary(min_size=at, max_size=at + 1)))


def damaged(data: bytes) -> SearchStrategy[bytes]:
    """`data` with some bytes changed, and some left out or added."""
    changes = st.lists(st.tuples(st.integers(0, len(data) - 1), st.binary(max_size=9)), min_size=1, max_size=4)

    def apply(made: list[tuple[int, bytes]]) -> bytes:
        result = bytearray(data)
        for place, piece in made:
            result[place : place + max(len(piece), 1)] = piece
        return bytes(result)

    return changes.map(apply)


def files_of(data: bytes) -> SearchStrategy[bytes]:
    invented = st.tuples(_headers, st.binary(max_size=40)).map(lambda pair: built(*pair))
    return st.one_of(damaged(data), _tiled(), invented, st.binary(max_size=64))


# What must hold


def _check_header(path: Path) -> None:
    try:
        header = read_header(path)
    except IntegrityError:
        return
    data = path.read_bytes()
    theirs = dict(safetensors.deserialize(data))
    assert {name: list(entry.shape) for name, entry in header.tensors.items()} == {
        name: entry["shape"] for name, entry in theirs.items()
    }
    for name, entry in header.tensors.items():
        assert data[header.payload + entry.begin : header.payload + entry.end] == theirs[name]["data"]


def _check_stream(given: tuple[bytes, int]) -> None:
    """Cut anywhere, the stream says what the reader of whole files says."""
    data, chunk = given
    headers: list[SafetensorsHeader] = []
    stream = SafetensorsStream("file", len(data), headers.append, lambda name, statistics: None)
    try:
        for start in range(0, len(data), chunk):
            stream.feed(data[start : start + chunk])
        stream.finish()
        streamed = True
    except IntegrityError:
        streamed = False

    def whole(path: Path) -> None:
        try:
            header = read_header(path)
        except IntegrityError:
            assert not streamed
            return
        assert streamed
        assert headers == [header]

    in_file(whole)(data)


def _check_shard(path: Path) -> None:
    try:
        shard = read_shard(path)
    except IntegrityError:
        return
    documents = list(shard.documents())
    assert sum(len(document) + 1 for document in documents) == len(shard.tokens)
    assert all((document < shard.vocab_size).all() for document in documents)


_EXPECTED = Expectation(
    architecture=Architecture(
        tensors={"a": TensorSpec("F32", (2, 3)), "b": TensorSpec("I8", (2,))},
        trained={"a": (2, 3)},
        config={"model_type": "llama", "hidden_size": 3},
        sizes={"a": Size(3.0)},
    ),
    optimizer=OptimizerRecipe(),
    learning_rate=1e-3,
    step=3,
    total_steps=3,
    state={"step": 3, "task_id": "task_1"},
    start={"a": Size(3.0)},
    before={"a": Size(3.0)},
    before_step=0,
)
_HONEST = {
    "state.json": b'{"step": 3, "task_id": "task_1"}',
    "model/config.json": b'{"model_type": "llama", "hidden_size": 3}',
    "model/model.safetensors": _MODEL,
}
_OPTIMIZER = save(
    {
        "a.step": np.array(3, np.float32),
        "a.exp_avg": np.zeros((2, 3), np.float32),
        "a.exp_avg_sq": np.zeros((2, 3), np.float32),
    }
)


def _check_checkpoint(changed: Mapping[str, bytes]) -> None:
    contents = {**_HONEST, **changed}
    files = [FileSpec(path=path, size=len(data), sha256="0" * 64) for path, data in contents.items()]
    try:
        inspection = Inspection(_EXPECTED, files)
        for file in files:
            reader = inspection.reader(file)
            reader.feed(contents[file.path])
            reader.finish()
        sizes = inspection.finish()
    except CheckpointRejected as error:
        evidence, message = error.metadata, error.message
    else:
        assert 2.9 < sizes["a"].rms < 3.1
        return
    assert set(evidence) >= {"check", "file", "found", "allowed"}
    assert len(message) < 2000


def _check_files(files: list[pb.FileSpec]) -> None:
    """What passes stays where it belongs, on any disk."""
    try:
        checked = checked_files(files, maximum=4, prefix="runs/run_1/tasks/task_1")
        check_paths(checked)
    except InvalidArgument:
        return
    for file in checked:
        assert file.key == f"runs/run_1/tasks/task_1/{file.path}"
        assert safe_join(Path("/nowhere"), file.path).is_relative_to("/nowhere")


def _check_manifest(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cbtm.json").write_bytes(data)
        try:
            load_parts(Path(folder))
        except CbtmError:
            return
        raise AssertionError("there is no router in this folder")


_paths = st.one_of(
    st.sampled_from(["state.json", "model/config.json", "model/a.safetensors", "optimizer.safetensors"]),
    st.lists(st.sampled_from(["..", ".", "model", "a.json", "", "C:", "\\", "\0", "~"]), max_size=4).map("/".join),
    st.text(max_size=12),
)
_specs = st.builds(
    pb.FileSpec,
    path=_paths.filter(lambda path: path.isprintable() or "\0" in path),
    size=st.integers(-2, 2**40),
    sha256=st.one_of(st.just("0" * 64), st.text("0123456789abcdefA/.", max_size=65)),
)
_manifest = {
    "format": "cbtm-ensemble-1",
    "run": {"id": "run_1", "name": "web"},
    "clusters": [{"id": "run_1-c0000", "index": 0, "top_terms": [], "expert": "experts/0"}],
    "seed": "seed",
    "recipe": {},
    "files": {"router/router.json": {"size": 3, "sha256": "0" * 64}},
}
_manifests = st.one_of(
    damaged(json.dumps(_manifest).encode()),
    st.dictionaries(st.sampled_from(sorted(_manifest)), _json).map(
        lambda changed: json.dumps({**_manifest, **changed}).encode()
    ),
)
_DEEP = b"[" * 50_000

TARGETS: dict[str, Target] = {
    "safetensors header": Target(
        inputs=files_of(_MODEL), check=in_file(_check_header), examples=(_MODEL, built(_DEEP, b""))
    ),
    "safetensors stream": Target(
        inputs=st.tuples(files_of(_MODEL), st.integers(1, 40)), check=_check_stream, examples=((_MODEL, 7), (b"", 1))
    ),
    "token shard": Target(
        inputs=files_of(_SHARD),
        check=in_file(_check_shard),
        examples=(
            _SHARD,
            # The difference of its offsets overflows.
            _shard([0, 2**63 - 1, -2]),
        ),
    ),
    "checkpoint": Target(
        inputs=st.one_of(
            st.fixed_dictionaries({"model/model.safetensors": files_of(_MODEL)}),
            st.fixed_dictionaries({"optimizer.safetensors": files_of(_OPTIMIZER)}),
            st.dictionaries(
                st.sampled_from(["state.json", "model/config.json", "model/generation_config.json"]),
                st.one_of(
                    _json.map(lambda value: json.dumps(value).encode()), damaged(_HONEST["state.json"]), st.binary()
                ),
                min_size=1,
            ),
        ),
        check=_check_checkpoint,
        examples=({}, {"optimizer.safetensors": _OPTIMIZER}, {"state.json": _DEEP}),
    ),
    "list of files": Target(inputs=st.lists(_specs, max_size=5), check=_check_files),
    "ensemble manifest": Target(
        inputs=_manifests,
        check=_check_manifest,
        examples=(
            json.dumps(_manifest).encode(),
            _DEEP,
            b'{"format": "cbtm-ensemble-1", "clusters": [{"index": 1e999}]}',
        ),
    ),
}
