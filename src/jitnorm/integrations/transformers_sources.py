"""Recognise the classes of Hugging Face models whose forward this package replaces, by the source of that forward.

A class is known if it is in transformers, has one of the names below, and its forward has the source that was read when
its replacement was written. Comments, annotations, docstrings and formatting do not count, so that a source stays known
as long as it computes the same. The hashes are those of transformers 5.5 to 5.23; 5.5, 5.20 and 5.23 are tested.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch

_DECODER_LAYER = "78cccefbc3e539be"
_GATED_MLP = "ec1a335bf2e28adb"
_QWEN_MODEL = "63ca85e277198d93"

_ROTARY = {"04548c9de8cf5b25", "9fd3cfa41ea46eeb", "be8737681edae7d1"}

# The hashes that `hash_of` returns for the forward of each class.
KNOWN_FORWARDS = {
    "LlamaAttention": {"c2c7307599867771"},
    "MistralAttention": {"688693631c4d5fc6"},
    "Qwen2Attention": {"f2bdae810d8f311e"},
    "Qwen3Attention": {"ca2493960e22f948"},
    "Gemma3Attention": {"e926d6d6ce100f96"},
    "LlamaRotaryEmbedding": _ROTARY,
    "MistralRotaryEmbedding": _ROTARY,
    "Qwen2RotaryEmbedding": _ROTARY,
    "Qwen3RotaryEmbedding": _ROTARY,
    "Gemma3RotaryEmbedding": {"86b4b31747d1baff", "c456f4ecd3c1bdf2", "ff1a5e7fb0329dba"},
    "LlamaDecoderLayer": {_DECODER_LAYER},
    "MistralDecoderLayer": {_DECODER_LAYER},
    "Qwen2DecoderLayer": {_DECODER_LAYER},
    "Qwen3DecoderLayer": {_DECODER_LAYER},
    "Gemma3DecoderLayer": {"a8cda97dac7d641e"},
    "LlamaMLP": {_GATED_MLP},
    "MistralMLP": {_GATED_MLP},
    "Qwen2MLP": {_GATED_MLP},
    "Qwen3MLP": {_GATED_MLP},
    "Gemma3MLP": {_GATED_MLP},
    "LlamaModel": {"b3a779341b0766fb"},
    "MistralModel": {"be68499dccf5325b"},
    "Qwen2Model": {_QWEN_MODEL},
    "Qwen3Model": {_QWEN_MODEL},
    "Gemma3TextModel": {"55db1242435fcfa5", "4e7f8af7004aa47c"},
}


_known: dict[type, bool] = {}


def is_known(cls: type) -> bool:
    """Return whether `cls` is a class of transformers whose forward is the one that its replacement was written for."""
    if cls not in _known:
        function = _unwrap(getattr(cls, "forward", None))
        is_listed = function is not None and hash_of(function) in KNOWN_FORWARDS.get(cls.__name__, ())
        _known[cls] = is_listed and cls.__module__.startswith("transformers.")
    return _known[cls]


def reason_if_unknown(module: torch.nn.Module) -> str | None:
    """Return why the forward of a module is not the known one of its class, or None if it is."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if is_known(type(module)):
        return None
    return f"the forward of {type(module).__name__} is not the one of transformers that jitnorm knows"


def hash_of(function: Callable[..., Any]) -> str | None:
    """Return a hash of what a function computes according to its source, or None if its source is not available."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, ValueError, SyntaxError):
        return None
    if not isinstance(tree, ast.FunctionDef):
        return None
    return hashlib.sha256(_dump(tree).encode()).hexdigest()[:16]


def _unwrap(function: Any) -> Any:
    """Return what the decorators of transformers and torch wrap, or None if another package has wrapped it."""
    while getattr(function, "__globals__", {}).get("__name__", "").startswith(("transformers.", "torch.")):
        if not hasattr(function, "__wrapped__"):
            return function
        function = function.__wrapped__
    return None


# Fields of syntax trees that do not change a result, and fields that only some versions of Python have.
_IGNORED_FIELDS = {"annotation", "ctx", "decorator_list", "kind", "returns", "type_comment", "type_params"}


def _dump(node: Any) -> str:
    """Return a syntax tree as text that is the same in all versions of Python."""
    if isinstance(node, list):
        return f"[{','.join(map(_dump, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        return _dump(ast.Assign([node.target], node.value))
    fields = {name: value for name, value in ast.iter_fields(node) if name not in _IGNORED_FIELDS and value is not None}
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        fields["body"] = node.body[1:]
    return f"{type(node).__name__}({','.join(f'{name}={_dump(value)}' for name, value in fields.items())})"
