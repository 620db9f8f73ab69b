"""List the messages of the package, and compare them with docs/guides/troubleshooting.md.

    python docs/messages.py            # print messages without a row, and rows without a message
    python docs/messages.py --update   # reword rows like the message, remove those without one

A message is the text of an exception, a warning, or a warning in the log, with "…" for each value in it. A row of a
table on the page is a message in backticks, and its fix.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guides" / "troubleshooting.md"
VALUE = "…"
_ROW = re.compile(r"^\| `(.+?)` \| (.+) \|$", re.MULTILINE)
_LOG_METHODS = ("warning", "error")


def fixes(page: str) -> dict[str, str]:
    """Return the fix for each message of the page."""
    return dict(rows(page))


def rows(page: str) -> list[tuple[str, str]]:
    """Return the rows of the page: each message and its fix."""
    return _ROW.findall(page)


def messages() -> dict[str, str]:
    """Return the first place in the code for each message, as `file:line`."""
    found: dict[str, str] = {}
    for text, place in [*Package(ROOT / "src" / "jitnorm").messages(), *_messages_of_cpp()]:
        text = _one_line(text)
        if re.search(r"[a-z]{2}", text.replace("jitnorm", "")):  # not one that only passes another text on
            found.setdefault(text, place)
    return found


def _one_line(text: str) -> str:
    """Return the text as the page writes it: one line, adjacent values as one, and no character that ends a cell."""
    return re.sub(rf"{VALUE}(\s*{VALUE})+", VALUE, " ".join(text.split())).replace("`", "'").replace("|", "/")


class Package:
    """The syntax trees of a package."""

    def __init__(self, folder: Path) -> None:
        self._trees = {file: ast.parse(file.read_text()) for file in sorted(folder.rglob("*.py"))}

    @cached_property
    def _functions(self) -> dict[str, list[ast.FunctionDef]]:
        """The functions and methods of each name."""
        found: dict[str, list[ast.FunctionDef]] = {}
        for tree in self._trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    found.setdefault(node.name, []).append(node)
        return found

    def messages(self) -> Iterator[tuple[str, str]]:
        """Yield the texts of `raise`, `warnings.warn`, `warn_once` and the logger's warnings and errors with places."""
        for file, tree in self._trees.items():
            for scope in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))]:
                for node in _walk_scope(scope):
                    for text in self._texts_of(node, scope):
                        yield text, f"{file.relative_to(ROOT)}:{node.lineno}"

    def _texts_of(self, node: ast.AST, scope: ast.AST) -> list[str]:
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            return self._texts_of_exception(node.exc, scope)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "warn_once":
            return self._texts(node.args[0], scope)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            called = ast.unparse(node.func)
            if called == "warnings.warn":
                return self._texts(node.args[0], scope)
            if re.search(r"log(ger)?$", called.rpartition(".")[0]) and node.func.attr in _LOG_METHODS:
                return [re.sub(r"%(\.\d)?[srdfg]", VALUE, text) for text in self._texts(node.args[0], scope)]
        return []

    def _texts_of_exception(self, call: ast.Call, scope: ast.AST) -> list[str]:
        name = ast.unparse(call.func).rpartition(".")[2]
        if name in self._functions:  # a function that makes the exception
            returned = [node.value for node in self._returns(name) if isinstance(node.value, ast.Call)]
            return [text for made in returned for text in self._texts_of_exception(made, made)] + self._arguments(
                call, scope
            )
        return self._arguments(call, scope)

    def _arguments(self, call: ast.Call, scope: ast.AST) -> list[str]:
        return [text for argument in call.args for text in self._texts(argument, scope) if " " in text.strip()]

    def _texts(self, node: ast.expr | None, scope: ast.AST) -> list[str]:
        """Return what an expression may be as text; nothing for one that is made elsewhere."""
        if isinstance(node, ast.Constant):
            return [node.value] if isinstance(node.value, str) else []
        if isinstance(node, ast.JoinedStr):
            return ["".join(_part(part, scope) for part in node.values)]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self._texts(node.left, scope), self._texts(node.right, scope)
            return [a + b for a in left or [VALUE] for b in right or [VALUE]] if left or right else []
        if isinstance(node, ast.IfExp):
            return self._texts(node.body, scope) + self._texts(node.orelse, scope)
        if isinstance(node, ast.BoolOp):
            return [text for value in node.values for text in self._texts(value, scope)]
        if isinstance(node, ast.Name):
            return [text for value in _assigned(node.id, scope) for text in self._texts(value, ast.Module([], []))]
        if isinstance(node, ast.Call):  # of a function of the package that makes the text
            name = ast.unparse(node.func).rpartition(".")[2]
            return [
                text
                for made in self._returns(name)
                for text in self._texts(made.value, ast.Module([], []))
                if " " in text
            ]
        return []

    def _returns(self, name: str) -> list[ast.Return]:
        return [node for f in self._functions.get(name, []) for node in _walk_scope(f) if isinstance(node, ast.Return)]


def _walk_scope(scope: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a module or function, without those of the functions in it."""
    for child in ast.iter_child_nodes(scope):
        if not isinstance(child, ast.FunctionDef):
            yield child
            yield from _walk_scope(child)


def _assigned(name: str, scope: ast.AST) -> Iterator[ast.expr]:
    """Yield what is assigned to a name in a scope."""
    for node in _walk_scope(scope):
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.NamedExpr) else targets
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            yield node.value


def _part(part: ast.expr, scope: ast.AST) -> str:
    """Return the text of a part of an f-string: its own, that of a variable with one constant text, or VALUE."""
    if isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name):
        name = part.value.id
        values = list(_assigned(name, scope))
        grows = any(isinstance(node, ast.AugAssign) and ast.unparse(node.target) == name for node in _walk_scope(scope))
        part = values[0] if len(values) == 1 and not grows else part
    return part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else VALUE


def _messages_of_cpp() -> Iterator[tuple[str, str]]:
    """Yield the formats of messages that begin with "jitnorm: ", and the reasons that are put into them."""
    for file in sorted(file for ending in ("h", "cc") for file in (ROOT / "csrc").rglob(f"*.{ending}")):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            for what, reason in re.findall(r'raise\w*\("(cannot [^"]+)", (?:"([^"]+)")?', line):
                yield f"jitnorm: {what} {VALUE}: {reason or VALUE}", f"{file.relative_to(ROOT)}:{number}"
            for text in re.findall(r'"(jitnorm: [^"]+ [a-z][^"]+)"|return "([^"]+ [^"]+)"', line):
                yield re.sub(r"%[sd]", VALUE, "".join(text)), f"{file.relative_to(ROOT)}:{number}"


def updated(page: str) -> str:
    """Return the page without rows that match no message, reworded if a message without a row is similar."""
    missing = messages().keys() - fixes(page).keys()
    for old in sorted(fixes(page).keys() - messages().keys()):
        close = difflib.get_close_matches(old, missing, n=1, cutoff=0.6)
        if close:
            page = page.replace(f"| `{old}` |", f"| `{close[0]}` |")
        else:
            page = re.sub(rf"^\| `{re.escape(old)}` \|.*\n", "", page, flags=re.MULTILINE)
        missing -= {*close}
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="reword and remove rows")
    if parser.parse_args().update:
        PAGE.write_text(updated(PAGE.read_text()))
    known, found = fixes(PAGE.read_text()), messages()
    missing = [f"{place}: no row for `{text}`" for text, place in found.items() if text not in known]
    obsolete = [f"{PAGE.relative_to(ROOT)}: no message `{text}`" for text in known if text not in found]
    print("\n".join([*missing, *obsolete, f"{len(found)} messages, {len(missing)} without a row"]))
    return 1 if missing or obsolete else 0


if __name__ == "__main__":
    raise SystemExit(main())
