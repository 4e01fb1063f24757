"""The documentation speaks of what is there, and of all of it."""

import re
from pathlib import Path

import pytest
import typer.main

from farrier.agent.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app)


@pytest.mark.parametrize("name", sorted(COMMANDS.commands))  # type: ignore[attr-defined]
def test_every_command_is_in_the_readme(name: str) -> None:
    assert f"`farrier {name} " in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_named_in_the_docs_exist(page: Path) -> None:
    known = {"--debug", "--version", "--help", "--json"}
    commands = [COMMANDS, *COMMANDS.commands.values()]  # type: ignore[attr-defined]
    for command in commands:
        for inner in [command, *getattr(command, "commands", {}).values()]:
            known |= {option for parameter in inner.params for option in parameter.opts + parameter.secondary_opts}
    lines = [line for line in page.read_text().splitlines() if "farrier " in line]
    named = {option for line in lines for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)}
    assert named <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_the_docs_exist(page: Path) -> None:
    for path in re.findall(r"`((?:agent|runtime|targets|plugins|packaging|tests|public)/[\w./]+)`", page.read_text()):
        assert (ROOT / path).exists(), path
