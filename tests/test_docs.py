"""What people read is true: links lead somewhere, flags and figures are all there, messages are ones that we say."""

import argparse
import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from sgl_vtensor.cli.main import parser
from sgl_vtensor.config import VTensorConfig

CHECKOUT = Path(__file__).parent.parent
PAGES = sorted(
    [*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/*.md"), *CHECKOUT.glob("bench/*.md"), *CHECKOUT.glob("kernels/*.md")]
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_files_named_exist(page: Path) -> None:
    for name in re.findall(
        r"`((?:sgl_vtensor|kernels|tests|bench|examples|docs|tools|dashboards)/[\w./-]+)`", page.read_text()
    ):
        if "NAME" not in name:
            assert (CHECKOUT / name).exists(), f"{page.name} names {name}"


def test_every_option_is_explained() -> None:
    options = (CHECKOUT / "docs/options.md").read_text()
    for field in fields(VTensorConfig):
        assert f"`--vtensor-{field.name.replace('_', '-')}" in options
        assert f"`SGL_VTENSOR_{field.name.upper()}" in options
    named = re.findall(r"`--vtensor-([a-z-]+)", options)
    assert {name.replace("-", "_") for name in named} <= {field.name for field in fields(VTensorConfig)}


def test_every_command_is_explained() -> None:
    options = (CHECKOUT / "docs/options.md").read_text()
    commands = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert set(re.findall(r"^\| `sgl-vtensor (\w+)", options, re.MULTILINE)) == set(commands.choices)


def _said() -> list[str]:
    """The constant parts of all strings in our sources."""
    said = []
    for path in CHECKOUT.glob("sgl_vtensor/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    return said


def test_troubleshooting_has_messages_that_we_say() -> None:
    text = (CHECKOUT / "docs/troubleshooting.md").read_text()
    headings = re.findall(r"^\*\*(.+?)\*\*", text, re.MULTILINE)
    messages = [message for heading in headings for message in re.findall(r"`([^`]+)`", heading)]
    assert len(messages) > 10
    said = "\n".join(_said())
    for message in messages:
        assert message in said, f"nothing of ours says {message!r}"
