"""The command behind `make demo`, `demo-down`, `images` and `reload`."""

import sys

from local_cluster import steps

from demo import demo, product, target

_COMMANDS = {
    "up": demo.run_demo,
    "down": demo.remove_demo,
    "reload": demo.reload,
}


def main() -> int:
    """Run one command."""
    try:
        if sys.argv[1] == "install":
            chosen = target.choose_target()
            product.install(chosen, product.build_images(chosen))
        else:
            _COMMANDS[sys.argv[1]]()
    except steps.ClusterError as e:
        steps.console.print(f"[red]✗[/] {e}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
