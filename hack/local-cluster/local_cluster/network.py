"""The node's address and links, and the rule that keeps test traffic at home."""

import json
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
        found = {"forwarding": _FORWARDING.read_text().strip(), "tables": _tables()}
        before.write_text(json.dumps(found))
    if layout.NODE_LINK not in _links():
        steps.run(["ip", "link", "add", layout.NODE_LINK, "type", "bridge"])
    address = f"{layout.NODE_ADDRESS}/32"
    steps.run(["ip", "address", "replace", address, "dev", layout.NODE_LINK])
    steps.run(["ip", "link", "set", layout.NODE_LINK, "up"])
    steps.run(["nft", "-f", "-"], input_text=_RULES)
    _FORWARDING.write_text("1")


def remove_network(where: layout.Layout) -> None:
    """Remove what was not there before `ensure_network`, and restore what it has changed."""
    file = where.state / "network-before.json"
    if not file.exists():
        return
    before = json.loads(file.read_text())
    for link in (layout.POD_LINK, layout.NODE_LINK):
        if link in _links():
            steps.run(["ip", "link", "delete", link])
    made = set(_tables()) - set(before["tables"])
    for table in made & {f"inet {layout.NFT_TABLE}", *_PROXY_TABLES}:
        steps.run(["nft", "delete", "table", *table.split()])
    _FORWARDING.write_text(before["forwarding"])


def _tables() -> list[str]:
    """Return the nftables tables, for example `ip kube-proxy`."""
    return [
        line.removeprefix("table ") for line in steps.run(["nft", "list", "tables"]).splitlines()
    ]


def _links() -> set[str]:
    return {link["ifname"] for link in json.loads(steps.run(["ip", "-json", "link"]))}
