"""What the built libraries and the build files may and may not contain."""

import ast
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import require_program, run_python

import fastres
from fastres import _library

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import check_wheel  # noqa: E402

PACKAGE = Path(_library.__file__).parent
LIBRARIES = [*PACKAGE.glob("_native*.so"), *PACKAGE.glob("_cuda.so")]
each_library = pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name.split(".")[0])


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@each_library
def test_what_a_library_asks_for_and_names(library):
    """Torch's stable C interface only, which ties it to no torch version; no library of CUDA; no folder of the builder."""
    assert not check_wheel.library_problems(library, own=(ROOT, Path(torch.__file__).parent, Path(sys.prefix)))


def test_what_a_library_may_not_ask_for_is_noticed(tmp_path):
    """A C++ name of torch, one of std that torch exports too, another library, the builder's folders."""
    (tmp_path / "torch.cpp").write_text('namespace c10 { void f() {} } extern "C" void torch_f() {}')
    (tmp_path / "ours.cpp").write_text(
        'namespace c10 { void f(); } extern "C" void torch_f(); namespace std { void of_torch(); }'
        "namespace fastres { void g() { c10::f(); torch_f(); std::of_torch(); } const char* h() { return __FILE__; } }"
    )
    other, library = tmp_path / "libother.so", tmp_path / "_cuda.so"
    compiler = require_program("c++")
    output(compiler, "-shared", "-fPIC", str(tmp_path / "torch.cpp"), "-o", str(other))
    output(
        compiler,
        "-shared",
        "-fPIC",
        str(tmp_path / "ours.cpp"),
        str(other),
        f"-Wl,-rpath,{tmp_path}",
        "-o",
        str(library),
    )
    found = "\n".join(check_wheel.library_problems(library, own=(tmp_path,)))
    for what in (
        "_ZN3c101fEv",
        "of_torch",
        "exports functions of fastres",
        f"needs the library {other}",
        "looks for libraries in",
    ):
        assert what in found
    assert f"names the folder {tmp_path}" in found and "torch_f" not in found


def test_a_wheel_without_its_parts_is_noticed(tmp_path):
    """The whole check runs on what `make wheel` makes."""
    wheel = tmp_path / "fastres.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fastres/__init__.py", "other")
        archive.writestr("fastres/gone.py", "")
        archive.writestr(
            "fastres/_build.json", '{"cuda": {"archs": ["80", "90-real"]}, "at": "/usr/local/someone/checkout"}'
        )
    found = check_wheel.wheel_problems(wheel)
    kernels = [p for p in (ROOT / "kernels").iterdir() if (p / "__init__.py").exists()]
    assert len(kernels) > 5 and all(f"there is no fastres/kernels/{p.name}/__init__.py" in found for p in kernels)
    for what in (
        "fastres/__init__.py is not that of the sources",
        "fastres/gone.py is not that of the sources",
        "there is not one fastres/_cuda.so",
        "there is no licence",
        "fastres/_build.json names the folder /usr/local/someone/checkout",
        "built for the architectures [80, 90], not for [80, 86, 89, 90, 100, 120]",
    ):
        assert what in found


def test_kernels_of_an_instruction_set_share_no_function(tmp_path):
    """The linker keeps one copy of a shared inline function: a CPU without AVX-512 could get that one."""
    compiler = require_program("c++")
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
    run_python(  # in a process of its own: other tests register these operators for CPU tensors
        """if True:
        import torch
        import fastres
        for op in ("scale_shift_act_cuda", "scale_shift_act_backward_cuda", "conv_forward_cuda", "conv_backward_cuda"):
            has = lambda key: torch._C._dispatch_has_kernel_for_dispatch_key(f"fastres::{op}", key)
            assert has("CUDA") and not has("CPU"), op
        """
    )


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
