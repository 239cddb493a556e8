"""Renders the chart of deploy/chart with Go's own template engine, compiled to WebAssembly, in place of Helm.

    python -m tools.chart install                                  installs the engine into .tools/, from npm
    python -m tools.chart deploy/kubernetes/values.yaml > FILE     renders the chart with these values

The chart uses only functions of Go's templates, so Helm renders the same.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CHART = ROOT / "deploy" / "chart"
PACKAGE, VERSION = "@evertdespiegeleer/go-template", "1.0.2"
FOLDER = ROOT / ".tools" / f"go-template-{VERSION}"
_SCRIPT = """
import { readFileSync } from "node:fs"
const { parse } = await import(process.argv[1])
const { template, values } = JSON.parse(readFileSync(0, "utf8"))
process.stdout.write(await parse(template, values), () => process.exit())
"""


def is_installed() -> bool:
    """Whether charts can be rendered here."""
    return shutil.which("node") is not None and _entry().is_file()


def install() -> str:
    """Installs the engine. Returns why that is impossible, or ""."""
    if is_installed():
        return ""
    if shutil.which("npm") is None:
        return "npm (Node.js) is not installed"
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = ["npm", "install", "--prefix", str(FOLDER), "--no-save", "--no-package-lock", "--ignore-scripts"]
    run = subprocess.run([*command, "--loglevel=error", f"{PACKAGE}@{VERSION}"])
    return "" if run.returncode == 0 else f"npm could not install {PACKAGE}@{VERSION}"


def render(values: Mapping[str, Any], managed_by: str = "Helm", release: str = "loraf") -> str:
    """Returns the manifests as YAML documents.

    Args:
        values: override those of the chart's values.yaml.
        managed_by: the program that will apply the manifests.
    """
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    context = {
        "Values": _merged(yaml.safe_load((CHART / "values.yaml").read_text()), values),
        "Release": {"Name": release, "Namespace": "default", "Service": managed_by},
        "Chart": {"Name": chart["name"], "Version": chart["version"], "AppVersion": chart["appVersion"]},
    }
    templates = CHART / "templates"
    helpers = (templates / "_helpers.tpl").read_text()
    files = [file.read_text() for file in sorted(templates.glob("*.yaml"))]
    documents = _render(helpers + "\n---\n".join(files), context).split("\n---\n")
    return "".join(f"---\n{document.strip()}\n" for document in documents if document.strip())


def _render(template: str, context: Mapping[str, Any]) -> str:
    command = ["node", "--input-type=module", "--eval", _SCRIPT, _entry().as_uri()]
    data = json.dumps({"template": template, "values": context})
    run = subprocess.run(command, input=data, capture_output=True, text=True, timeout=60)
    if run.returncode:
        raise ValueError(f"the template cannot be rendered:\n{run.stderr}")
    return run.stdout


def _merged(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(defaults)
    for name, value in values.items():
        before = merged.get(name)
        is_nested = isinstance(before, dict) and before and isinstance(value, dict)
        merged[name] = _merged(before, value) if isinstance(before, dict) and is_nested else value
    return merged


def _entry() -> Path:
    return FOLDER / "node_modules" / PACKAGE / "dist" / "main.js"


def main(arguments: list[str]) -> int:
    problem = install()
    if problem:
        print(f"chart: skipped, it was not rendered: {problem}", file=sys.stderr)
        return 0 if arguments == ["install"] else 1
    if arguments != ["install"]:
        print(f"# Made from deploy/chart: python -m tools.chart {arguments[0]}")
        print(render(yaml.safe_load(Path(arguments[0]).read_text()), "kubectl"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
