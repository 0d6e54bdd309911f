"""The command behind `make demo`, `make demo-down` and `make reload`."""

import sys

from local_cluster import steps

from demo import demo

_COMMANDS = {
    "up": demo.run_demo,
    "down": demo.remove_demo,
    "reload": demo.reload,
}


def main() -> int:
    """Run one command."""
    try:
        _COMMANDS[sys.argv[1]]()
    except steps.ClusterError as e:
        steps.show_error(e)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
