"""The package keeps its layers: what imports what, what stays optional, what is declared."""

import ast
import contextlib
import functools
import importlib.metadata
import pathlib
import re
import subprocess
import sys

import gin
import pytest

from tnt_jax.runtime import program

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "tnt_jax"
GIN_CONFIGS = ROOT / "gin_configs"

# Rooms whose modules read text alone, and start without JAX; and those in them that do not.
TEXT_ROOMS = {"runtime", "tokenizers", "annotators", "evaluation"}
NEED_JAX = {
    "runtime.array_types",
    "runtime.processes",
}
# What a machine for numerics need not have.
NOT_FOR_NUMERICS = (
    "tensorflow", "tensorflow_datasets", "seqio", "gin", "sentencepiece", "jaxtyping", "beartype",
)  # fmt: skip

# What setup.py cannot declare: T5X is on no package index, and Apache Beam asks for packages that
# clash with ours. docs/howto_t5x.md says how to install them.
NOT_DECLARED = {"t5x", "apache_beam"}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported_names(module):
    """Every dotted name that the module imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}.py line {node.lineno}: write `from tnt_jax import`"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240
    )


def test_rooms_import_only_what_is_below_them():
    """The contracts of pyproject.toml, which `make lint` checks too."""
    # In a process of its own: it switches off the loggers that there are.
    done = run_python(
        "import sys; from importlinter import cli; sys.exit(cli.lint_imports(no_cache=True))"
    )
    assert done.returncode == 0, done.stdout


def test_module_names_are_unique():
    """A gin file, or a flag, names a module without its room."""
    names = [module.rpartition(".")[2] for module in MODULES if not module.endswith("__init__")]
    assert sorted(names) == sorted({*names})


@pytest.mark.parametrize("module", MODULES)
def test_no_list_is_copied_to_its_end_for_its_next_elements(module):
    """`rows[start:][:size]`, for one part after another, is quadratic in the number of rows."""
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Subscript):
            inner, outer = node.value.slice, node.slice
            is_rest = isinstance(inner, ast.Slice) and inner.upper is None
            takes_first = isinstance(outer, ast.Slice) and outer.lower is None
            assert not (is_rest and takes_first), (
                f"{module}.py line {node.lineno}: write [start : start + size]"
            )


def functions_of(module):
    """Every function and method of a module: its name, number of arguments, number of lines."""
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            gathered = [arguments.vararg, arguments.kwarg]
            number = len(named) + sum(each is not None for each in gathered)
            yield node.name, number, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("module", MODULES)
def test_functions_take_few_arguments_and_few_lines(module):
    """Settings travel as values of `training.settings` and the like, not one by one."""
    for name, num_arguments, num_lines in functions_of(module):
        assert num_arguments <= 12, f"{module}.{name} takes {num_arguments} arguments"
        assert num_lines <= 150, f"{module}.{name} has {num_lines} lines"


def test_training_fits_on_a_few_screens():
    (found,) = ((a, n) for name, a, n in functions_of("train") if name == "train")
    num_arguments, num_lines = found
    assert num_arguments <= 10
    assert num_lines < 120


# An entry that begins so says whose an argument is, or where to look, and not what it is.
SAYS_NOT_WHAT = re.compile(r"(of|as in|likewise)\b", re.IGNORECASE)


def documented_entries(module):
    """Every entry of `Args:` or `Attributes:` of a module: its name, and the text after it."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        docstring = ast.get_docstring(node) if isinstance(node, documented) else None
        for section in re.split(r"^(?=\S)", docstring or "", flags=re.MULTILINE):
            if re.match(r"(Args|Attributes):\n", section):
                yield from re.findall(r"^ {2}([*\w, ]+):\s+(.+)$", section, re.MULTILINE)


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_say_what_an_argument_is(module):
    """A reader who meets "seed: Of sampling." has to put the sentence together alone."""
    for name, text in documented_entries(module):
        assert not SAYS_NOT_WHAT.match(text), f"{module}: say what this is: {name}: {text}"


@pytest.mark.parametrize(
    "module",
    [name for name in MODULES if name.partition(".")[0] in TEXT_ROOMS and name not in NEED_JAX],
)
def test_text_modules_need_no_jax(module):
    top_level = {name.partition(".")[0] for name in imported_names(module)}
    assert not top_level & {"jax", "flax", "optax", "tensorflow", "seqio"}


# It reads the metadata of all that is installed.
packages_distributions = functools.cache(importlib.metadata.packages_distributions)


@pytest.mark.parametrize("module", MODULES)
def test_third_party_imports_are_declared(module):
    """What a module imports is in setup.py under its own name, not by luck of a dependency."""
    declared = set(
        re.findall(r'"([A-Za-z0-9_-]+)(?:\[\w+\])?[>=]=', (ROOT / "setup.py").read_text("utf-8"))
    )
    distributions = packages_distributions()
    for name in imported_names(module):
        package = name.partition(".")[0]
        if package in {"tnt_jax", *NOT_DECLARED, *sys.stdlib_module_names}:
            continue
        # One that is not installed (wandb, in tests) has the name of its package.
        names = {name.replace("_", "-") for name in distributions.get(package, [package])}
        assert declared & names, f"{module} imports {package}: declare it in setup.py"


def extras():
    """The extras of setup.py: their requirements without markers."""
    tree = ast.parse((ROOT / "setup.py").read_text("utf-8"))
    (found,) = (
        ast.literal_eval(keyword.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "extras_require"
    )
    return {
        extra: [requirement.partition(";")[0].strip() for requirement in requirements]
        for extra, requirements in found.items()
    }


def test_tests_have_the_libraries_that_users_get():
    """What an extra of theirs brings, "test" asks for in the same words."""

    def name(requirement):
        return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")

    def names(requirement):  # it, and what it brings by an extra of its own: `jax[tpu]`, libtpu
        yield name(requirement)
        if wanted := re.match(r"[\w.-]+\[(\w+)\]", requirement):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                for line in importlib.metadata.requires(name(requirement)) or []:
                    if re.search(rf"extra\s*==\s*['\"]{wanted[1]}['\"]", line):
                        yield name(line)

    found = extras()
    for_tests = found.pop("test")
    of_users = [
        requirement
        for extra, requirements in found.items()
        if extra != "docs"  # tools of ours
        for requirement in requirements
    ]
    for requirement in for_tests:
        same = [other for other in of_users if name(requirement) in names(other)]
        assert not same or requirement in same, f"test: {requirement}; users: {same}"


def test_numerics_need_only_jax_flax_and_optax():
    # And with the makers of batches, benchmarks/packing.py.
    numerics = [
        "data.batches",
        "data.examples",
        "data.layouts",
        "data.packing",
        "runtime.prefetch",
        "training.train_step",
    ]
    numerics += [name for name in MODULES if name.partition(".")[0] in ("models", "objectives")]
    numerics = [name.removesuffix(".__init__") for name in numerics]
    completed = run_python(
        f"""
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NOT_FOR_NUMERICS}:
            raise ImportError(f"{{name}} is not on this machine")

sys.meta_path.insert(0, Absent())
for module in {numerics}:
    importlib.import_module("tnt_jax." + module)
"""
    )
    assert completed.returncode == 0, completed.stderr


def test_importing_the_package_is_cheap():
    completed = run_python(
        "import sys; before = set(sys.modules); import tnt_jax; print(set(sys.modules) - before)"
    )
    assert completed.returncode == 0, completed.stderr
    assert ast.literal_eval(completed.stdout) == {"tnt_jax"}


# Those in t5x/ are for T5X's own program: tests/programs/test_t5x_plugin.py runs it with them.
GIN_FILES = sorted(path for path in GIN_CONFIGS.rglob("*.gin") if path.parent.name != "t5x")
MACRO_DEFINITION = re.compile(r"^([A-Z][A-Z0-9_]*)\s*=", re.MULTILINE)
MACRO_USE = re.compile(r"%([A-Z][A-Z0-9_]*)")
INCLUDE = re.compile(r"""^include\s+["'](.+?)["']""", re.MULTILINE)

each_gin_file = pytest.mark.parametrize(
    "path", GIN_FILES, ids=lambda path: str(path.relative_to(GIN_CONFIGS))
)


@pytest.fixture
def clean_gin():
    gin.clear_config()
    yield
    gin.clear_config()


@each_gin_file
def test_gin_file_parses(path, clean_gin):
    """Syntax, imports, and that every function and argument bound exists."""
    program.parse_gin_file(path)


def gin_text(path):
    return re.sub(r"#.*$", "", path.read_text("utf-8"), flags=re.MULTILINE)


def included_files(path):
    """The file itself and everything that it includes, at any depth."""
    files = {path}
    for name in INCLUDE.findall(gin_text(path)):
        found = [folder / name for folder in (ROOT, GIN_CONFIGS) if (folder / name).exists()]
        assert found, f"{path.relative_to(ROOT)} includes {name}, which is not there"
        files |= included_files(found[0])
    return files


@each_gin_file
def test_gin_macros_are_used(path):
    """gin accepts a misspelt macro silently, so each one defined must be read somewhere.

    "Somewhere" is a file that can meet this one: what it includes, and the files of every
    composition that includes it. Models and objectives also meet any run file, on the command line.
    """
    family = set().union(*(files for files in map(included_files, GIN_FILES) if path in files))
    if path.relative_to(GIN_CONFIGS).parts[0] in {"models", "objectives"}:
        family |= {other for other in GIN_FILES if other.parent.name == "runs"}
    used = set().union(*(MACRO_USE.findall(gin_text(other)) for other in family))
    unused = set(MACRO_DEFINITION.findall(gin_text(path))) - used
    assert not unused, f"defined but never read: {sorted(unused)}"
