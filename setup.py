"""The parts of the build that pyproject.toml cannot express: generated gRPC stubs and compiled C++ libraries.

The libraries are plain shared objects, called through ctypes. They use neither Python's headers nor torch's, so one
build serves every Python version. They are optional: if a library cannot be compiled, the build prints a warning and
leaves it out. CXX selects the compiler (default: c++, g++ or clang++).
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
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# Folder of .proto files → folder of the package that gets their stubs. vLLM's contract keeps clear of the module vllm.
STUBS = {ROOT / "proto" / "loraf" / "v1": "loraf_serve/v1", ROOT / "proto" / "vllm": "loraf_serve/vllm_proto"}

FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"]


@dataclass(frozen=True)
class CompiledLibrary:
    """A shared library and how it is compiled.

    Attributes:
        folder: every *.cpp in it is compiled and linked.
        optional_flags: flags for compiling and linking; each is used if the compiler accepts it.
        variants: pairs of a file and its (name, flags) pairs. The file is compiled once per name, with
            LORAF_VARIANT=name. The other files see LORAF_WITH_name for each variant that was compiled.
    """

    folder: str
    optional_flags: tuple[str, ...] = ()
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
    "loraf.matrices._native": CompiledLibrary("loraf/matrices/csrc"),
    "loraf_serve.kernels._cpu": CompiledLibrary("loraf_serve/kernels/csrc", ("-fopenmp",), (("delta.cpp", VARIANTS),)),
}


class BuildWithStubs(build_py):
    """Adds the gRPC stubs: to the build, or to the source tree for an editable installation."""

    def run(self):
        super().run()
        generate_stubs(ROOT if self.editable_mode else Path(self.build_lib))


class BuildLibraries(build_ext):
    """Compiles each library. One that fails is left out with a warning and listed in `failed`."""

    def initialize_options(self):
        super().initialize_options()
        self.failed = []

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"  # no Python version in the name: no Python is linked

    def run(self):
        super().run()
        if self.inplace:  # do not leave a library of older sources behind
            for extension in self.failed:
                (ROOT / self.get_ext_filename(extension.name)).unlink(missing_ok=True)

    def build_extensions(self):
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            try:
                compile_library(LIBRARIES[extension.name], target)
            except BuildError as error:
                self.failed.append(extension)
                target.unlink(missing_ok=True)
                message = f"{extension.name} was not compiled, a slower implementation is used instead: {error}"
                print(f"loraf: WARNING: {message}", file=sys.stderr)


class TaggedWheel(bdist_wheel):
    """Tags the wheel with what it requires: Python 3, and the platform if it contains a compiled library."""

    def get_tag(self):
        build_libraries = self.get_finalized_command("build_ext")
        self.root_is_pure = len(build_libraries.failed) == len(self.distribution.ext_modules or [])
        _, _, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


class BuildError(Exception):
    """A compiler is missing, or it failed."""


def generate_stubs(target: Path) -> None:
    """Writes the stubs of the gRPC services below `target`, into the packages that STUBS names."""
    import grpc_tools
    from grpc_tools import protoc

    # The mapping of a folder makes its stubs import each other from the package.
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    for folder, package in STUBS.items():
        arguments = [
            "protoc",
            f"-I{package}={folder}",
            f"-I{well_known}",
            f"--python_out={target}",
            f"--pyi_out={target}",
            f"--grpc_python_out={target}",
            *(f"{package}/{file.name}" for file in sorted(folder.glob("*.proto"))),
        ]
        if protoc.main(arguments) != 0:
            raise SystemExit("protoc could not generate the gRPC stubs")


def compile_library(library: CompiledLibrary, target: Path) -> None:
    """Compiles and links a library.

    Raises:
        BuildError: with the compiler's first error.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise BuildError("no C++ compiler (c++, g++, clang++) was found; set CXX to use another one")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = [*FLAGS, *(flag for flag in library.optional_flags if accepts(compiler, [flag], folder))]
        variants = {
            file: [(name, more) for name, more in named_flags if accepts(compiler, more, folder)]
            for file, named_flags in library.variants
        }
        present = [f"-DLORAF_WITH_{name}" for named_flags in variants.values() for name, _ in named_flags]
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
        linked = folder / target.name
        call([*compiler.split(), *flags, "-shared", *map(str, objects), "-o", str(linked)])
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a process that has mapped the old file keeps it.
        temporary = target.with_name(f".{target.name}.new")
        shutil.copy(linked, temporary)
        temporary.replace(target)


def accepts(compiler: str, flags: list[str], folder: Path) -> bool:
    """Whether a one-function program compiles and links with the flags."""
    probe = folder / "probe.cpp"
    probe.write_text("int probe() { return 0; }\n", encoding="utf-8")
    try:
        call([*compiler.split(), *FLAGS, *flags, "-shared", str(probe), "-o", str(folder / "probe.so")])
    except BuildError:
        return False
    return True


def call(command: list[str]) -> None:
    """Runs a compiler. Raises BuildError if it cannot be started or fails."""
    try:
        process = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error.strerror}") from error
    if process.returncode != 0:
        lines = [line for line in process.stderr.splitlines() if "error" in line] or process.stderr.splitlines()
        raise BuildError(f"{command[0]} exited with {process.returncode}: {(lines or ['no message'])[0]}")


def extension(name: str, library: CompiledLibrary) -> Extension:
    """The library as setuptools sees it: its sources and headers."""
    files = sorted((ROOT / library.folder).iterdir()) if (ROOT / library.folder).is_dir() else []
    sources = [str(file.relative_to(ROOT)) for file in files if file.suffix == ".cpp"]
    headers = [str(file.relative_to(ROOT)) for file in files if file.suffix == ".h"]
    return Extension(name, sources, depends=headers, optional=True)


setup(
    cmdclass={"build_py": BuildWithStubs, "build_ext": BuildLibraries, "bdist_wheel": TaggedWheel},
    ext_modules=[e for e in (extension(*item) for item in LIBRARIES.items()) if e.sources],
)
