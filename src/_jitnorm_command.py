"""Entry point of the console script `jitnorm`.

It is a module of its own so that `import jitnorm` can tell the command from an application: where this module is
imported, `jitnorm/__init__.py` imports neither torch nor the operators, and each command imports what it needs.
"""

from __future__ import annotations


def main() -> None:
    """Run the command that `sys.argv` names."""
    from jitnorm.cli import main as command

    command()
