"""The troubleshooting page has a row for every message of the package, and no others."""

from __future__ import annotations

import pytest

from documentation.pages import load

messages = load("docs/messages.py")
KNOWN = messages.fixes(messages.PAGE.read_text())


@pytest.fixture(scope="module")
def found():
    return messages.messages()


def test_every_message_has_a_row(found):
    assert len(found) > 200
    missing = {place: text for text, place in found.items() if text not in KNOWN}
    assert not missing, "python docs/messages.py lists them; --update rewords rows"


def test_every_row_is_a_message(found):
    assert not [text for text in KNOWN if text not in found]
    assert all(fix.strip() for fix in KNOWN.values())
    assert len(messages.rows(messages.PAGE.read_text())) == len(KNOWN)


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ("raise ValueError(f'a must be {x}, got {y!r}')", ["a must be …, got …"]),
        ("def f():\n    why = 'no luck' if x else f'{y} is bad'\n    raise E(why)", ["no luck", "… is bad"]),
        ("def no(x):\n    return E(f'{x} is wrong here')\nraise no(1)", ["… is wrong here"]),
        ("def why():\n    return 'because of rain'\nraise E(why())", ["because of rain"]),
        ("if problem := why():\n    raise E(problem)\ndef why(): return 'a reason'", ["a reason"]),
        ("raise E('one ' + str(x) + ' two')", ["one … two"]),
        ("log.warning('%s cannot be %d', x, y)", ["… cannot be …"]),
        ("warnings.warn(f'{x} is old', stacklevel=2)", ["… is old"]),
        ("raise E(str(error)) from error", []),
        ("raise", []),
    ],
)
def test_messages_are_found(tmp_path, monkeypatch, source, texts):
    (tmp_path / "module.py").write_text(source)
    monkeypatch.setattr(messages, "ROOT", tmp_path)
    assert [text for text, _ in messages.Package(tmp_path).messages()] == texts


def test_a_reworded_message_keeps_its_cure(monkeypatch):
    monkeypatch.setattr(messages, "messages", lambda: {"eps must not be negative, got …": "x.py:1"})
    page = "| `eps must be 0 or more, and not negative, got …` | Pass another. |\n| `unlike it` | Nothing. |\n"
    assert messages.updated(page) == "| `eps must not be negative, got …` | Pass another. |\n"
