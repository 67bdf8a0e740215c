"""What ``deploy/`` holds is what the cluster, Prometheus, Grafana and our own programs take: ``make deploy-check``."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import promql_parser
import pytest
import yaml

from gateway.limits import Keys
from gateway.metrics import Metrics
from tests.deploy import helm
from triton_repo import metrics as served

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "d2sd"
FULL = {
    "pipeline": "target: {checkpoint: some/model}\n",
    "pipelineFile": "configs/qwen3-8b.yaml",
    "images": {"pullSecrets": ["pull"]},
    "triton": {
        "replicas": 3,
        "resources": {"limits": {"nvidia.com/gpu": 1}},
        "volume": {"accessMode": "ReadWriteMany", "storageClass": "fast"},
        "nodeSelector": {"gpu": "yes"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    },
    "gateway": {"keysSecret": "keys", "models": ["d2sd", "smollm2"]},
    "autoscaling": {"enabled": True},
    "monitoring": {"podMonitors": True, "rules": True, "dashboard": True},
    "networkPolicy": {"from": [{"namespaceSelector": {"matchLabels": {"team": "web"}}}]},
}
VALUES = {"default": {}, "full": FULL, "bare": {"triton": {"volume": {"enabled": False}}, "networkPolicy": {"enabled": False}}}


def render(values):
    texts = helm.ask(chart=str(CHART), values=values)
    return [one for name, text in texts.items() if name.endswith(".yaml") for one in yaml.safe_load_all(text) if one]


@pytest.fixture(scope="module", params=VALUES)
def objects(request):
    return render(VALUES[request.param])


def of_kind(objects, kind):
    return [one for one in objects if one["kind"] == kind]


CUSTOM = {"PodMonitor", "PrometheusRule", "ScaledObject"}


def test_the_cluster_takes_the_chart(objects):
    for one in objects:
        if one["kind"] not in CUSTOM:
            kubernetes_validate.validate(one, "1.31", strict=True)
    names = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(set(names)) == len(names)
    assert len(of_kind(objects, "Deployment")) == 2


def test_a_wrong_manifest_is_found(objects):
    wrong = {**of_kind(objects, "Deployment")[0], "speck": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.31", strict=True)


def test_helm_has_no_complaint():
    found = helm.ask(chart=str(CHART))
    assert not [one for one in found["messages"] if one["severity"] in ("ERROR", "WARNING", 2, 3)], found


@pytest.mark.parametrize(
    "values",
    [
        {"triton": {"replica": 2}},
        {"gateway": {"port": "9000"}},
        {"images": {"pullPolicy": "Sometimes"}},
        {"autoscaling": {"prometheus": "prometheus:9090"}},
        {"triton": {"volume": {"size": "many"}}},
        {"nonsense": 1},
    ],
)
def test_wrong_values_are_refused(values):
    with pytest.raises(helm.HelmError):
        render(values)


def test_parts_of_the_chart_find_each_other(objects):
    """Selectors select, ports, volumes and claims are there, and no pod may do more than it needs."""
    pods = {one["metadata"]["name"]: one["spec"]["template"] for one in of_kind(objects, "Deployment")}
    labels = {name: pod["metadata"]["labels"].items() for name, pod in pods.items()}

    def selected(selector):
        found = [name for name, has in labels.items() if selector.items() <= has]
        assert len(found) == 1, selector
        return pods[found[0]]["spec"]

    def ports(pod):
        return {port["name"] for container in pod["containers"] for port in container["ports"]}

    for one in of_kind(objects, "Service"):
        assert {port["targetPort"] for port in one["spec"]["ports"]} <= ports(selected(one["spec"]["selector"]))
    for one in of_kind(objects, "PodDisruptionBudget"):
        selected(one["spec"]["selector"]["matchLabels"])
    for one in of_kind(objects, "PodMonitor"):
        pod = selected(one["spec"]["selector"]["matchLabels"])
        assert {point["port"] for point in one["spec"]["podMetricsEndpoints"]} <= ports(pod)
    for one in of_kind(objects, "NetworkPolicy"):
        pod = selected(one["spec"]["podSelector"]["matchLabels"])
        assert {port["port"] for rule in one["spec"]["ingress"] for port in rule["ports"]} <= ports(pod)
    for one in of_kind(objects, "ScaledObject"):
        assert one["spec"]["scaleTargetRef"]["name"] in pods
    claims = {one["metadata"]["name"] for one in of_kind(objects, "PersistentVolumeClaim")}
    maps = {one["metadata"]["name"] for one in of_kind(objects, "ConfigMap")}
    for pod in pods.values():
        assert pod["spec"]["securityContext"]["runAsUser"] == 1000
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        for volume in volumes.values():
            assert volume.get("persistentVolumeClaim", {}).get("claimName") in {None, *claims}
            assert volume.get("configMap", {}).get("name") in {None, *maps}
        for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= set(volumes)
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
        named = [probe for container in pod["spec"]["containers"] for probe in container if probe.endswith("Probe")]
        assert sorted(named) == ["livenessProbe", "readinessProbe", "startupProbe"]


@pytest.fixture(scope="module")
def known():
    """The options of the programs that containers run."""
    programs = {"gateway": ["-m", "gateway"], "triton": ["triton_repo/serve.py"], "build": ["export/build.py"]}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    made = {}
    for name, program in programs.items():
        command = [sys.executable, *program, "--help"]
        text = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
        made[name] = set(re.findall(r"--[a-z-]+", text))
    return made


def test_the_programs_know_the_options_they_are_given(objects, known):
    for one in of_kind(objects, "Deployment"):
        pod = one["spec"]["template"]["spec"]
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            given = {option.partition("=")[0] for option in container["args"] if str(option).startswith("--")}
            assert given <= known[container["name"]]
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for name in ("gateway", "triton"):
        assert {option for option in compose[name]["command"] if option.startswith("--")} <= known[name]


def expressions():
    """Every PromQL expression, as Prometheus gets it, by where it stands."""
    rules = yaml.safe_load((CHART / "files" / "rules.yaml").read_text())
    made = {rule["alert"]: rule["expr"] for group in rules["groups"] for rule in group["rules"]}
    dashboard = json.loads((CHART / "files" / "dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            text = target["expr"].replace("$__rate_interval", "1m").replace("$namespace", ".*")
            assert "$" not in text
            made[f"{panel['title']} {target['refId']}"] = text
    made["scaling"] = of_kind(render(FULL), "ScaledObject")[0]["spec"]["triggers"][0]["metadata"]["query"]
    return made


def test_every_expression_is_promql_of_metrics_that_there_are():
    own = {sample.name for family in Metrics().registry.collect() for sample in family.samples}
    own |= {f"{family.name}{suffix}" for family in Metrics().registry.collect() for suffix in ("", "_total", "_bucket")}
    known = own | served.NAMES | {f"{name}_bucket" for name in served.NAMES}
    for where, text in expressions().items():
        promql_parser.parse(text)
        named = set(re.findall(r"\bd2sd[:_][a-z0-9_:]+", text))
        assert named, where
        assert named <= known, (where, named - known)


def test_panels_lie_side_by_side():
    panels = json.loads((CHART / "files" / "dashboard.json").read_text())["panels"]
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.fixture(scope="module")
def promtool():
    found = shutil.which("promtool") or shutil.which("promtool", path=str(Path(sys.prefix) / "bin"))
    if not found:
        pytest.skip("promtool is not installed; the Makefile takes it from Debian's package prometheus")
    return found


def test_prometheus_takes_its_files(promtool, tmp_path):
    shutil.copy(CHART / "files" / "rules.yaml", tmp_path)
    shutil.copy(DEPLOY / "prometheus.yaml", tmp_path)
    rule = of_kind(render(FULL), "PrometheusRule")[0]["spec"]
    (tmp_path / "chart.yaml").write_text(yaml.safe_dump(rule))
    for command in (["check", "rules", "rules.yaml", "chart.yaml"], ["check", "config", "prometheus.yaml"]):
        done = subprocess.run([promtool, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "rules.yaml").write_text((CHART / "files" / "rules.yaml").read_text().replace("sum(", "summ(", 1))
    assert subprocess.run([promtool, "check", "rules", "rules.yaml"], cwd=tmp_path, capture_output=True, check=False).returncode


def test_the_containerfile():
    hadolint = Path(sys.prefix) / "bin" / "hadolint"
    done = subprocess.run([hadolint, DEPLOY / "Containerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    text = (DEPLOY / "Containerfile").read_text()
    for line in re.findall(r"^COPY (.+) \S+$", text, re.M):
        for source in line.split():
            assert (ROOT / source).exists(), source
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {f"!{source}" for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for source in line.split()} <= set(ignored)


def test_compose_names_what_there_is():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    targets = set(re.findall(r"^FROM .+ AS (\w+)$", (DEPLOY / "Containerfile").read_text(), re.M))
    for name, service in compose["services"].items():
        assert set(service.get("depends_on", [])) <= set(compose["services"])
        if "build" in service:
            assert service["build"]["target"] in targets
        for volume in service.get("volumes", []):
            source = re.sub(r"^\$\{KEYS:-(.+?)\}", r"\1", volume).partition(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source.replace("keys.yaml", "keys.example.yaml")).exists(), (name, volume)
            else:
                assert source in compose["volumes"]


def test_the_example_of_keys():
    Keys.read(DEPLOY / "keys.example.yaml")
