"""Give replaced modules of vLLM a class whose bases are one of the plugin's and vLLM's own."""

from __future__ import annotations

import sys
from typing import Any

_classes: dict[tuple[type[Any], type[Any]], type[Any]] = {}


def replace_class(module: Any, base: type[Any]) -> None:
    """Give a module a class whose forward is that of `base`. Its parameters, hooks and position stay.

    Args:
        module: of vLLM.
        base: a class of the plugin with a forward. The new class is in its Python module, where pickle looks for it.
    """
    original = type(module)
    if (base, original) not in _classes:
        namespace = vars(sys.modules[base.__module__])
        name = f"Jitnorm{original.__name__}"
        if name in namespace:  # that of another class with this name
            name = f"Jitnorm_{original.__module__.replace('.', '_')}_{original.__name__}"
        attributes = {"_jitnorm_original": original, "__module__": base.__module__, "__doc__": original.__doc__}
        _classes[base, original] = namespace[name] = type(name, (base, original), attributes)
    module.__class__ = _classes[base, original]
