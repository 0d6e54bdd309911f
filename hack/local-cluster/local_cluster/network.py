"""The node's address and links, and the rule that keeps test traffic at home."""

import json
import shutil
from pathlib import Path

from local_cluster import layout, steps

_FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
_RULES = f"""
table inet {layout.NFT_TABLE}
delete table inet {layout.NFT_TABLE}
table inet {layout.NFT_TABLE} {{
  chain leaving {{
    type filter hook postrouting priority 0; policy accept;
    oifname {{ "lo", "{layout.NODE_LINK}", "{layout.POD_LINK}" }} accept
    ip daddr {layout.TEST_NETWORK} drop
    ip saddr {layout.TEST_NETWORK} drop
  }}
}}
"""
_PROXY_TABLES = ("ip kube-proxy", "ip6 kube-proxy")


def ensure_network(where: layout.Layout) -> None:
    """Make the node's link and the rule; remembers what `remove_network` has to restore."""
    before = where.state / "network-before.json"
    if not before.exists():
        before.parent.mkdir(parents=True, exist_ok=True)
        before.write_text(json.dumps({"forwarding": _FORWARDING.read_text().strip()}))
    if layout.NODE_LINK not in _links():
        steps.run(["ip", "link", "add", layout.NODE_LINK, "type", "bridge"])
    address = f"{layout.NODE_ADDRESS}/32"
    steps.run(["ip", "address", "replace", address, "dev", layout.NODE_LINK])
    steps.run(["ip", "link", "set", layout.NODE_LINK, "up"])
    steps.run(["nft", "-f", "-"], input_text=_RULES)
    _FORWARDING.write_text("1")


def remove_network(where: layout.Layout) -> None:
    """Remove links and tables, and restore what `ensure_network` has changed."""
    for link in (layout.POD_LINK, layout.NODE_LINK):
        if link in _links():
            steps.run(["ip", "link", "delete", link])
    if shutil.which("nft"):
        tables = steps.run(["nft", "list", "tables"])
        for table in (f"inet {layout.NFT_TABLE}", *_PROXY_TABLES):
            if f"table {table}\n" in tables:
                steps.run(["nft", "delete", "table", *table.split()])
    before = where.state / "network-before.json"
    if before.exists():
        _FORWARDING.write_text(json.loads(before.read_text())["forwarding"])


def _links() -> set[str]:
    return {link["ifname"] for link in json.loads(steps.run(["ip", "-json", "link"]))}
