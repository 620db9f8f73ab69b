"""The LD_PRELOAD library of `inject.c`, as the process that runs under it calls it."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
# The classes of calls, in the order of inject.c.
CLASSES = (
    *("open", "read", "write", "rename", "mkdir", "unlink", "stat", "flock", "fsync", "mmap", "mode", "list", "close"),
    "link",
)
ACTIONS = ("fail", "kill", "stop", "delay", "short")
ERRORS = (
    *("EIO", "ENOSPC", "ESTALE", "EACCES", "EPERM", "EMFILE", "ENFILE", "ETIMEDOUT", "EROFS", "EBADF", "EDQUOT"),
    *("ENOENT", "ENOTDIR", "ELOOP", "EBUSY", "ENOTEMPTY", "EEXIST", "EXDEV", "EFBIG", "ENOMEM", "ENAMETOOLONG"),
    *("EINVAL", "ENOSYS", "EOPNOTSUPP", "ENOLCK", "EAGAIN", "ETXTBSY", "EISDIR", "EHOSTDOWN", "EREMOTEIO"),
)


CLOSE_ERRORS = ("EIO", "ENOSPC", "EDQUOT")  # what a close can really end with, on NFS


@dataclass(frozen=True)
class Injection:
    """One fault: what happens to the n-th call on the folder, and to all after it where `repeat` is set."""

    classes: tuple[str, ...]
    nth: int
    action: str = "fail"
    error: str = "EIO"
    repeat: bool = False

    def __str__(self) -> str:
        what = self.error if self.action == "fail" else self.action
        classes = "any call" if self.classes == CLASSES else "+".join(self.classes)
        return f"{what} at call {self.nth}{' and all after' if self.repeat else ''} of {classes}"

    @property
    def _numbers(self) -> tuple[int, int, int, int, int]:
        met = [c for c in self.classes if c != "close" or self.action != "fail" or self.error in CLOSE_ERRORS]
        mask = sum(1 << CLASSES.index(name) for name in met)
        return mask, self.nth, getattr(errno, self.error), ACTIONS.index(self.action), int(self.repeat)

    def arm(self, folder: Path) -> None:
        """Lets the fault happen in this process, which runs under the library."""
        library().fault_arm(os.fsencode(folder), *self._numbers)

    def environment(self, folder: Path) -> dict[str, str]:
        """Return what lets it happen in the programs that this process starts."""
        return {"FAULT_ARM": ":".join(map(str, self._numbers)) + f":{folder}"}


def compile_library(folder: Path) -> Path:
    """Compile `inject.c` into `folder`."""
    output = folder / "inject.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", output, HERE / "inject.c", "-ldl"], check=True)
    return output


def library() -> ctypes.CDLL:
    """Return the library, which LD_PRELOAD has loaded into this process."""
    return ctypes.CDLL(os.environ["LD_PRELOAD"])
