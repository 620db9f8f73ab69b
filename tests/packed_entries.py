"""Cache entries made by hand, for tests of what is done with entries as a whole."""

from __future__ import annotations

import hashlib
import json

from jitnorm.jit import toolchain
from jitnorm.jit.archive import PackedEntry, checked
from jitnorm.jit.entry import MANIFEST

COMPILERS = {"c++": "g++ 12", "nvcc": "13.0"}
TOOLCHAIN = toolchain.key_of(COMPILERS)


def fake(
    name: str = "rmsnorm_64_bf16", arch: str = "sm_90a", content: bytes = b"machine code", **fields
) -> PackedEntry:
    """Return an entry that is small and correct, although its library is none."""
    digest, key = hashlib.sha256(content).hexdigest(), "0123456789abcdef"
    library = f"{name}-{digest[:16]}.so"
    manifest = {
        "name": name,
        "arch": arch,
        "key": key,
        "compilers": COMPILERS,
        "tvm_ffi": "0.1.2",
        "jitnorm": "0.1.0",
        "library": library,
        "sha256": digest,
        "size": len(content),
        **fields,
    }
    text = json.dumps(manifest, indent=2).encode() + b"\n"
    contents = {MANIFEST: text, "module.cu": b"// the source\n", library: content}
    return checked(f"{name}.{arch}.{key}/{TOOLCHAIN}", contents)
