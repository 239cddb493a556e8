"""The dashboard and the alert rules use metrics that the server has, with labels that they have; Prometheus' own tool
accepts the rules, and each alert is raised when it should be."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest
import yaml
from prometheus_client import REGISTRY

from loraf_serve.observe.metrics import FAMILIES
from tests.docs.pages import ROOT, anchors, read
from tests.tools import needs

PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text())
RULES = [
    rule for group in yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]
PAGE = ROOT / "docs" / "how-to" / "watch-a-server.md"

# Given by Prometheus, or by its configuration.
SCRAPED = {"instance", "job"}
OTHER_METRICS = {"up": set(), **{rule["record"]: {"code"} for rule in RULES if "record" in rule}}
_SELECTOR = re.compile(r"\b(up|(?:loraf|vllm|process)[a-z0-9_:]+)(?:\s*\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"')
_GROUPING = re.compile(r"\b(?:by|on)\s*\(([^)]*)\)")


def panels() -> Iterator[dict]:
    for panel in DASHBOARD["panels"]:
        yield panel
        yield from panel.get("panels", ())


EXPRESSIONS = [(rule.get("alert", rule.get("record")), rule["expr"]) for rule in RULES] + [
    (panel["title"], target["expr"]) for panel in panels() for target in panel.get("targets", ())
]


@pytest.fixture(scope="module")
def labels_of() -> dict[str, set[str]]:
    """Labels of every time series that a server can have, vLLM's too."""
    known = dict(OTHER_METRICS)
    for family in FAMILIES.values():
        known[family.name] = set(family.labels)
        for suffix in ("_bucket", "_sum", "_count") if family.kind == "histogram" else ():
            known[family.name + suffix] = set(family.labels) | ({"le"} if suffix == "_bucket" else set())
    for family in REGISTRY.collect():
        for sample in family.samples:
            known[sample.name] = set(sample.labels)
    return known


@pytest.fixture(scope="module", autouse=True)
def engine_metrics():
    if not any("vllm:" in expression for _, expression in EXPRESSIONS):
        yield
        return
    pytest.importorskip("vllm", reason=needs("vLLM"))
    from vllm.usage.usage_lib import UsageContext

    from loraf_serve.vllm.engine.arguments import resident_args
    from loraf_serve.vllm.engine.metrics import EngineMetrics
    from tests.loraf_serve.harness import model_folder
    from tests.loraf_serve.vllm_engines import COMMON

    before = set(REGISTRY._collector_to_names)
    EngineMetrics(resident_args(model_folder(), COMMON).create_engine_config(UsageContext.ENGINE_CONTEXT))
    yield
    for collector in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(collector)


@pytest.mark.parametrize(("where", "expression"), EXPRESSIONS)
def test_every_metric_and_label_exists(where, expression, labels_of):
    selectors = _SELECTOR.findall(re.sub(r"\b(?:by|on) *\([^)]*\)", "", expression))
    assert selectors, "uses no metric"
    usable: set[str] = set(SCRAPED)
    for name, matchers in selectors:
        assert name in labels_of, f"{where}: the server has no metric {name}"
        usable |= labels_of[name]
        used = set(_MATCHER.findall(matchers))
        assert used <= labels_of[name] | SCRAPED, f"{where}: {name} has no label {used - labels_of[name]}"
    grouped = {label.strip() for labels in _GROUPING.findall(expression) for label in labels.split(",")}
    assert grouped <= usable, f"{where}: groups by {grouped - usable}"


def test_the_dashboard_is_one_that_grafana_takes():
    assert DASHBOARD["uid"] and DASHBOARD["title"] and DASHBOARD["schemaVersion"] >= 36
    numbers = [panel["id"] for panel in panels()]
    assert len(numbers) == len(set(numbers))
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {"datasource", "instance"}
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        if panel["type"] != "row":
            assert panel["description"] and panel["datasource"]["uid"] == "${datasource}"
            references = [target["refId"] for target in panel["targets"]]
            assert len(references) == len(set(references))
    # Every metric of the service that can change while it serves is on it.
    shown = " ".join(expression for _, expression in EXPRESSIONS)
    assert [name for name in FAMILIES if name not in shown] == []


def test_every_alert_says_what_to_do():
    for rule in RULES:
        if "alert" not in rule:
            continue
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert {"summary", "description", "runbook"} <= set(rule["annotations"])
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert ROOT / page == PAGE and anchor == rule["alert"].lower()
        assert anchor in anchors(read(PAGE)), f"the page does not say what to do about {rule['alert']}"


def test_promtool_accepts_the_rules_and_raises_the_alerts():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip(needs("promtool"))
    for command in (["check", "config", "prometheus.yaml"], ["test", "rules", "alerts_test.yaml"]):
        run = subprocess.run([promtool, *command], cwd=PROMETHEUS, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
    tested = (PROMETHEUS / "alerts_test.yaml").read_text()
    assert [rule["alert"] for rule in RULES if "alert" in rule and rule["alert"] not in tested] == []


def test_prometheus_understands_the_dashboard(tmp_path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip(needs("promtool"))
    queries = [
        target["expr"].replace("$__rate_interval", "5m") for panel in panels() for target in panel.get("targets", ())
    ]
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    run = subprocess.run([promtool, "check", "rules", "rules.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_page_explains_every_metric():
    text = read(PAGE)
    for family in FAMILIES.values():
        labels = ", ".join(f"`{label}`" for label in family.labels)
        assert f"| `{family.name}` | {family.kind} | {labels} | {family.help} |" in text
