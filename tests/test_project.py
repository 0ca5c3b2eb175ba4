"""The project's own habits: short files, figures that nobody typed, a current changelog, live links."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastres
from fastres.ops.schemas import OPS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
TEXT = {
    ".py",
    ".cpp",
    ".h",
    ".cu",
    ".cuh",
    ".cmake",
    ".md",
    ".toml",
    ".yaml",
    ".yml",
    ".json",
    ".txt",
    ".html",
    ".svg",
    "",
}
# Folders of one person's machine have no place in a project that others install.
PRIVATE = re.compile(r"(?<![\w.~$})])/(?:home|root|Users|work|opt|mnt)/\w")


def project_files() -> list[Path]:
    """What the repository holds or would hold: neither ignored files nor links."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode:
        pytest.skip("this is not a git repository")
    paths = [ROOT / name for name in listing.stdout.splitlines()]
    return [p for p in paths if p.is_file() and not p.is_symlink()]


def test_no_file_is_longer_than_the_limit():
    from check_lines import sources, too_long

    files = list(sources())
    assert len(files) > 50
    assert not too_long(files)


def test_the_line_limit_finds_a_long_file(tmp_path):
    from check_lines import too_long

    short, long = tmp_path / "short.py", tmp_path / "long.py"
    short.write_text("x\n" * 400)
    long.write_text("x\n" * 401)
    assert [p for p in too_long([short, long]) if "long.py: 401 lines" in p] == too_long([short, long]) != []


def run_report(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.report", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_readme_figures_equal_the_stored_results():
    done = run_report("--check")
    assert done.returncode == 0, done.stderr


def test_a_typed_figure_is_noticed():
    sys.path.insert(0, str(ROOT))
    from benchmarks import report

    text = f"a {report.BEGIN} typed {report.END} b"
    assert report.with_figures(text, "1.00") == f"a {report.BEGIN}\n1.00\n{report.END} b"
    with pytest.raises(ValueError, match="once each"):
        report.with_figures("no markers", "1.00")


def test_changelog_has_the_current_version():
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased"
    assert fastres.__version__ in headings


def test_no_private_folder_is_named():
    found = []
    for path in project_files():
        if path.suffix in TEXT and path != Path(__file__).resolve():
            lines = path.read_text(errors="replace").splitlines()
            found += [
                f"{path.relative_to(ROOT)}:{i}: {line.strip()}"
                for i, line in enumerate(lines, 1)
                if PRIVATE.search(line)
            ]
    assert not found


def test_nothing_large_or_built_is_in_the_repository():
    files = project_files()
    assert not [p for p in files if p.suffix in {".so", ".o", ".whl", ".pt", ".pth", ".onnx"}]
    assert not [p for p in files if p.stat().st_size > 1_000_000]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs", "benchmarks/README.md"])
def test_links_lead_somewhere(document):
    start = ROOT / document
    for page in sorted(start.glob("*.md")) if start.is_dir() else [start]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), f"{page.name} links to {link}"


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_in_all_its_places(op):
    reference = ROOT / "kernels" / op / "reference.py"
    assert len(reference.read_text().splitlines()) <= 60
    assert f'"{op}"' in (ROOT / "benchmarks" / "test_ops_speed.py").read_text()
    if "native" in OPS[op].backends:
        own = (ROOT / "kernels" / op / f"cpu_{op}.h").is_file() and (ROOT / "csrc" / "native" / f"{op}.cpp").is_file()
        assert own or (ROOT / "kernels" / op / "native.py").is_file(), (
            "or it is put together from the convolution engine"
        )
    if "triton" in OPS[op].backends:
        assert (ROOT / "kernels" / op / "triton_backend.py").is_file()
    if "cuda" in OPS[op].backends:
        own = (ROOT / "kernels" / op / "cuda_kernel.cuh").is_file() and (ROOT / "csrc" / "cuda" / f"{op}.cu").is_file()
        assert own or (ROOT / "kernels" / op / "cuda_backend.py").is_file(), "or it is put together from kernels/conv"
