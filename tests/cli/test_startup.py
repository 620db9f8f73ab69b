"""What starting `jitnorm` and importing the package import."""

from __future__ import annotations

import json
import subprocess
import sys

from packed_entries import fake
from processes import run_before_import

from jitnorm.core.operators import OPERATORS
from jitnorm.jit import archive

# In one process: a module that one command imports fails the check for those that follow.
_LIGHT_COMMANDS = """
import sys
import _jitnorm_command
for words in ("--help", "--version", "cache --help", "cache dir", "cache ls", "cache ls --format json",
              "cache ls --filter size>1MB", "cache import FILE", "cache export COPY",
              "wheel --output .", "cache push --url REMOTE --format json", "cache clear --yes"):
    sys.argv = ["jitnorm", *words.split()]
    try:
        _jitnorm_command.main()
    except SystemExit as end:
        assert not end.code
    print(words, [name for name in ("torch", "tvm_ffi", "numpy", "tqdm") if name in sys.modules], file=sys.stderr)
"""


def test_commands_that_need_no_torch_do_not_import_it(cache_dir, tmp_path):
    (tmp_path / "FILE").write_bytes(archive.write([fake(content=b"\x7fELF".ljust(18) + b">\0")]))
    done = subprocess.run([sys.executable, "-c", _LIGHT_COMMANDS], capture_output=True, text=True, cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and len(lines) == 12 and all(line.endswith(" []") for line in lines), done
    assert "Commands:" in done.stdout and f"{cache_dir}\n" in done.stdout


def test_as_a_module(cache_dir):
    done = run_before_import(
        """
        import runpy, sys
        sys.argv[1:] = ["cache", "dir"]
        runpy.run_module("jitnorm", run_name="__main__", alter_sys=True)  # what `python -m jitnorm` does
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{cache_dir}\n", "")


def test_importing_imports_only_what_is_needed(cache_dir):
    """The package needs no command line, and the command line no benchmark."""
    check = """
import json, sys
old = {*sys.modules}
import jitnorm
print(json.dumps([*{*sys.modules} - old]))
import jitnorm.cli
print(json.dumps([*sys.modules]))
"""
    done = run_before_import(check)
    assert done.returncode == 0, done
    package, command_line = ({*json.loads(line)} for line in done.stdout.splitlines())
    assert not {"click", "tqdm", "tabulate", "jitnorm.cli"} & package
    assert not {"jitnorm.benchmark", "matplotlib", "prometheus_client", "httpx"} & command_line


def test_commands_know_every_operator():
    """The command does not import the operators with the package, so its registry might be incomplete.

    Each module is imported in a process of its own.
    """
    for module in ("jitnorm.warmup", "jitnorm.batch_invariant.verify"):
        done = run_before_import(
            f"import _jitnorm_command, {module}",
            "from jitnorm.core.operators import OPERATORS; print(*OPERATORS)",
        )
        assert {*done.stdout.split()} == {*OPERATORS}, done.stderr
