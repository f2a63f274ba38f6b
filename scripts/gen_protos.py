"""Regenerate the committed stubs under gen/ from protos/ (`make protos`).

Generated code must not be newer than the runtime that loads it, so the compiler is pinned to one whose output runs on
protobuf 6.31.1 and later; it lives in an environment of its own, made by the Makefile.
"""

import pathlib
import sys

import grpc_tools
from grpc_tools import protoc

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> int:
    """Compile every proto; return protoc's exit status."""
    out = ROOT / "gen"
    protos = sorted(str(path.relative_to(ROOT / "protos")) for path in (ROOT / "protos").rglob("*.proto"))
    include = str(pathlib.Path(grpc_tools.__file__).parent / "_proto")
    status: int = protoc.main(
        [
            "protoc",
            f"-I{ROOT / 'protos'}",
            f"-I{include}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_grpc_out={out}",
            *protos,
        ]
    )
    (out / "kvbaton" / "v1" / "py.typed").touch()
    (out / "kvbaton" / "v1" / "__init__.py").touch()
    return status


if __name__ == "__main__":
    sys.exit(main())
