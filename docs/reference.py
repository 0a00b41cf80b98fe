"""Makes the pages of docs/reference/ when mkdocs builds the site: from docstrings and gin files.

`pages` needs the standard library alone, and reads files without importing them; mkdocstrings
renders the members that the pages name.
"""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "tnt_jax"
GIN_CONFIGS = ROOT / "gin_configs"
PROGRAMS = (
    *("train", "generate", "annotate", "localize", "evaluate", "report"),
    *("patch", "pipeline", "sweep", "convert", "preferences", "prepare", "precompile"),
)
# Folder of gin files -> what they are.
GIN_FOLDERS = {
    "runs": "Run files: what a program does. Every setting is a macro: `--gin.NAME=VALUE`.",
    "models": "Model files: the network. `from_checkpoint.gin` takes it from the checkpoint.",
    "objectives": "Objective files: the loss of a token. What they mean is in"
    " [The objective](../objective.md).",
    "experiments": "Experiments: whole runs, each with what it shows and the command.",
    "t5x": "For T5X's own program, `python -m t5x.train`.",
}

_MACRO = re.compile(r"^([A-Z][A-Z0-9_]*)\s*=\s*(.*)$")
_INCLUDE = re.compile(r"""^include\s+["'](.+?)["']""")


def on_files(files, config):
    """Called by mkdocs: adds the pages to the files of docs/."""
    from mkdocs.structure import files as mkdocs_files  # only a build has it

    for path, text in pages().items():
        files.append(mkdocs_files.File.generated(config, path, content=text))
    return files


def pages() -> dict[str, str]:
    """Markdown by path within docs/."""
    found = {"reference/programs.md": _programs()}
    for folder, what in GIN_FOLDERS.items():
        found[f"reference/gin_{folder}.md"] = _gin_files(folder, what)
    modules = sorted(
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if path.stem != "__init__"
    )
    for module in modules:
        found[f"reference/modules/{module}.md"] = _module(module)
    found["reference/index.md"] = _index(modules)
    return found


def _parsed(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text("utf-8"))


def _summary(module: str) -> str:
    return (ast.get_docstring(_parsed(module)) or "").partition("\n")[0]


def _index(modules: list[str]) -> str:
    lines = [
        "# Reference",
        "",
        "Made from the docstrings and gin files of this version.",
        "",
        "- [Programs](programs.md): what each does, and the arguments of its function",
        *(
            f"- [gin_configs/{folder}](gin_{folder}.md)"
            for folder in GIN_FOLDERS
        ),
        "",
        "## Modules",
        "",
        "| `tnt_jax.` | |",
        "|---|---|",
        *(f"| [{name}](modules/{name}.md) | {_summary(name)} |" for name in modules),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _programs() -> str:
    parts = [
        "# Programs",
        "Each is `python -m tnt_jax.NAME`; `--help` prints what is here, with the flags, the"
        " settings that each run file needs and, after `--gin_file=...`, all that it sets.",
        "Exit status: 0 is done; 2, with one line on stderr, is something that you can mend; 75 is"
        " stopped by SIGTERM, and the same command goes on; 130 is interrupted; 1 with one line:"
        " another process of the run is gone. Any other failure keeps its traceback.",
    ]
    for name in PROGRAMS:
        parts += [
            f"## {name}",
            f"```text\n{ast.get_docstring(_parsed(name))}\n```",
            f"::: tnt_jax.{name}.{name}\n    options:\n      heading_level: 3",
        ]
    return "\n\n".join(parts) + "\n"


def _module(module: str) -> str:
    """The docstring, and every public class, function and constant that has one."""
    tree = _parsed(module)
    text = ast.get_docstring(tree) or ""
    if module in PROGRAMS:
        text = f"```text\n{text}\n```"
    members = [
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    ]
    parts = [f"# tnt_jax.{module}", text, *(f"::: tnt_jax.{module}.{name}" for name in members)]
    return "\n\n".join(parts) + "\n"


def _gin_files(folder: str, what: str) -> str:
    parts = [f"# gin_configs/{folder}", what]
    for path in sorted((GIN_CONFIGS / folder).glob("*.gin")):
        name = f"{folder}/{path.name}"
        parts.append(f"## {name}")
        if folder == "runs" and (settings := _settings(path)):
            parts.append(_table(settings, path.name))
        parts.append(f"```python\n{path.read_text('utf-8').strip()}\n```")
    return "\n\n".join(parts) + "\n"


def _settings(path: pathlib.Path) -> dict[str, tuple[str, str, str]]:
    """Macro -> (value, comment, file) of a run file and what it includes; later ones win."""
    found: dict[str, tuple[str, str, str]] = {}
    above: list[str] = []
    for line in path.read_text("utf-8").splitlines():
        if include := _INCLUDE.match(line):
            found |= _settings(GIN_CONFIGS / include[1])
        if macro := _MACRO.match(line):
            value, _, beside = macro[2].partition("  # ")
            comment = " ".join([*above, beside]).strip()
            before = found.get(macro[1], ("", "", ""))[1]
            found[macro[1]] = (value.strip(), comment or before, path.name)
        above = [*above, line.lstrip("# ")] if line.startswith("#") else []
    return found


def _table(settings: dict[str, tuple[str, str, str]], own: str) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|")

    lines = ["| setting | default | | from |", "|---|---|---|---|"]
    for name, (value, comment, file) in settings.items():
        shown = "*must be set*" if value == "%gin.REQUIRED" else f"`{cell(value)}`"
        source = "" if file == own else file
        lines.append(f"| `{name}` | {shown} | {cell(comment)} | {source} |")
    return "\n".join(lines)
