"""Manifests for Kubernetes: what they say, and that the published schemas take them."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from memjax.sweeps.directory import Directory
from memjax.sweeps.kubernetes import Kubernetes, label, make_manifests, write_manifests

JOB_SET = Path(__file__).parent / "jobset_v1alpha2.json"
"""The OpenAPI schema of the JobSet controller's CRD (kubernetes-sigs/jobset, Apache-2.0), closed to
unknown fields, without descriptions, status and the Job inside, whose own schema is Kubernetes'."""


def test_an_indexed_job_has_an_index_a_point_and_no_index_stops_another():
    settings = Kubernetes(image="memjax:1", claim="books", gpus=2, namespace="lab", at_once=2)
    (job,) = make_manifests("carry", "/data/carry", ["a", "b", "c"], ["b", "c"], settings)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert job["metadata"]["namespace"] == "lab"
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 2)
    assert spec["maxFailedIndexes"] == 3 and pod["restartPolicy"] == "Never"
    actions = {
        rule["onExitCodes"]["values"][0] if "onExitCodes" in rule else "disruption": rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
    }
    assert actions == {2: "FailIndex", 75: "Ignore", "disruption": "Ignore"}
    (container,) = pod["containers"]
    assert container["command"][-2:] == ["/data/carry", "--index"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "books"}


def test_a_point_of_several_hosts_is_a_job_set_that_can_find_itself():
    settings = Kubernetes(image="memjax:1", claim="books", hosts=2, gpus=8)
    (gpu,) = make_manifests("carry", "/data/carry", ["a", "b"], ["b"], settings)
    (replicated,) = gpu["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    name = gpu["metadata"]["name"]
    environment = {e["name"]: e["value"] for e in container["env"]}
    assert environment["JAX_COORDINATOR_ADDRESS"].startswith(f"{name}-{replicated['name']}-0-0.")
    assert environment["JAX_NUM_PROCESSES"] == "2" == str(job["completions"])
    assert container["command"][-1] == "--point=b"
    slice_of_16 = Kubernetes(
        image="memjax:1", claim="c", hosts=4, tpu="tpu-v5-lite-podslice", topology="4x4"
    )
    (tpu,) = make_manifests("carry", "/data/carry", ["a"], ["a"], slice_of_16)
    pod = tpu["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": "4"}


PODS = {
    "gpu": dict(gpus=2, cpus=4, memory_gb=8, namespace="lab"),
    "tpu": dict(tpu="tpu-v5-lite-podslice", topology="2x4"),
}


@pytest.mark.parametrize("version", ["1.29", "1.34"])
@pytest.mark.parametrize("pod", PODS)
def test_jobs_are_what_the_published_schema_of_kubernetes_takes(pod, version):
    schemas = pytest.importorskip("kubernetes_validate")
    settings = Kubernetes(image="memjax:1", claim="volume", **PODS[pod])
    several = dataclasses.replace(settings, hosts=4)
    (job,) = make_manifests("name", "/data/s", ["a", "b"], ["b"], settings)
    (jobs,) = make_manifests("name", "/data/s", ["a", "b"], ["b"], several)
    inner = jobs["spec"]["replicatedJobs"][0]["template"]
    for manifest in (job, {**job, "spec": inner["spec"]}):
        schemas.validate(manifest, version, strict=True)
    wrong = {**job, "spec": {**job["spec"], "backofLimit": 1}}
    with pytest.raises(schemas.ValidationError):
        schemas.validate(wrong, version, strict=True)


@pytest.mark.parametrize("pod", PODS)
def test_job_sets_are_what_the_schema_of_their_controller_takes(pod):
    jsonschema = pytest.importorskip("jsonschema")
    settings = Kubernetes(image="memjax:1", claim="volume", hosts=4, **PODS[pod])
    (jobs,) = make_manifests("name", "/data/s", ["a", "b"], ["b"], settings)
    schema = json.loads(JOB_SET.read_text())
    jsonschema.validate(jobs, schema)
    (replicated,) = jobs["spec"]["replicatedJobs"]
    for wrong in (
        {"network": {"enableDNSHostname": True}},
        {"failurePolicy": {"maxRestarts": "2"}},
        {"replicatedJobs": [{**replicated, "template": {"specs": {}}}]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**jobs, "spec": {**jobs["spec"], **wrong}}, schema)


def test_names_of_pods_are_short_enough_for_dns():
    settings = Kubernetes(image="memjax:1", claim="volume", hosts=100)
    names = [str(n) for n in range(1000)]
    made = make_manifests(label("x" * 100), "/data/s", names, ["999"], settings)
    assert len(f"{made[0]['metadata']['name']}-hosts-0-99-abcde") <= 63


def test_the_command_writes_what_it_says_and_nothing_if_all_is_done(tmp_path, capfd):
    directory = Directory(tmp_path / "Some sweep")
    directory.path.mkdir()
    (directory.path / "sweep.json").write_text('{"points": [{"name": "a"}, {"name": "b"}]}')
    settings = Kubernetes(image="memjax:1", claim="volume", mount=str(tmp_path), hosts=2)
    paths = write_manifests(directory, ["a", "b"], settings)
    told = capfd.readouterr().err
    assert f"kubectl apply -f '{directory.path}/kubernetes/'" in told
    assert "kubectl get pods -l memjax-sweep=some-sweep" in told
    labels = [json.loads(path.read_text())["metadata"]["labels"] for path in paths]
    assert labels == [{"memjax-sweep": "some-sweep"}] * 2
    assert write_manifests(directory, [], settings) == []
    assert "nothing to apply" in capfd.readouterr().err
    assert not list((directory.path / "kubernetes").iterdir())


@pytest.mark.parametrize("text", ["Carry_or not?", "-x-", "", "ünïcode" * 20])
def test_names_for_kubernetes_are_names_it_takes(text):
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", label(text)) and len(label(text)) <= 40
