"""The cluster's certificate authority, certificates, keys and kubeconfigs."""

import dataclasses
import datetime
import ipaddress
import json
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from local_cluster import layout

_VALIDITY = datetime.timedelta(days=3650)
_SECRET_MODE = 0o600


@dataclasses.dataclass(frozen=True)
class Identity:
    """Who a certificate is for."""

    file: str
    name: str
    groups: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()


_API_HOSTS = (
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
    "localhost",
    layout.NODE_ADDRESS,
    layout.API_SERVICE_ADDRESS,
)
_NODE_HOSTS = (layout.NODE_NAME, layout.NODE_ADDRESS)
ADMIN = Identity("admin", "kubernetes-admin", ("system:masters",))
CLIENTS = (
    ADMIN,
    Identity("controller-manager", "system:kube-controller-manager"),
    Identity("scheduler", "system:kube-scheduler"),
    Identity("proxy", "system:kube-proxy"),
    Identity("coredns", "system:coredns"),
    Identity("provisioner", "system:local-provisioner"),
    Identity("kubelet", f"system:node:{layout.NODE_NAME}", ("system:nodes",), _NODE_HOSTS),
)
"""Each gets a certificate and a kubeconfig."""

_OTHERS = (
    Identity("apiserver", "kube-apiserver", hosts=_API_HOSTS),
    Identity("etcd", "etcd", hosts=_NODE_HOSTS),
    Identity("apiserver-etcd", "kube-apiserver-etcd-client"),
    Identity("apiserver-kubelet", "kube-apiserver-kubelet-client", ("system:masters",)),
    Identity("service-accounts", "service-accounts"),
)


def ensure_pki(where: layout.Layout) -> None:
    """Make what is missing; a complete folder is left as it is."""
    where.pki.mkdir(parents=True, exist_ok=True)
    complete = where.pki / ".complete"
    if not complete.exists():
        authority, authority_key = _make_authority(where.pki)
        for identity in (*CLIENTS, *_OTHERS):
            _make_certificate(where.pki, identity, authority, authority_key)
        for identity in CLIENTS:
            _write_kubeconfig(where.pki / f"{identity.file}.kubeconfig", where.pki, identity)
        complete.touch()
    _write_kubeconfig(where.kubeconfig, where.pki, ADMIN)


def _make_authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "internvl-local-cluster")])
    certificate = (
        _builder(name, key)
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write_pair(folder / "ca", certificate, key)
    return certificate, key


def _make_certificate(
    folder: Path,
    identity: Identity,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, g) for g in identity.groups]
    attributes.append(x509.NameAttribute(NameOID.COMMON_NAME, identity.name))
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    builder = (
        _builder(x509.Name(attributes), key)
        .issuer_name(authority.subject)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    )
    if identity.hosts:
        names = x509.SubjectAlternativeName([_general_name(host) for host in identity.hosts])
        builder = builder.add_extension(names, critical=False)
    _write_pair(folder / identity.file, builder.sign(authority_key, hashes.SHA256()), key)


def _builder(name: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(tz=datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + _VALIDITY)
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_pair(path: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.with_suffix(".crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    secret = path.with_suffix(".key")
    secret.touch(mode=_SECRET_MODE)
    secret.write_bytes(private)


def _write_kubeconfig(path: Path, folder: Path, identity: Identity) -> None:
    name = "internvl-local"
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": name,
        "clusters": [
            {
                "name": name,
                "cluster": {
                    "server": f"https://{layout.NODE_ADDRESS}:{layout.API_PORT}",
                    "certificate-authority": str(folder / "ca.crt"),
                },
            }
        ],
        "users": [
            {
                "name": name,
                "user": {
                    "client-certificate": str(folder / f"{identity.file}.crt"),
                    "client-key": str(folder / f"{identity.file}.key"),
                },
            }
        ],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
    }
    path.touch(mode=_SECRET_MODE)
    path.write_text(json.dumps(content, indent=2) + "\n")
