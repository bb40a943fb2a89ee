"""The Helm chart, rendered by Helm's own library and held to Kubernetes' schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from bagel_triton.deploy.config import POLICIES
from bagel_triton.serving.cli import build_parser

ROOT = Path(__file__).parents[2]
CHART = ROOT / "build" / "helm" / "bagel-triton"
WITH_ALL = {
    "checkpoint": {"claim": "models", "subPath": "BAGEL-7B-MoT"},
    "apiKeySecret": "bagel-key",
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "stage0": {"autoscaling": {"enabled": True}, "nodeSelector": {"disk": "fast"}},
    "stage1": {"autoscaling": {"enabled": True}, "extraArgs": ["--max-num-seqs=4"]},
}
ONE_STAGE = {
    "checkpoint": {"claim": "models"},
    "stage0": {
        "extraArgs": ["--deploy-config=bagel_single_stage"],
        "resources": {"limits": {"nvidia.com/gpu": 1}},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    },
    "stage1": {"enabled": False},
}
helm = pytest.importorskip("helm_python.chart", reason="Helm is not here: install the extra bagel-triton[charts]")


def render(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The objects, by kind and name."""
    with helm.Chart.load(CHART) as chart:
        rendered = chart.render(values=values, name="bagel", namespace="images")
    texts = rendered.values() if isinstance(rendered, dict) else [rendered]
    objects = [one for text in texts for one in yaml.safe_load_all(text) if one]
    return {f"{one['kind']}/{one['metadata']['name']}": one for one in objects}


@pytest.mark.parametrize("values", [WITH_ALL, ONE_STAGE], ids=["two stages", "one stage"])
def test_every_object_is_one_that_kubernetes_knows(values: dict[str, Any]) -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="its schemas come with bagel-triton[charts]")
    objects = render(values)
    for one in objects.values():
        if one["apiVersion"] != "monitoring.coreos.com/v1":  # of an operator, not of Kubernetes
            schemas.validate(one, "1.30", strict=True)
    assert len(objects) == (12 if values is WITH_ALL else 3)


@pytest.mark.parametrize("values", [WITH_ALL, ONE_STAGE], ids=["two stages", "one stage"])
def test_the_servers_start_with_options_that_there_are(values: dict[str, Any]) -> None:
    for name, one in render(values).items():
        if not name.startswith("Deployment"):
            continue
        [container] = one["spec"]["template"]["spec"]["containers"]
        command = [*container["command"], *container["args"]]
        parser, _ = build_parser(command[1:])
        parsed = parser.parse_args(command[1:])
        assert (parsed.checkpoint, parsed.init_timeout, parsed.shutdown_timeout) == ("/checkpoint", 1800, 120)


def test_the_stages_find_each_other_and_are_probed_for_true_readiness() -> None:
    objects = render(WITH_ALL)
    stage0, stage1 = (
        objects[f"Deployment/bagel-stage{n}"]["spec"]["template"]["spec"]["containers"][0] for n in (0, 1)
    )
    registration = objects["Service/bagel-stage0"]["spec"]
    assert "--omni-master-address=bagel-stage0" in stage1["args"]
    assert registration["clusterIP"] == "None"
    assert registration["publishNotReadyAddresses"] is True
    assert f"--omni-master-port={registration['ports'][0]['port']}" in stage0["args"]
    assert stage0["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    assert f"--triton-grpc-port={stage1['readinessProbe']['grpc']['port']}" in stage1["args"]


def test_a_pod_writes_to_memory_alone_and_has_time_to_drain() -> None:
    for name in ("Deployment/bagel-stage0", "Deployment/bagel-stage1"):
        pod = render(WITH_ALL)[name]["spec"]["template"]["spec"]
        [container] = pod["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")
        assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/dev/shm", "/tmp", "/checkpoint"}
        assert pod["terminationGracePeriodSeconds"] > 120 + 15  # the server's own time after its requests' time


def test_selectors_select_the_pods_that_they_are_for() -> None:
    objects = render(WITH_ALL)
    labels = {n: objects[f"Deployment/bagel-stage{n}"]["spec"]["template"]["metadata"]["labels"] for n in (0, 1)}
    for name, stage in (("Service/bagel", 0), ("Service/bagel-stage0", 0), ("Service/bagel-stage1", 1)):
        assert objects[name]["spec"]["selector"] == labels[stage]
    for n in (0, 1):
        for kind in ("PodDisruptionBudget", "ServiceMonitor"):
            assert objects[f"{kind}/bagel-stage{n}"]["spec"]["selector"]["matchLabels"] == labels[n]
        assert "replicas" not in objects[f"Deployment/bagel-stage{n}"]["spec"]  # the autoscaler's
        target = objects[f"HorizontalPodAutoscaler/bagel-stage{n}"]["spec"]["scaleTargetRef"]
        assert target["name"] == f"bagel-stage{n}"


def test_prometheus_gets_the_key_that_the_api_wants() -> None:
    objects = render(WITH_ALL)
    [api], [stage1] = (objects[f"ServiceMonitor/bagel-stage{n}"]["spec"]["endpoints"] for n in (0, 1))
    assert api["authorization"]["credentials"] == {"name": "bagel-key", "key": "api-key"}
    assert "authorization" not in stage1


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"stage1": {"lbPolicy": "foo"}}, "lbPolicy"),
        ({"servedModelNames": []}, "servedModelNames"),
        ({"dtype": "float16"}, "dtype"),
        ({"shmSize": "many"}, "shmSize"),
        ({"stage0": {"replica": 3}}, "replica"),
        ({"stage1": {"extraArgs": "--max-num-seqs=4"}}, "extraArgs"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(Exception, match=f"(?s)schema.*{named}"):
        render({"checkpoint": {"claim": "models"}, **values})


def test_the_schema_knows_every_policy_and_every_value() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]
    assert tuple(schema["stage1"]["properties"]["lbPolicy"]["enum"]) == POLICIES
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for names, known in ((values, schema), (values["stage1"], schema["stage1"]["properties"])):
        assert names.keys() <= known.keys()


def test_a_chart_without_a_checkpoint_says_what_is_missing() -> None:
    with pytest.raises(Exception, match=r"checkpoint\.claim: name the PersistentVolumeClaim"):
        render({})
