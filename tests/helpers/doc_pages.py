"""Blocks of code in README.md and docs/, and the commands in them."""

import dataclasses
import pathlib
import re
import shlex
import string

import markdown_it

ROOT = pathlib.Path(__file__).parents[2]


MARKDOWN = markdown_it.MarkdownIt("commonmark").enable("table")


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code of a page.

    Attributes:
        place: file and line, for messages.
        language: of a fence; "" where none is named.
        text: within.
    """

    place: str
    language: str
    text: str


def blocks(page):
    for token in MARKDOWN.parse(page.read_text("utf-8")):
        if token.type in ("fence", "code_block"):
            place = f"{page.relative_to(ROOT)}:{token.map[0] + 1}"
            yield Block(place, token.info.strip(), token.content)


def commands(text, variables):
    """The commands of a block as lists of words, with its variables and those of earlier blocks."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        words = shlex.split(string.Template(line).substitute(variables), comments=True)
        if words and all(re.match(r"\w+=", word) for word in words):
            variables.update(word.split("=", 1) for word in words)
        elif words:
            yield words
