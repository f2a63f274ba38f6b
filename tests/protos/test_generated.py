"""The protos keep the house's rules, say what a caller must know, and the committed stubs are theirs.

Compiling them again needs grpcio-tools, which only `make protos` installs; without it a small parser of the .proto
texts finds what the committed descriptors have too much or too little.
"""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FileDescriptor

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "protos" / "kvbaton" / "v1"
FILES = sorted(path.stem for path in FOLDER.glob("*.proto"))

SHARED_RESPONSES = {"GetStatus": "WorkerStatus", "WatchStatus": "WorkerStatus"}
"""Methods that answer with one message, because they tell the same thing once or often."""

TYPES = {
    getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{name.upper()}"): name
    for name in (
        "double",
        "float",
        "int32",
        "int64",
        "uint32",
        "uint64",
        "fixed32",
        "fixed64",
        "bool",
        "string",
        "bytes",
    )
}

Described = set[tuple[str, ...]]


def committed(name: str) -> FileDescriptor:
    """The descriptor of a file of gen/."""
    descriptor: FileDescriptor = importlib.import_module(f"kvbaton.v1.{name}_pb2").DESCRIPTOR
    return descriptor


def text_of(name: str) -> str:
    return (FOLDER / f"{name}.proto").read_text(encoding="utf-8")


def kind_of(field: descriptor_pb2.FieldDescriptorProto) -> str:
    return TYPES.get(field.type) or field.type_name.rpartition(".")[2]


def described_by_descriptor(name: str) -> Described:
    """Every message, field, enum value and method, each as a tuple of names, types and numbers."""
    proto = descriptor_pb2.FileDescriptorProto()
    committed(name).CopyToProto(proto)
    found: Described = set()
    for message in proto.message_type:
        maps = {entry.name: entry for entry in message.nested_type}
        assert all(entry.options.map_entry for entry in maps.values()), "the parser here knows no nested messages"
        assert not message.enum_type, "the parser here knows no nested enums"
        found.add(("message", message.name))
        for field in message.field:
            repeated = field.label == field.LABEL_REPEATED
            label = "repeated" if repeated else "optional" if field.proto3_optional else ""
            kind = kind_of(field)
            if kind in maps:
                label, kind = "", f"map<{', '.join(kind_of(part) for part in maps[kind].field)}>"
            union = (
                ""
                if field.proto3_optional or not field.HasField("oneof_index")
                else (message.oneof_decl[field.oneof_index].name)
            )
            found.add(("field", message.name, union, label, kind, field.name, str(field.number)))
    for enum in proto.enum_type:
        found |= {("value", enum.name, value.name, str(value.number)) for value in enum.value}
    for service in proto.service:
        for method in service.method:
            streams = (str(method.client_streaming), str(method.server_streaming))
            ends = (method.input_type.rpartition(".")[2], method.output_type.rpartition(".")[2])
            found.add(("rpc", service.name, method.name, *ends, *streams))
    return found


FIELD = re.compile(r"(?:(repeated|optional) )?([\w.]+|map<\w+, \w+>) (\w+) = (\d+);")
VALUE = re.compile(r"(\w+) = (\d+);")
RPC = re.compile(r"rpc (\w+)\((stream )?(\w+)\) returns \((stream )?(\w+)\);")
BLOCK = re.compile(r"(message|enum|service|oneof) (\w+) \{(\})?")


def described_by_text(text: str) -> Described:
    """The same, read from a .proto: one declaration a line, blocks of braces."""
    found: Described = set()
    blocks: list[tuple[str, str]] = []
    for raw in text.splitlines():
        line = raw.partition("//")[0].strip()
        if not line or line.startswith(("syntax ", "package ", "import ")):
            continue
        if opened := BLOCK.fullmatch(line):
            kind, name, closed = opened.groups()
            if kind == "message":
                found.add((kind, name))
            if not closed:
                blocks.append((kind, name))
        elif line == "}":
            blocks.pop()
        elif blocks[-1][0] == "enum" and (value := VALUE.fullmatch(line)):
            found.add(("value", blocks[-1][1], *value.groups()))
        elif blocks[-1][0] == "service" and (rpc := RPC.fullmatch(line)):
            method, up, request, down, response = rpc.groups()
            found.add(("rpc", blocks[-1][1], method, request, response, str(bool(up)), str(bool(down))))
        elif blocks[-1][0] in ("message", "oneof") and (field := FIELD.fullmatch(line)):
            union = blocks[-1][1] if blocks[-1][0] == "oneof" else ""
            message = blocks[-2][1] if union else blocks[-1][1]
            found.add(("field", message, union, field[1] or "", field[2], field[3], field[4]))
        else:
            raise AssertionError(f"not understood: {line}")
    return found


def declarations(text: str, pattern: str) -> Iterator[tuple[str, str]]:
    """Each line that matches, with the comment directly above it."""
    comment: list[str] = []
    for raw in text.splitlines():
        line = raw.strip()
        if line.startswith("//"):
            comment.append(line.removeprefix("//").strip())
            continue
        if re.match(pattern, line):
            yield line, " ".join(comment)
        comment = []


@pytest.mark.parametrize("name", FILES)
def test_the_committed_stubs_are_the_texts(name: str) -> None:
    assert described_by_descriptor(name) == described_by_text(text_of(name))


def test_no_stub_is_left_of_a_file_that_has_gone() -> None:
    folder = ROOT / "gen" / "kvbaton" / "v1"
    assert sorted(path.name.removesuffix("_pb2.py") for path in folder.glob("*_pb2.py")) == FILES
    assert sorted(path.name.removesuffix("_pb2_grpc.py") for path in folder.glob("*_pb2_grpc.py")) == FILES


def test_the_parser_sees_what_differs() -> None:
    text = text_of("kv_transfer")
    changes = [
        ("bytes digest = 4;", "bytes digest = 5;"),
        ("bytes digest = 4;", "string digest = 4;"),
        ("bytes digest = 4;", ""),
        ("repeated string transports", "string transports"),
        ("(stream TransferRequest)", "(TransferRequest)"),
        ("message KvReady {", "message KvReadied {"),
    ]
    for old, new in changes:
        assert old in text
        assert described_by_text(text.replace(old, new)) != described_by_descriptor("kv_transfer")


def test_compiling_again_gives_the_committed_descriptors(tmp_path: Path) -> None:
    protoc = pytest.importorskip("grpc_tools.protoc", reason="grpcio-tools is installed by `make protos` only")
    out = tmp_path / "all.bin"
    files = [f"kvbaton/v1/{name}.proto" for name in FILES]
    assert protoc.main(["protoc", f"-I{ROOT / 'protos'}", f"--descriptor_set_out={out}", *files]) == 0
    compiled = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    for file in compiled.file:
        proto = descriptor_pb2.FileDescriptorProto()
        committed(Path(file.name).stem).CopyToProto(proto)
        for either in (file, proto):
            for message in either.message_type:
                for field in message.field:
                    field.ClearField("json_name")
        assert proto == file


@pytest.mark.parametrize("name", FILES)
def test_names_keep_the_house_s_rules(name: str) -> None:
    file = committed(name)
    assert file.package == "kvbaton.v1"
    assert file.name == f"kvbaton/v1/{name}.proto"
    for service in file.services_by_name.values():
        assert service.name.endswith("Service")
        for method in service.methods:
            assert method.input_type.name == f"{method.name}Request"
            assert method.output_type.name == SHARED_RESPONSES.get(method.name, f"{method.name}Response")
    for enum in file.enum_types_by_name.values():
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper()
        assert enum.values_by_number[0].name == f"{prefix}_UNSPECIFIED"
        assert all(value.name.startswith(f"{prefix}_") for value in enum.values)
    for message in file.message_types_by_name.values():
        assert re.fullmatch(r"([A-Z][a-z0-9]*)+", message.name)
        assert all(re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", field.name) for field in message.fields)


@pytest.mark.parametrize("name", FILES)
def test_every_method_says_how_it_fails_or_that_it_may_be_retried(name: str) -> None:
    for line, comment in declarations(text_of(name), r"rpc "):
        assert "Fails with" in comment or "Safe to retry" in comment, line


@pytest.mark.parametrize("name", FILES)
def test_bytes_say_what_they_are(name: str) -> None:
    for line, comment in declarations(text_of(name), r"(repeated |optional )?bytes "):
        assert "opaque" in comment or "little-endian" in comment, line


def test_there_is_something_to_check() -> None:
    texts = "\n".join(text_of(name) for name in FILES)
    assert (
        len(list(declarations(texts, r"rpc ")))
        == sum(len(s.methods) for f in FILES for s in committed(f).services_by_name.values())
        >= 9
    )
    assert len(list(declarations(texts, r"bytes "))) >= 7
