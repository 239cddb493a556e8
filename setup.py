"""Generates the gRPC stubs of proto/loraf/v1 into loraf_serve/v1 at build time; all else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PROTO = ROOT / "proto" / "loraf" / "v1"


class BuildWithStubs(build_py):
    def run(self):
        from grpc_tools import protoc

        # protoc maps the folder, so that the stubs import each other as loraf_serve.v1.
        arguments = [
            "protoc",
            f"-Iloraf_serve/v1={PROTO}",
            f"--python_out={ROOT}",
            f"--pyi_out={ROOT}",
            f"--grpc_python_out={ROOT}",
            *(f"loraf_serve/v1/{file.name}" for file in sorted(PROTO.glob("*.proto"))),
        ]
        if protoc.main(arguments) != 0:
            raise SystemExit("protoc could not generate the gRPC stubs")
        super().run()


setup(cmdclass={"build_py": BuildWithStubs})
