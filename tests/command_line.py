"""`python -m checkpoints_tools` called as its users call it."""

import sys

import pytest

from checkpoints_tools import __main__ as commands


def call(*arguments):
    """Exit status of the command."""
    return commands.run(commands.parse_args(list(map(str, arguments))))


def error_of(monkeypatch, *arguments):
    """The end of commands that fail, as users see it."""
    monkeypatch.setattr(sys, "argv", ["checkpoints_tools", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        commands.main()
    message = str(caught.value.code)
    assert message.startswith("error: ")
    return message
