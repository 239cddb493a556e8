"""What pyproject.toml cannot say: gRPC stubs are generated, and C++ libraries compiled, when the package is built.

The libraries are plain shared objects, called through ctypes: no Python header and no torch header is needed, and one
build serves every Python. They are optional: without a compiler the package is installed without them, and says so.
CXX chooses the compiler (c++, g++ or clang++ otherwise).
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PROTO = ROOT / "proto" / "loraf" / "v1"

FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"]


@dataclass(frozen=True)
class Library:
    """Attributes:
    folder: all its *.cpp are compiled and linked.
    wished: flags for compiling and linking, each used if the compiler knows it.
    variants: file → name → flags: the file is compiled once for each, with LORAF_VARIANT=name. The other files
        are told by a LORAF_WITH_name which of them there are.
    """

    folder: str
    wished: tuple[str, ...] = ()
    variants: tuple[tuple[str, tuple[tuple[str, list[str]], ...]], ...] = ()


VARIANTS = (
    ("plain", []),
    *(
        (
            ("avx2", ["-mavx2", "-mfma", "-mf16c"]),
            ("avx512", AVX512),
            ("avx512bf16", [*AVX512, "-mavx512bf16"]),
        )
        if X86
        else ()
    ),
)

LIBRARIES = {
    "loraf._native": Library("loraf/csrc"),
    "loraf_serve.kernels._cpu": Library("loraf_serve/kernels/csrc", ("-fopenmp",), (("delta.cpp", VARIANTS),)),
}


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


class CannotBuild(Exception):
    pass


class BuildLibraries(build_ext):
    """Compiles each library; one that fails is left out with one line."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"  # no tag of a Python: no Python is linked

    def run(self):
        self.failed = []
        super().run()
        if self.inplace:  # no library of older sources stays beside the package
            for extension in self.failed:
                (ROOT / self.get_ext_filename(extension.name)).unlink(missing_ok=True)

    def build_extensions(self):
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            try:
                compile_library(LIBRARIES[extension.name], target)
            except CannotBuild as error:
                self.failed.append(extension)
                target.unlink(missing_ok=True)
                message = f"{extension.name} was not compiled, so slower ways without it are taken: {error}"
                print(f"loraf: WARNING: {message}", file=sys.stderr)


def compile_library(library: Library, target: Path) -> None:
    """Raises CannotBuild with what the compiler said."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise CannotBuild("no C++ compiler (c++, g++, clang++) was found; CXX names another one")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = [*FLAGS, *(flag for flag in library.wished if accepts(compiler, [flag], folder))]
        variants = {
            file: [(name, more) for name, more in several if accepts(compiler, more, folder)]
            for file, several in library.variants
        }
        present = [f"-DLORAF_WITH_{name}" for several in variants.values() for name, _ in several]
        units = []
        for source in sorted((ROOT / library.folder).glob("*.cpp")):
            if source.name in variants:
                units += [(source, [f"-DLORAF_VARIANT={name}", *more]) for name, more in variants[source.name]]
            else:
                units.append((source, present))
        objects = [folder / f"{i}.o" for i in range(len(units))]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [
                pool.submit(call, [*compiler.split(), *flags, *more, "-c", str(source), "-o", str(out)])
                for (source, more), out in zip(units, objects, strict=True)
            ]
            for job in jobs:
                job.result()
        built = folder / target.name
        call([*compiler.split(), *flags, "-shared", *map(str, objects), "-o", str(built)])
        target.parent.mkdir(parents=True, exist_ok=True)
        # Another name first: a process that has the old file mapped keeps it whole.
        fresh = target.with_name(f".{target.name}.new")
        shutil.copy(built, fresh)
        fresh.replace(target)


def accepts(compiler: str, flags: list[str], folder: Path) -> bool:
    """Whether a program of one function compiles and links with the flags."""
    probe = folder / "probe.cpp"
    probe.write_text("int probe() { return 0; }\n", encoding="utf-8")
    try:
        call([*compiler.split(), *FLAGS, *flags, "-shared", str(probe), "-o", str(folder / "probe.so")])
    except CannotBuild:
        return False
    return True


def call(command: list[str]) -> None:
    try:
        run = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CannotBuild(f"{command[0]}: {error.strerror}") from error
    if run.returncode != 0:
        lines = [line for line in run.stderr.splitlines() if "error" in line] or run.stderr.splitlines()
        raise CannotBuild(f"{command[0]} ended with {run.returncode}: {(lines or ['no message'])[0]}")


def extension(name: str, library: Library) -> Extension:
    files = sorted((ROOT / library.folder).iterdir()) if (ROOT / library.folder).is_dir() else []
    sources = [str(file.relative_to(ROOT)) for file in files if file.suffix == ".cpp"]
    headers = [str(file.relative_to(ROOT)) for file in files if file.suffix == ".h"]
    return Extension(name, sources, depends=headers, optional=True)


setup(
    cmdclass={"build_py": BuildWithStubs, "build_ext": BuildLibraries},
    ext_modules=[e for e in (extension(*item) for item in LIBRARIES.items()) if e.sources],
)
