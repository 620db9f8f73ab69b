"""Save compiled kernels as bytes and load them elsewhere, as beside a model's checkpoint."""

from __future__ import annotations

import fnmatch

__all__ = ["load", "save"]


def save(pattern: str = "*") -> bytes:
    """Return the kernels of the caches that this process uses, as bytes for `load`.

    The bytes are those of `jitnorm cache export`, which depend on the kernels alone. Each kernel is compared with the
    hash that was recorded when it was built.

    Args:
        pattern: Which kernels to save, as a shell pattern for their ids, such as `"rmsnorm_*"` or `"*.sm_90a.*"`.
            `jitnorm cache ls --format json` prints the ids.

    Returns:
        The file's content. It contains no kernel if there is none that matches.

    Raises:
        TypeError: `pattern` is not a str.
        ValueError: The kernels are more than a file may contain.
        RuntimeError: A kernel is damaged.
        OSError: A kernel cannot be read at the moment.
    """
    from jitnorm.jit import archive, locations  # here, as `import jitnorm` would pay for it

    if not isinstance(pattern, str):
        raise TypeError(f"pattern must be a str, got {type(pattern).__name__}")
    entries = [entry for cache in locations.in_search_order() for entry in cache.entries()]
    return archive.write(archive.pack(entry for entry in entries if fnmatch.fnmatchcase(entry.label, pattern)))


def load(data: bytes) -> list[str]:
    """Add the kernels that `save` or `jitnorm cache export` returned to the cache of this process.

    Everything is checked before anything is written; if any part is refused, nothing is added. Kernels that the cache
    has already stay as they are; damaged ones are replaced. Nothing is loaded or executed, but kernels are machine
    code, which runs when they are called: load only data that you trust.

    A call uses a kernel if jitnorm, tvm-ffi and the architecture are those that it was built for, and the compilers of
    this machine have the same versions. Where there is no compiler, or JITNORM_DISABLE_JIT is set, the compilers do not
    matter.

    Args:
        data: What `save` returned.

    Returns:
        The ids of all kernels in `data`, which are now in the cache.

    Raises:
        TypeError: `data` is not bytes.
        ValueError: `data` is not an intact export. The message names the part that is refused.
        RuntimeError: The cache cannot be written.
    """
    from jitnorm.jit import archive, locations

    if not isinstance(data, bytes):
        raise TypeError(f"data must be bytes, got {type(data).__name__}")
    packed = archive.read(data)
    archive.add(locations.writable(), packed)
    return [entry.label for entry in packed]
