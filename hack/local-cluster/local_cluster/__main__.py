"""The command behind `make cluster-up`, `cluster-status` and `cluster-down`."""

import argparse
import sys

from local_cluster import cluster, layout, steps


def main() -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="local-cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="bring the cluster up")
    up.add_argument("--gpus", type=int, default=0, help="number of fake GPUs")
    up.add_argument("--gpu-product", default=cluster.Gpus.product, help="their product label")
    down = commands.add_parser("down", help="take the cluster down")
    down.add_argument("--purge", action="store_true", help="remove images and tools too")
    commands.add_parser("status", help="show processes and node")
    arguments = parser.parse_args()
    where = layout.default_layout()
    try:
        return _run(arguments, where)
    except steps.ClusterError as e:
        steps.show_error(e)
        return 1


def _run(arguments: argparse.Namespace, where: layout.Layout) -> int:
    match arguments.command:
        case "up":
            cluster.up(where, cluster.Gpus(arguments.gpus, arguments.gpu_product))
        case "down":
            cluster.down(where, purge=arguments.purge)
        case "status":
            return 0 if cluster.status(where) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
