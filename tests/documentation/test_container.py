"""examples/container/Dockerfile: its steps succeed, each stage in a folder of its own instead of an image.

What installs packages is left out: the packages of this environment are used. The last stage finds no compiler.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import click
import pytest

import jitnorm
from documentation.pages import ROOT
from jitnorm.cli import main
from jitnorm.jit.cache import Cache
from jitnorm.jit.spec import LAUNCHER

DOCKERFILE = ROOT / "examples" / "container" / "Dockerfile"
ON_CPU = {"WARMUP": "--config /opt/model/config.json --device cpu"}
INSTALLS = ("apt-get ", "pip install ", "python -m venv ")
SHIM = """#!/bin/sh
exec {python} -c 'import sys, _jitnorm_command; sys.argv[0] = "jitnorm"; _jitnorm_command.main()' "$@"
"""


class Stage(NamedTuple):
    """A stage of the Dockerfile: the stage that it starts from, and its other instructions in their order."""

    base: str
    steps: list[tuple[str, str]]


def stages() -> dict[str, Stage]:
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", "")
    found: dict[str, Stage] = {}
    current: list[tuple[str, str]] = []
    for line in filter(str.strip, text.splitlines()):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            current = []
            found[name] = Stage(base, current)
        else:
            current.append((instruction, rest))
    return found


class Image:
    """A stage that is being built in a folder, which is in the place of `/`."""

    def __init__(self, folder: Path, tools: Path, arguments: dict[str, str], images: dict[str, Image]) -> None:
        self.root = folder
        self.environment = {"PATH": str(tools), "PYTHONPATH": str(Path(jitnorm.__file__).parents[1])}
        self.environment |= {"HOME": "/nonexistent", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.command: list[str] = []
        self.output = ""  # of the last command
        self._arguments = arguments
        self._images = images

    def placed(self, text: str) -> str:
        """Return a command or a path with the folder in the place of `/`."""
        return text.replace("/opt/", f"{self.root}/opt/")

    def build(self, steps: list[tuple[str, str]]) -> None:
        for instruction, rest in steps:
            getattr(self, f"_{instruction.lower()}")(rest)

    def _arg(self, rest: str) -> None:
        name, _, value = rest.partition("=")
        (default,) = shlex.split(value)
        self.environment[name] = self.placed(self._arguments.get(name, default))

    def _env(self, rest: str) -> None:
        name, _, value = rest.partition("=")
        if name != "PATH":
            self.environment[name] = self.placed(value)

    def _copy(self, rest: str) -> None:
        source, target = rest.split()[-2:]
        if source.startswith("dist/"):
            return
        origin = re.match(r"--from=(\w+) ", rest)
        place = Path(self._images[origin[1]].placed(source)) if origin else ROOT / source
        Path(self.placed(target)).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if place.is_dir() else shutil.copy)(place, self.placed(target))

    def _run(self, rest: str) -> None:
        if not rest.startswith(INSTALLS):
            self.output = self.call(["/bin/sh", "-c", self.placed(rest)])

    def _user(self, rest: str) -> None:
        """Check that another user could read every file that was copied, instead of changing the user."""
        for path in self.root.rglob("*"):
            needed = stat.S_IROTH | (stat.S_IXOTH if path.is_dir() else 0)
            assert path.stat().st_mode & needed == needed and not path.stat().st_mode & 0o022, path

    def _cmd(self, rest: str) -> None:
        self.command = [self.placed(word) for word in json.loads(rest)]

    def call(self, command: list[str], **changes: str | None) -> str:
        environment = {name: value for name, value in {**self.environment, **changes}.items() if value is not None}
        found = shutil.which(command[0], path=environment["PATH"])
        done = subprocess.run([found, *command[1:]], env=environment, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(f"{command} exits with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout


@pytest.fixture
def built(tmp_path, monkeypatch):
    """Return a function that builds all stages with some build arguments."""

    def build(arguments: dict[str, str]) -> dict[str, Image]:
        tools = tmp_path / "bin"
        tools.mkdir()
        (tools / "jitnorm").write_text(SHIM.format(python=sys.executable))
        (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        for tool in tools.iterdir():
            tool.chmod(0o755)
        (tools / "chmod").symlink_to(shutil.which("chmod"))
        images: dict[str, Image] = {}
        for name, stage in stages().items():
            image = images[name] = Image(tmp_path / name, tools, arguments, images)
            if stage.base in images:
                shutil.copytree(images[stage.base].root, image.root)
            if name == "kernels":
                image.environment["PATH"] += f":{os.environ['PATH']}"
            image.build(stage.steps)
        return images

    # The folders of an image are readable for all users.
    before = os.umask(0o022)
    tmp_path.chmod(0o755)
    yield build
    os.umask(before)


@pytest.mark.slow
def test_the_image_serves_what_was_built_with_it(built):
    images = built(ON_CPU)
    serve = images["serve"]
    assert not shutil.which("c++", path=serve.environment["PATH"])
    assert serve.call(serve.command) == "ready on cpu\n"
    assert len(list(Cache(serve.root / "opt" / "kernels").entries())) > 5
    with pytest.raises(RuntimeError, match="JITNORM_DISABLE_JIT forbids building it"):
        serve.call(serve.command, JITNORM_PREBUILT_DIR=None)


@pytest.mark.slow
@pytest.mark.nvcc
def test_the_default_kernels_are_built(built):
    serve = built({})["serve"]
    kernels = {entry.path.parent.name for entry in Cache(serve.root / "opt" / "kernels").entries()}
    launcher = {name for name in kernels if name.startswith(f"{LAUNCHER.name}.")}  # without a wheel it is built here
    assert {name.split(".")[1] for name in kernels - launcher} == {"sm_90a"}
    assert serve.output.splitlines()[-1].endswith(" kernels, 0 bad")


def test_the_last_stage_installs_no_compiler():
    found = stages()
    assert list(found) == ["base", "kernels", "serve"] and found["serve"].base == found["kernels"].base == "base"
    installs = {name: " ".join(rest for step, rest in stage.steps if step == "RUN") for name, stage in found.items()}
    assert re.search(r"\bg\+\+", installs["kernels"]) and "nvcc" not in installs["kernels"]
    assert not re.search(r"g\+\+|nvcc|build-essential", installs["base"] + installs["serve"])


def test_every_step_is_run_or_installs_something():
    """A command of another kind would be run by the test above, and this shows which are not."""
    runs = [rest for stage in stages().values() for step, rest in stage.steps if step == "RUN"]
    assert [rest.split()[:2] for rest in runs if not rest.startswith(INSTALLS)] == [
        ["jitnorm", "warmup"],
        ["chmod", "-R"],
        ["jitnorm", "cache"],
    ]


def test_the_default_arguments_are_those_of_warm_up():
    ((_, default),) = [step for step in stages()["kernels"].steps if step[0] == "ARG"]
    (words,) = shlex.split(default.partition("=")[2])
    command = main.get_command(click.Context(main), "warmup")
    assert command.make_context("warmup", shlex.split(words)).params["arch"] == ("9.0a",)
