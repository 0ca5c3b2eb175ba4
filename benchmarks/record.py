"""Where a figure comes from, and the files that hold the figures."""

import datetime
import json
import re
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]


def provenance() -> dict[str, Any]:
    """Machine, versions and commit of what is about to be measured, in values that JSON can hold."""
    import torch

    import fastres
    from fastres.evaluate.machine import machine

    about = machine()
    build = fastres.build_info()
    onednn = re.search(r"MKL-DNN v([\w.]+)", torch.__config__.show())
    return {
        "machine": {
            "cpu": about["cpu"], "cores": about["cores"], "threads": about["threads"], "isa": build["isa"],
            "cpu_capability": torch.backends.cpu.get_cpu_capability(), "gpu": about["gpu"],
        },
        "versions": {
            "fastres": fastres.__version__, "torch": torch.__version__, "python": about["python"],
            "onednn": onednn.group(1) if onednn else None, "compiler": build["compiler"],
        },
        "commit": commit(),
    }  # fmt: skip


def commit() -> str | None:
    """The git commit, with ``+`` when files differ from it; None outside a repository or before its first commit."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    # Results of an earlier benchmark are no change of what is measured.
    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md", ":!docs/images")
    return f"{head}{'+' if changed else ''}" if head else None


def save(rows: list[Row], settings: dict[str, Any]) -> list[Path]:
    """Writes ``results/<suite>.json``; rows of other cases stay if they come from the same machine and versions."""
    about = provenance()
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    written = []
    for suite in sorted({row["suite"] for row in rows}):
        path = RESULTS / f"{suite}.json"
        new = [
            {**{k: v for k, v in row.items() if k != "suite"}, "commit": about["commit"], "date": date, **settings}
            for row in rows
            if row["suite"] == suite
        ]
        measured = {row["case"] for row in new}
        old = json.loads(path.read_text()) if path.exists() else {}
        same = all(old.get(key) == about[key] for key in ("machine", "versions"))
        kept = [row for row in old.get("rows", []) if row["case"] not in measured] if same else []
        content = {"machine": about["machine"], "versions": about["versions"], "rows": sorted(kept + new, key=order)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
        written.append(path)
    return written


def order(row: Row) -> tuple[Any, ...]:
    """Numbers inside names sort as numbers: resnet18 before resnet101."""
    parts = re.split(r"(\d+)", f"{row['case']} {row.get('baseline', '')}")
    return tuple(int(p) if p.isdigit() else p for p in parts)


def load(suite: str) -> dict[str, Any] | None:
    """The stored results of one suite, or None."""
    path = RESULTS / f"{suite}.json"
    return json.loads(path.read_text()) if path.exists() else None
