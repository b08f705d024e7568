"""Points as Kubernetes manifests: an indexed Job, or a JobSet a point that spans several hosts.

Nothing is sent to a cluster: the manifests are written to DIR/kubernetes, as JSON, which kubectl
reads like YAML. The folder of the sweep must lie on a volume that all pods mount.
"""

import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memjax.config import ConfigError, check, check_at_least
from memjax.sweeps.directory import Directory
from memjax.sweeps.worker import IDLE, MISTAKE
from memjax.training.workdir import write_atomically

PORT = 8476
VOLUME = "sweep"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kubernetes:
    """What each point asks of the cluster.

    image: a container image with memjax in it. claim: the persistent volume claim that holds the
    folder of the sweep, mounted at `mount`, which must be the path it has here too.
    hosts: pods of a point, joined by jax.distributed if there are several.
    gpus: NVIDIA GPUs a pod. tpu, topology, chips: type and topology of a TPU slice, as GKE names
    them, and chips a host. at_once: points side by side. retries: restarts of a point that failed
    (evictions do not count). grace_s: seconds to save in, between SIGTERM and the end.
    """

    image: str | None = None
    claim: str | None = None
    mount: str = "/data"
    namespace: str | None = None
    hosts: int = 1
    gpus: int = 0
    tpu: str | None = None
    topology: str | None = None
    chips: int = 4
    cpus: int | None = None
    memory_gb: int | None = None
    at_once: int = 16
    retries: int = 2
    grace_s: int = 120

    def __post_init__(self):
        check_at_least(self, 1, "hosts", "chips", "cpus", "memory_gb", "at_once", "grace_s")
        check_at_least(self, 0, "gpus", "retries")
        both = self.gpus > 0 and self.tpu is not None
        check(self, "gpus", not both, "cannot be asked for together with a TPU slice")
        pair = (self.tpu is None) == (self.topology is None)
        check(self, "topology", pair, "is given together with tpu, or not at all")
        check(self, "mount", self.mount.startswith("/"), "must be an absolute path")


def write_manifests(directory: Directory, todo: Sequence[str], settings: Kubernetes) -> list[Path]:
    """Write the manifests for the points and print how to apply them. Raises ConfigError."""
    for field in ("image", "claim"):
        if getattr(settings, field) is None:
            raise ConfigError(f"--kubernetes.{field}: missing; the manifests need it")
    inside = directory.path.absolute()
    if not inside.is_relative_to(settings.mount):
        raise ConfigError(
            f"--kubernetes.mount={settings.mount}: the sweep is in {inside}, which is not below "
            "it; put --workdir on the volume that the pods mount there"
        )
    folder = directory.path / "kubernetes"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.json"):
        old.unlink()
    name = label(directory.path.name)
    manifests = make_manifests(name, str(inside), directory.names(), todo, settings)
    paths = []
    for manifest in manifests:
        path = folder / f"{manifest['metadata']['name']}.json"
        write_atomically(path, json.dumps(manifest, indent=2) + "\n")
        paths.append(path)
    if not paths:
        print("every point is done: nothing to apply", file=sys.stderr)
        return []
    kubectl = "kubectl" if settings.namespace is None else f"kubectl -n {settings.namespace}"
    kind = "job" if settings.hosts == 1 else "jobset"
    applied = shlex.quote(f"{folder}/")
    print(f"apply   {kubectl} apply -f {applied}", file=sys.stderr)
    print(f"watch   {kubectl} get pods -l memjax-sweep={name}", file=sys.stderr)
    print(f"stop    {kubectl} delete {kind} -l memjax-sweep={name}", file=sys.stderr)
    return paths


def make_manifests(
    name: str, folder: str, names: Sequence[str], todo: Sequence[str], settings: Kubernetes
) -> list[dict[str, Any]]:
    """Manifests for `todo`, some of the points `names` of the sweep in `folder`.

    With one host a point: one indexed Job over all points, of which those that are done end at
    once. With several: a JobSet a point.
    """
    if not todo:
        return []
    if settings.hosts == 1:
        return [_indexed_job(name, folder, len(names), settings)]
    numbers = {point: number for number, point in enumerate(names)}
    return [_job_set(f"{name}-{numbers[p]}", name, folder, p, settings) for p in todo]


def label(text: str) -> str:
    """A name that Kubernetes takes: letters in lower case, digits and dashes, 40 at most."""
    return re.sub(r"[^a-z0-9-]+", "-", text.lower()).strip("-")[:40].strip("-") or "sweep"


def _metadata(name: str, sweep: str, settings: Kubernetes) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name, "labels": {"memjax-sweep": sweep}}
    if settings.namespace is not None:
        metadata["namespace"] = settings.namespace
    return metadata


def _indexed_job(name: str, folder: str, count: int, settings: Kubernetes) -> dict[str, Any]:
    """One index a point; an index that fails does not stop the others."""
    pod = _pod(name, [folder, "--index"], [], settings)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(name, name, settings),
        "spec": {
            "completionMode": "Indexed",
            "completions": count,
            "parallelism": min(settings.at_once, count),
            "backoffLimitPerIndex": settings.retries,
            "maxFailedIndexes": count,
            "podFailurePolicy": {
                "rules": [
                    _on_exit("FailIndex", MISTAKE),
                    _on_exit("Ignore", IDLE),
                    _on_disruption(),
                ]
            },
            "template": pod,
        },
    }


def _job_set(
    name: str, sweep: str, folder: str, point: str, settings: Kubernetes
) -> dict[str, Any]:
    """All hosts of one point; if one ends badly, all start again from the last checkpoint."""
    environment = []
    if settings.tpu is None:
        address = f"{name}-hosts-0-0.{name}:{PORT}"
        environment = [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": address},
            {"name": "JAX_NUM_PROCESSES", "value": str(settings.hosts)},
        ]
    pod = _pod(sweep, [folder, f"--point={point}"], environment, settings)
    job = {
        "completionMode": "Indexed",
        "completions": settings.hosts,
        "parallelism": settings.hosts,
        "backoffLimit": 0,
        "template": pod,
    }
    metadata = _metadata(name, sweep, settings)
    if settings.tpu is not None:
        topology = "cloud.google.com/gke-nodepool"
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": topology}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True},
            "failurePolicy": {"maxRestarts": settings.retries},
            "replicatedJobs": [{"name": "hosts", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _on_exit(action: str, status: int) -> dict[str, Any]:
    return {"action": action, "onExitCodes": {"operator": "In", "values": [status]}}


def _on_disruption() -> dict[str, Any]:
    condition = {"type": "DisruptionTarget", "status": "True"}
    return {"action": "Ignore", "onPodConditions": [condition]}


def _pod(
    sweep: str, arguments: list[str], environment: list[dict[str, Any]], settings: Kubernetes
) -> dict[str, Any]:
    limits: dict[str, str] = {}
    if settings.gpus:
        limits["nvidia.com/gpu"] = str(settings.gpus)
    if settings.tpu is not None:
        limits["google.com/tpu"] = str(settings.chips)
    if settings.cpus is not None:
        limits["cpu"] = str(settings.cpus)
    if settings.memory_gb is not None:
        limits["memory"] = f"{settings.memory_gb}Gi"
    container: dict[str, Any] = {
        "name": "memjax",
        "image": settings.image,
        "command": ["python", "-m", "memjax.sweeps.worker", *arguments],
        "volumeMounts": [{"name": VOLUME, "mountPath": settings.mount}],
    }
    if environment:
        container["env"] = environment
    if limits:
        container["resources"] = {"limits": limits, "requests": limits}
    if settings.tpu is not None or settings.hosts > 1:
        container["ports"] = [{"containerPort": PORT}]
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": settings.grace_s,
        "containers": [container],
        "volumes": [{"name": VOLUME, "persistentVolumeClaim": {"claimName": settings.claim}}],
    }
    if settings.tpu is not None:
        spec["nodeSelector"] = {
            "cloud.google.com/gke-tpu-accelerator": settings.tpu,
            "cloud.google.com/gke-tpu-topology": settings.topology,
        }
    return {"metadata": {"labels": {"memjax-sweep": sweep}}, "spec": spec}
