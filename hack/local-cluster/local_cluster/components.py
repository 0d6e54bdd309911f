"""The cluster's processes: their commands and configuration files."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from local_cluster import layout


@dataclasses.dataclass(frozen=True)
class Component:
    """One supervised process."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def list_components(where: layout.Layout, *, gpus: int) -> list[Component]:
    """Return the processes in the order of their start."""
    components = [
        _etcd(where),
        _apiserver(where),
        _containerd(where),
        _registry(where),
        _controller_manager(where),
        _scheduler(where),
        _kubelet(where),
        _proxy(where),
        _coredns(where),
        _provisioner(where),
    ]
    if gpus:
        components.append(_device_plugin(where, gpus))
    return components


def write_configuration(where: layout.Layout) -> None:
    """Write the files that the processes read."""
    for folder in (where.logs, where.state / "cni", where.state / "volumes", where.store):
        folder.mkdir(parents=True, exist_ok=True)
    _write(where.state / "containerd.toml", _containerd_config(where))
    _write(where.state / "registry.yml", _registry_config(where))
    _write(where.state / "Corefile", _corefile(where))
    _write_json(where.state / "kubelet.json", _kubelet_config(where))
    _write_json(where.state / "proxy.json", _proxy_config(where))
    _write_json(where.state / "cni" / "10-pods.conflist", _cni_config(where))
    hosts = where.state / "certs.d" / layout.REGISTRY
    hosts.mkdir(parents=True, exist_ok=True)
    url = f"http://{layout.REGISTRY}"
    _write(hosts / "hosts.toml", f'server = "{url}"\n\n[host."{url}"]\n')


def _component(where: layout.Layout, program: str, **flags: object) -> Component:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    return Component(program, (str(where.tool(program)), *options))


def _etcd(where: layout.Layout) -> Component:
    client = f"https://{layout.NODE_ADDRESS}:2379"
    peer = "http://127.0.0.1:12380"
    return _component(
        where,
        "etcd",
        data_dir=where.state / "etcd",
        listen_client_urls=client,
        advertise_client_urls=client,
        listen_peer_urls=peer,
        initial_advertise_peer_urls=peer,
        initial_cluster=f"default={peer}",
        logger="zap",
        client_cert_auth="true",
        trusted_ca_file=where.pki / "ca.crt",
        cert_file=where.pki / "etcd.crt",
        key_file=where.pki / "etcd.key",
    )


def _apiserver(where: layout.Layout) -> Component:
    pki = where.pki
    return _component(
        where,
        "kube-apiserver",
        etcd_servers=f"https://{layout.NODE_ADDRESS}:2379",
        etcd_cafile=pki / "ca.crt",
        etcd_certfile=pki / "apiserver-etcd.crt",
        etcd_keyfile=pki / "apiserver-etcd.key",
        bind_address=layout.NODE_ADDRESS,
        advertise_address=layout.NODE_ADDRESS,
        secure_port=layout.API_PORT,
        service_cluster_ip_range=layout.SERVICE_NETWORK,
        authorization_mode="Node,RBAC",
        enable_admission_plugins="NodeRestriction",
        allow_privileged="true",
        anonymous_auth="true",
        client_ca_file=pki / "ca.crt",
        tls_cert_file=pki / "apiserver.crt",
        tls_private_key_file=pki / "apiserver.key",
        kubelet_client_certificate=pki / "apiserver-kubelet.crt",
        kubelet_client_key=pki / "apiserver-kubelet.key",
        kubelet_certificate_authority=pki / "ca.crt",
        kubelet_preferred_address_types="InternalIP",
        service_account_issuer="https://kubernetes.default.svc",
        service_account_key_file=pki / "service-accounts.crt",
        service_account_signing_key_file=pki / "service-accounts.key",
    )


def _containerd(where: layout.Layout) -> Component:
    binaries = f"{where.debian}/usr/bin:{where.debian}/usr/sbin"
    return Component(
        "containerd",
        (str(where.tool("containerd")), "--config", str(where.state / "containerd.toml")),
        {"PATH": f"{binaries}:/usr/sbin:/usr/bin:/sbin:/bin"},
    )


def _registry(where: layout.Layout) -> Component:
    command = (str(where.tool("docker-registry")), "serve", str(where.state / "registry.yml"))
    return Component("registry", command)


def _controller_manager(where: layout.Layout) -> Component:
    kubeconfig = where.pki / "controller-manager.kubeconfig"
    return _component(
        where,
        "kube-controller-manager",
        kubeconfig=kubeconfig,
        authentication_kubeconfig=kubeconfig,
        authorization_kubeconfig=kubeconfig,
        bind_address=layout.NODE_ADDRESS,
        leader_elect="false",
        use_service_account_credentials="true",
        root_ca_file=where.pki / "ca.crt",
        service_account_private_key_file=where.pki / "service-accounts.key",
        cluster_signing_cert_file=where.pki / "ca.crt",
        cluster_signing_key_file=where.pki / "ca.key",
    )


def _scheduler(where: layout.Layout) -> Component:
    kubeconfig = where.pki / "scheduler.kubeconfig"
    return _component(
        where,
        "kube-scheduler",
        kubeconfig=kubeconfig,
        authentication_kubeconfig=kubeconfig,
        authorization_kubeconfig=kubeconfig,
        bind_address=layout.NODE_ADDRESS,
        leader_elect="false",
    )


def _kubelet(where: layout.Layout) -> Component:
    return _component(
        where,
        "kubelet",
        kubeconfig=where.pki / "kubelet.kubeconfig",
        config=where.state / "kubelet.json",
        root_dir=where.state / "kubelet",
        hostname_override=layout.NODE_NAME,
        node_ip=layout.NODE_ADDRESS,
    )


def _proxy(where: layout.Layout) -> Component:
    return _component(where, "kube-proxy", config=where.state / "proxy.json")


def _coredns(where: layout.Layout) -> Component:
    command = (str(where.tool("coredns")), "-conf", str(where.state / "Corefile"))
    return Component("coredns", command)


def _provisioner(where: layout.Layout) -> Component:
    return _component(
        where,
        "provisioner",
        kubeconfig=where.pki / "provisioner.kubeconfig",
        root=where.state / "volumes",
        node=layout.NODE_NAME,
    )


def _device_plugin(where: layout.Layout, gpus: int) -> Component:
    unhealthy = where.state / "unhealthy-gpus"
    return _component(where, "device-plugin", count=gpus, unhealthy_file=unhealthy)


def _kubelet_config(where: layout.Layout) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": layout.NODE_ADDRESS,
        "healthzBindAddress": layout.NODE_ADDRESS,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(where.pki / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(where.pki / "kubelet.crt"),
        "tlsPrivateKeyFile": str(where.pki / "kubelet.key"),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{layout.CGROUP}",
        "containerRuntimeEndpoint": f"unix://{where.containerd_socket}",
        "clusterDNS": [layout.NODE_ADDRESS],
        "clusterDomain": "cluster.local",
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%"},
        "failSwapOn": False,
        "imageGCHighThresholdPercent": 100,
        "makeIPTablesUtilChains": False,
        "maxPods": 100,
        "podLogsDir": str(where.state / "pod-logs"),
        "resolvConf": "",
        "serializeImagePulls": False,
        "volumePluginDir": str(where.state / "volume-plugins"),
    }


def _proxy_config(where: layout.Layout) -> dict[str, Any]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "bindAddress": layout.NODE_ADDRESS,
        "healthzBindAddress": f"{layout.NODE_ADDRESS}:10256",
        "metricsBindAddress": f"{layout.NODE_ADDRESS}:10249",
        "clientConnection": {"kubeconfig": str(where.pki / "proxy.kubeconfig")},
        "clusterCIDR": layout.POD_NETWORK,
        "conntrack": {"maxPerCore": 0},
        "hostnameOverride": layout.NODE_NAME,
        # Pods share one bridge, so that an answer to a pod would bypass the
        # node and keep its own address: the masquerade leads it back.
        "nftables": {"masqueradeAll": True},
    }


def _cni_config(where: layout.Layout) -> dict[str, Any]:
    bridge = {
        "type": "bridge",
        "bridge": layout.POD_LINK,
        "isGateway": True,
        "hairpinMode": True,
        "ipMasq": False,
        "ipam": {
            "type": "host-local",
            "dataDir": str(where.state / "addresses"),
            "ranges": [[{"subnet": layout.POD_NETWORK}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    return {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge]}


def _containerd_config(where: layout.Layout) -> str:
    return f"""
version = 2
root = "{where.store / "containerd"}"
state = "{where.state / "containerd"}"
disabled_plugins = ["io.containerd.internal.v1.opt"]

[grpc]
address = "{where.containerd_socket}"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{layout.REGISTRY}/pause:1"
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true

[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{where.debian / "usr/lib/cni"}"
conf_dir = "{where.state / "cni"}"

[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "{where.state / "certs.d"}"
"""


def _registry_config(where: layout.Layout) -> str:
    return f"""
version: 0.1
log: {{level: warn, accesslog: {{disabled: true}}}}
storage:
  filesystem: {{rootdirectory: "{where.store / "registry"}"}}
  delete: {{enabled: true}}
http: {{addr: "{layout.REGISTRY}"}}
"""


def _corefile(where: layout.Layout) -> str:
    return f"""
.:53 {{
    bind {layout.NODE_ADDRESS}
    errors
    health {layout.NODE_ADDRESS}:8180
    ready {layout.NODE_ADDRESS}:8181
    kubernetes cluster.local in-addr.arpa {{
        kubeconfig {where.pki / "coredns.kubeconfig"}
        pods insecure
    }}
    cache 5
}}
"""


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write(path, json.dumps(content, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    """Write a file unless it is as it should be: kube-proxy ends when its file is written."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
