"""What the built libraries and the build files may and may not contain."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import fastres
from fastres import _library

ROOT = Path(__file__).parent.parent
PACKAGE = Path(_library.__file__).parent
LIBRARIES = [*PACKAGE.glob("_native*.so"), *PACKAGE.glob("_cuda.so")]
each_library = pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name.split(".")[0])


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@each_library
def test_only_the_stable_c_interface_of_torch(library):
    """A C++ name of torch among the undefined symbols would tie the binary to one torch version."""
    symbols = output("nm", "-DC", "--undefined-only", str(library)).splitlines()
    names = [line.split(" U ", 1)[1] for line in symbols if " U " in line]
    assert not [n for n in names if re.search(r"\b(at|c10|torch|caffe2)::", n)]
    assert any(n.startswith(("aoti_torch_", "torch_")) for n in names)


@each_library
def test_what_it_is_linked_to(library):
    dynamic = output("readelf", "-d", str(library))
    needed = set(re.findall(r"NEEDED.*\[(.+?)\]", dynamic))
    allowed = {"libtorch_cpu.so", "libc10.so", "libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6"}
    assert not {n for n in needed - allowed if not n.startswith(("ld-linux", "libdl", "libpthread", "librt"))}
    assert re.findall(r"(?:RUNPATH|RPATH).*\[(.+?)\]", dynamic) == ["$ORIGIN/../torch/lib"]


@each_library
def test_no_folder_of_the_builder_is_inside(library):
    content = library.read_bytes()
    for folder in (str(ROOT), str(Path(torch.__file__).parent), sys.prefix):
        assert folder.encode() not in content


@each_library
def test_exports_only_the_module(library):
    """Everything else is hidden: two libraries with a function of one name must not get each other's."""
    defined = output("nm", "-DC", "--defined-only", str(library))
    assert not re.search(r"\bfastres::", defined)


def test_kernels_of_an_instruction_set_share_no_function(tmp_path):
    """The linker keeps one copy of a shared inline function: a CPU without AVX-512 could get that one."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    assert compiler, "no C++ compiler"
    source, made = ROOT / "csrc" / "native" / "kernels.cpp", tmp_path / "kernels.o"
    # -O0 inlines nothing that isn't forced: whatever could be shared shows up.
    output(compiler, "-std=c++20", "-O0", "-Wno-psabi", "-DFASTRES_ISA=probe", "-c", str(source), "-o", str(made))
    symbols = output("nm", "-C", "--defined-only", str(made)).splitlines()
    weak = [line for line in symbols if re.search(r" [WVu] ", line)]
    assert weak and not [line for line in weak if "fastres::probe" not in line]


def test_build_info():
    info = fastres.build_info()
    assert info["version"] == fastres.__version__ and info["torch_running"] == torch.__version__
    assert info["native"] == (info["native_error"] is None) and info["cuda"] == (info["cuda_error"] is None)
    assert list(info) == [
        *("version", "native", "native_error", "cuda", "cuda_error", "isa", "isa_supported", "compiler"),
        *(
            "build_type",
            "torch_built_with",
            "torch_running",
            "cuda_archs",
            "cuda_compiler",
            "cuda_toolkit",
            "cuda_running",
        ),
    ]
    if info["native"]:
        assert info["isa"] in info["isa_supported"] and info["isa_supported"][0] == "baseline"
        assert info["build_type"] == "Release" and re.match(r"2\.\d+", info["torch_built_with"])
        assert re.match(r"(GNU|Clang) \d+", info["compiler"])
    else:
        assert "not installed" in info["native_error"] or "FASTRES_ISA" in info["native_error"]
    json.dumps(info)


def test_the_cuda_library_loads_without_a_gpu():
    if not any(p.name == "_cuda.so" for p in LIBRARIES):
        pytest.skip(str(_library.cuda_error()))
    assert _library.cuda_error() is None
    for op in ("scale_shift_act_cuda", "scale_shift_act_backward_cuda", "conv_forward_cuda", "conv_backward_cuda"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastres::{op}", "CUDA")
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastres::{op}", "CPU")


def test_kernels_include_no_torch_header():
    sources = [p for p in (ROOT / "kernels").rglob("*") if p.suffix in (".h", ".cuh")]
    assert sources
    for source in sources + list((ROOT / "csrc").rglob("*.cu")):
        includes = re.findall(r"#include\s*[<\"](.+?)[>\"]", source.read_text())
        assert not [i for i in includes if re.match(r"(torch|ATen|c10|pybind11|Python)", i)], source


def test_setup_never_imports_torch():
    for file in (ROOT / "setup.py", ROOT / "build_backend" / "fastres_build.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not [a.name for a in node.names if a.name.split(".")[0] in ("torch", "fastres")]
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in ("torch", "fastres")


def test_torch_is_no_build_requirement_and_the_version_is_written_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert not [r for r in project["build-system"]["requires"] if r.startswith("torch")]
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]


def test_the_backend_finds_torch_in_the_environment_that_isolation_hides(tmp_path):
    """As in pip's isolated build: torch is not importable, but the interpreter is the environment's."""
    code = f"""
import sys
sys.path[:] = [p for p in sys.path if "site-packages" not in p]
sys.modules["setuptools"] = type(sys)("setuptools")
class Meta:
    def __getattr__(self, name): return lambda *a: []
sys.modules["setuptools"].build_meta = Meta()
sys.path.insert(0, {str(ROOT / "build_backend")!r})
import fastres_build
print(fastres_build.find_torch())
print(fastres_build.get_requires_for_build_wheel())
"""
    folder, requirements = output(sys.executable, "-S", "-c", code).splitlines()
    assert Path(folder) == Path(torch.__file__).parent and requirements == "[]"
