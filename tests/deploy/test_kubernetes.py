"""The chart and the manifests: valid by Kubernetes' own schemas, and with options that the programs take."""

from __future__ import annotations

import re
import subprocess
from dataclasses import fields, replace
from functools import cache

import kubernetes_validate
import pytest
import yaml

from loraf_serve import cli, client_cli
from loraf_serve.service.server_options import ServerOptions
from tests.docs.pages import ROOT
from tests.tools import needs
from tools import chart

MANIFESTS = ROOT / "deploy" / "kubernetes"
KUBERNETES = "1.34"
SECRETS = {"tokens": {"secret": "my-tokens"}, "tls": {"secret": "my-tls"}}
VARIANTS = {
    "defaults": {},
    "secured": SECRETS,
    "monitored": {**SECRETS, "metrics": {"serviceMonitor": True, "tokenSecret": "my-token"}},
    "without metrics": {"metrics": {"enabled": False}},
    "with HTTP": {
        **SECRETS,
        "http": {"enabled": True, "allowedOrigins": ["https://app.example.org", "https://b:8443"]},
    },
    "with HTTP, open": {"http": {"enabled": True}},
    "on a GPU": {
        "model": "org/model",
        "adapters": ["prod=/adapters/ckpt@math+nlu", 'odd="name"'],
        "args": ["--max-model-len=4096"],
        "volumes": {"cache": "models", "adapters": "adapters"},
        "resources": {"limits": {"nvidia.com/gpu": 1}},
        "nodeSelector": {"gpu": "true"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    },
}


def rendered(name: str) -> dict[str, dict]:
    """Manifests by kind."""
    if not chart.is_installed():
        pytest.skip(needs("Go templates"))
    return {document["kind"]: document for document in yaml.safe_load_all(_rendered(name))}


@cache
def _rendered(name: str) -> str:
    return chart.render(VARIANTS[name])


def committed() -> dict[str, dict]:
    return {document["kind"]: document for document in yaml.safe_load_all((MANIFESTS / "loraf.yaml").read_text())}


def manifests(name: str) -> dict[str, dict]:
    return committed() if name == "committed" else rendered(name)


@pytest.fixture(params=["committed", *VARIANTS])
def by_kind(request) -> dict[str, dict]:
    return manifests(request.param)


def container(by_kind: dict[str, dict]) -> dict:
    [only] = by_kind["Deployment"]["spec"]["template"]["spec"]["containers"]
    return only


def test_kubernetes_takes_the_manifests(by_kind):
    assert {"Deployment", "Service"} <= by_kind.keys() <= {"Deployment", "Service", "ServiceMonitor"}
    for kind in ("Deployment", "Service"):
        kubernetes_validate.validate(by_kind[kind], KUBERNETES, strict=True)


def test_the_schemas_find_a_mistake():
    broken = committed()
    container(broken)["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken["Deployment"], KUBERNETES, strict=True)


def test_the_manifests_are_the_rendered_chart():
    if not chart.is_installed():
        pytest.skip(needs("Go templates"))
    values = yaml.safe_load((MANIFESTS / "values.yaml").read_text())
    _, _, text = (MANIFESTS / "loraf.yaml").read_text().partition("\n")
    assert text == chart.render(values, "kubectl"), "python -m tools.chart deploy/kubernetes/values.yaml"


def test_the_server_takes_its_arguments_and_drains_in_time(by_kind):
    arguments, others = cli.parser().parse_known_args(container(by_kind)["args"])
    assert [option for option in others if not option.startswith("--max-model-len")] == []
    pod = by_kind["Deployment"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= arguments.drain_delay + arguments.grace + 30
    ports = {port["name"]: port["containerPort"] for port in container(by_kind)["ports"]}
    assert ports["grpc"] == arguments.port and ports.get("metrics") == arguments.metrics_port
    assert ports.get("http") == arguments.http_port
    published = {port["name"]: port["targetPort"] for port in by_kind["Service"]["spec"]["ports"]}
    assert published == {name: name for name in ports}
    assert arguments.log_texts is False


def test_http_is_served_where_the_values_say_so():
    def options(name: str) -> ServerOptions:
        arguments, _ = cli.parser().parse_known_args(container(manifests(name))["args"])
        files = {"tls_cert": None, "tls_key": None, "insecure": True}  # they are not on this machine
        return replace(ServerOptions(**{f.name: getattr(arguments, f.name) for f in fields(ServerOptions)}), **files)

    assert options("defaults").http_port is None
    assert options("committed").http_port == options("with HTTP").http_port == 8000
    assert options("with HTTP, open").http_allowed_origin == []
    assert options("with HTTP").http_allowed_origin == ["https://app.example.org", "https://b:8443"]
    assert options("with HTTP").problems() == []
    exposed = set(map(int, dict(instructions())["EXPOSE"].split()))
    assert exposed == {port["containerPort"] for port in container(committed())["ports"]}


def test_every_probe_asks_for_health(by_kind):
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container(by_kind)[name]
        if "--insecure" in container(by_kind)["args"]:
            assert probe["grpc"] == {"port": 50051}
            continue
        program, *words = probe["exec"]["command"]
        arguments = client_cli.parser().parse_args(words)
        assert (program, arguments.command) == ("loraf-client", "health")
        assert arguments.timeout < probe["timeoutSeconds"]
        # By the name in the certificate, which leads to the pod itself.
        [alias] = by_kind["Deployment"]["spec"]["template"]["spec"]["hostAliases"]
        assert alias == {"ip": "127.0.0.1", "hostnames": [arguments.server.partition(":")[0]]}


def test_secrets_are_named_and_never_written(by_kind):
    pod = by_kind["Deployment"]["spec"]["template"]["spec"]
    mounts = {mount["name"]: mount for mount in container(by_kind)["volumeMounts"]}
    for volume in pod["volumes"]:
        if "secret" in volume:
            folder = mounts[volume["name"]]["mountPath"]
            assert mounts[volume["name"]]["readOnly"]
            assert any(f"={folder}/" in argument for argument in container(by_kind)["args"])
    assert "env" not in container(by_kind)


def test_the_pod_may_do_next_to_nothing(by_kind):
    pod = by_kind["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
    rights = container(by_kind)["securityContext"]
    assert rights["readOnlyRootFilesystem"] and rights["capabilities"] == {"drop": ["ALL"]}
    writable = {mount["mountPath"] for mount in container(by_kind)["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/cache", "/tmp", "/dev/shm"}


def test_values_reach_the_manifests_unchanged():
    by_kind = rendered("on a GPU")
    arguments, _ = cli.parser().parse_known_args(container(by_kind)["args"])
    assert (arguments.model, arguments.adapter) == ("org/model", VARIANTS["on a GPU"]["adapters"])
    pod = by_kind["Deployment"]["spec"]["template"]["spec"]
    assert pod["tolerations"] == VARIANTS["on a GPU"]["tolerations"] and pod["nodeSelector"] == {"gpu": "true"}
    assert container(by_kind)["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_monitor_uses_the_secrets():
    [endpoint] = rendered("monitored")["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["scheme"] == "https" and endpoint["tlsConfig"]["ca"]["secret"]["name"] == "my-tls"
    assert endpoint["authorization"]["credentials"] == {"name": "my-token", "key": "token"}


# --- the image


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / "deploy" / "Dockerfile").read_text(), flags=re.MULTILINE)
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def test_the_image_is_made_by_one_script_and_runs_as_the_manifests_say():
    steps = dict(instructions())
    assert [rest for word, rest in instructions() if word == "RUN"] == [
        '--mount=type=bind,target=/src /src/deploy/install.sh "$BUILD"'
    ]
    assert [word for word, _ in instructions() if word in ("COPY", "ADD")] == []
    security = committed()["Deployment"]["spec"]["template"]["spec"]["securityContext"]
    assert steps["USER"] == f"{security['runAsUser']}:{security['runAsGroup']}"
    assert f"--uid {security['runAsUser']}" in (ROOT / "deploy" / "install.sh").read_text()
    # The exec form: no shell stands between the signals and the server.
    assert yaml.safe_load(steps["ENTRYPOINT"]) == ["loraf-serve"]
    program, *words = yaml.safe_load(steps["HEALTHCHECK"].partition(" CMD ")[2])
    assert (program, client_cli.parser().parse_args(words).command) == ("loraf-client", "health")
    for setting in (rest for word, rest in instructions() if word == "ENV"):
        assert re.fullmatch(r"[A-Z_]+=[\w/:]+", setting), "deploy/try_install.sh reads these lines"


@pytest.mark.parametrize("script", ["install.sh", "try_install.sh"])
def test_the_scripts_are_ones_that_bash_takes(script):
    file = ROOT / "deploy" / script
    assert file.stat().st_mode & 0o111
    run = subprocess.run(["bash", "-n", file], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_build_context_holds_what_the_script_reads():
    script = (ROOT / "deploy" / "install.sh").read_text()
    copied = {name for group in re.findall(r'"\$source"/\{([^}]*)\}', script) for name in group.split(",")}
    copied |= {path.name for path in ROOT.glob("*constraints.txt")}
    lines = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert allowed == copied | {"deploy/install.sh"}
    assert all((ROOT / name).exists() for name in allowed)
