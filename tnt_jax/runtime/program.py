"""How a program (`python -m tnt_jax.train` and the others) starts.

A program is a module with a docstring, which `--help` prints, and one function of keyword-only
arguments, which gin binds. The module ends with

    if __name__ == "__main__":
        program.run("tnt_jax.train", "train")

Settings that cannot work are found before anything heavy is imported: the gin files are read once
as text (`gin_files`), and only then by gin, which imports what they name.
"""

import argparse
import ast
import copy
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import logging
import os
import pathlib
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import absl.logging
import gin
from gin import config as gin_config

from tnt_jax.runtime import (
    failures,
    gin_checks,
    gin_files,
    operative_config,
    preemption,
    processes,
    quiet_tensorflow,
)
from tnt_jax.runtime.errors import UsageError

# ---------------------------------------------------------------------------------------------
# A program's output is its own: libraries speak from warnings on.
# ---------------------------------------------------------------------------------------------

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# It only reads data, and would claim a GPU's whole memory.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
absl.logging.set_verbosity(absl.logging.WARNING)

quiet_tensorflow.install()


# ---------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------


def _is_not_said_twice(record: logging.LogRecord) -> bool:
    """Drops Orbax's tracebacks of what its threads raise: `run` says it in a line."""
    is_orbaxs = bool(record.exc_info) and "orbax" in record.pathname
    return not (is_orbaxs or record.name == "asyncio")


@functools.cache  # once for a process
def _drop_reads_left_alone() -> None:
    """Orbax gathers its reads, and leaves the others where one fails.

    Whenever Python comes upon them, to its very end, pages of tracebacks would bury the message.
    """
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def _spell_out_what_cannot_be_printed() -> None:
    """Prints escapes for signs that the locale lacks, so that no run ends for them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


# Whoever sets one of these has decided where JAX computes, or says that a TPU is here.
_CHOICES = (
    *("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "PJRT_NAMES_AND_LIBRARY_PATHS"),
    *("JAX_FORCE_TPU_INIT", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID"),
)
_GOOGLE = "0x1ae0"  # on the PCI bus
_OTHER_DEVICES = {"0x001f", "0x0042"}  # of Google that are no TPU: a disk, a network card


def _keep_libtpu_quiet() -> None:
    """Without a TPU, JAX computes on the CPU and does not ask libtpu for one.

    libtpu is installed on such a machine for `precompile`. Asked for a TPU that is not there, it
    prints pages. In doubt nothing is changed: JAX then looks for what there is.
    """
    libtpu = importlib.util.find_spec("libtpu")
    if libtpu is None or _has_tpu() or any(os.environ.get(name) for name in _CHOICES):
        return
    # libtpu names itself here when JAX is imported.
    library = os.environ.get("TPU_LIBRARY_PATH")
    if library and str(pathlib.Path(library).parent) not in (
        libtpu.submodule_search_locations or ()
    ):
        return
    others = importlib.metadata.entry_points(group="jax_plugins")
    if others or importlib.util.find_spec("jax_plugins") is not None:  # a GPU's, say
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if jax := sys.modules.get("jax"):  # has read its environment already
        jax.config.update("jax_platforms", "cpu")


def _has_tpu(root: pathlib.Path = pathlib.Path("/")) -> bool:
    """Whether a TPU may be here, by what is in /dev and on the PCI bus."""
    if any(root.glob("dev/accel*")) or any(root.glob("dev/vfio/[0-9]*")):
        return True
    try:
        return any(
            vendor.read_text("utf-8").strip() == _GOOGLE
            and (vendor.parent / "device").read_text("utf-8").strip() not in _OTHER_DEVICES
            for vendor in root.glob("sys/bus/pci/devices/*/vendor")
        )
    except OSError:
        return True


def run(
    module_name: str,
    function_name: str,
    arguments: Sequence[str] | None = None,
    *,
    flags: Sequence[str] = (),
    needs_all: bool = True,
    processes_run: processes.Kind = processes.Kind.ALONE,
    status_of: Callable[[Any], int] = lambda result: 0,
) -> NoReturn:
    """Runs a program with its command line, and exits.

    Exit status 0: done, or what `status_of` says. 2, with one line on stderr: something that the
    user can mend (a `UsageError`, a setting that gin refuses, a path that does not work, a full
    disk, too little memory). 75: stopped by SIGTERM, and the same command goes on (`preemption`).
    130: interrupted. 1 with one line: another process of the run is gone (`processes`). Any other
    exception is our own defect and keeps its traceback.

    Args:
        module_name: full name of the program's module, which `python -m` knows only as `__main__`:
            gin files refer to the function by its real name, so that is what is called.
        function_name: the function in it; every argument is keyword-only.
        arguments: the command line; `sys.argv[1:]` by default.
        flags: arguments of the function that are flags of their own: `--NAME=VALUE`.
        needs_all: whether every setting that the gin files require must be given.
        processes_run: how the program runs where there are several processes.
        status_of: the exit status of a program that is done, by what its function returned.
    """
    # `force`: some library has set a format of its own when it was imported.
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_not_said_twice)
    _drop_reads_left_alone()
    _spell_out_what_cannot_be_printed()
    _keep_libtpu_quiet()
    preemption.install()
    given = sys.argv[1:] if arguments is None else arguments
    seconds = 10.0
    try:
        status, message = _outcome(
            module_name, function_name, given, flags, needs_all, processes_run, status_of
        )
        if status:
            # What the signal raised, a library on the way may have taken for an error of its own:
            # TensorStore does, and a whole checkpoint would be called damaged.
            preemption.check("nothing is half written")
    except preemption.Preempted as stopped:  # also while an error was being explained
        status = preemption.EXIT_STATUS
        message = f"stopped by SIGTERM: {stopped}. The same command goes on."
        seconds = 60.0  # all are told, and one may be compiling
    preemption.ignore()
    if message is not None:
        print(f"{_name(module_name)}: {message}", file=sys.stderr)
        _give_up_stdout()
    if status:
        processes.end(status, seconds)
    sys.exit(status)


def _outcome(
    module_name: str,
    function_name: str,
    arguments: Sequence[str],
    own_flags: Sequence[str],
    needs_all: bool,
    processes_run: processes.Kind,
    status_of: Callable[[Any], int],
) -> tuple[int, str | None]:
    """Runs a program: its exit status and last words, if there are any."""
    status = 0
    try:
        configured = configure(module_name, function_name, arguments, own_flags, needs_all)
        if configured is not None:
            processes.start(function_name, processes_run)
            status = status_of(configured())
        sys.stdout.flush()  # what is wrong with it is said now, not when Python ends
    except KeyboardInterrupt:
        return 130, "interrupted. The same command goes on."
    except Exception as error:
        message = failures.explain(error)
        if message is not None:
            return failures.exit_status(error), f"error: {message}"
        if processes.count() == 1:
            raise
        traceback.print_exc()
        return 1, "error: a defect of this program, see above"
    return status, None


def _name(module_name: str) -> str:
    """The program's name for messages; with the process number if there are several."""
    if processes.count() == 1:
        return module_name
    return f"{module_name} (process {processes.index()} of {processes.count()})"


def _give_up_stdout() -> None:
    """Where stdout takes nothing more, a closed pipe or a full disk, Python would try again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def configure(
    module_name: str,
    function_name: str,
    arguments: Sequence[str],
    own_flags: Sequence[str] = (),
    needs_all: bool = True,
    *,
    is_all_chosen: bool = True,
) -> Callable[[], Any] | None:
    """All that `run` does before it calls the function: gin is given every setting, and asked.

    Args:
        module_name: full name of the program's module.
        function_name: the program's function in it.
        arguments: the command line.
        own_flags: arguments of the function that are flags of their own: `--NAME=VALUE`.
        needs_all: whether every setting that is required must be given.
        is_all_chosen: whether the optimizer and its rate are what the run will have: `patch` asks
            for the rest before it chooses them.

    Returns:
        The function with its settings; None where help was asked for, which is then printed.

    Raises:
        UsageError: a flag, a gin file or a setting does not fit. gin raises for others.
    """
    short_name = f"{module_name.rpartition('.')[2]}.{function_name}"
    own = {f"--{name}=": f"--gin.{short_name}.{name}=" for name in own_flags}
    for flag, setting in own.items():
        arguments = [
            setting + argument.removeprefix(flag) if argument.startswith(flag) else argument
            for argument in arguments
        ]
    flags = _Flags.parse(module_name, arguments)
    folders = _gin_folders(flags.search_folders)
    if flags.help:
        print(_help(module_name, function_name, flags, folders))
        return None

    settings = gin_files.Settings(folders)
    files = [settings.add_file(name, given_by="--gin_file") for name in flags.gin_files]
    for name, value in flags.bindings:
        settings.add_binding(name, value)
    settings.check(needs_all)
    operative_config.note_given(settings.files)
    unused = settings.unused_macros()
    if unused:
        print(f"{module_name}: warning: nothing reads {', '.join(unused)}", file=sys.stderr)

    module = importlib.import_module(module_name)
    gin.clear_config()
    for file in files:
        parse_gin_file(file, flags.search_folders)
    imports = settings.imports_for_bindings()
    for name, value in flags.bindings:
        try:
            gin.parse_config([*imports, f"{name} = {gin_files.as_gin(value)}"])
        except Exception as error:
            if failures.explain(error) is None:
                raise
            # The place in the text that we made up tells the user nothing.
            reason = str(error).partition("\n  In bindings string")[0]
            raise UsageError(f"--gin.{name}={value}: {reason}") from None
    _expand_home()

    function = getattr(module, function_name)
    try:
        configured = gin.get_configurable(function)
    except ValueError:  # no gin file refers to it
        configured = gin.external_configurable(function, module=module_name)
    missing = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is inspect.Parameter.empty
        and name not in gin.get_bindings(function, resolve_references=False)
    ]
    if missing:
        own = [_shown(file) for _, file in _run_files(module_name, function_name, folders)]
        raise UsageError(
            f"no gin file sets {', '.join(missing)}: pass a run file with "
            f"--gin_file={' or '.join(own) or '...'}, or set "
            + ", ".join(f"--gin.{short_name}.{name}=..." for name in missing)
        )
    if needs_all:  # others read what was set for another program
        gin_checks.check_used(function, [name for name, _ in flags.bindings])
    gin_checks.check_types()
    if needs_all:
        gin_checks.check_learning_rate(function)
        if is_all_chosen:
            names = [name for name, _ in flags.bindings]
            gin_checks.check_optax(function, names, settings.of_own_files())
        for name in settings.unneeded():  # gin asks for these, too
            gin.parse_config([*imports, f"{name} = None"])
        gin.finalize()  # refuses whatever is still required
    return configured


def bound_arguments(
    function: Callable[..., Any], names: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, Any]:
    """What gin would call a function with, for some of its arguments.

    Args:
        function: the function of a program.
        names: arguments of the function; those that gin does not bind are left out.
        optional: further ones, left out also where a setting that they need is not given.

    Raises:
        UsageError: gin binds none of them, or one is required and was not given.
    """
    try:
        bindings = gin.get_bindings(function, resolve_references=False)
    except ValueError:
        bindings = {}
    found = {}
    for name in (*names, *optional):
        if name not in bindings:
            continue
        value = copy.deepcopy(bindings[name])  # which is how gin evaluates what a value refers to
        if value is gin.REQUIRED and name in names:
            raise UsageError(f"settings are missing: no gin file and no flag sets {name}.")
        if value is not gin.REQUIRED:
            found[name] = value
    if not found:
        raise UsageError(
            f"expected the gin files of a {function.__name__} run, found none of its settings: add "
            "--gin_file=models/..., --gin_file=objectives/... and --gin_file=runs/train.gin."
        )
    return found


def parse_gin_file(
    path: str | os.PathLike, search_folders: Sequence[str | os.PathLike] = ()
) -> None:
    """Gives gin one file; `path` and what it includes are looked up as `--gin_file` is."""
    find = gin_files.Settings(_gin_folders(search_folders)).find
    # gin's own search takes a folder for a package and logs every place where it finds nothing.
    readers: Any = gin_config._FILE_READERS
    own = readers[:]
    readers[:] = [(lambda name: find(name).open(encoding="utf-8-sig"), lambda name: True)]
    try:
        gin.parse_config_file(os.fspath(path))
    finally:
        readers[:] = own


def _expand_home() -> None:
    """`~/` at the start of a setting is the home folder.

    A shell leaves it alone in `--gin.MODEL_DIR=~/run`, and of the libraries that open paths some
    expand it and others make a folder of that name.
    """
    for bindings in gin_config._CONFIG.values():
        for name, value in bindings.items():
            if isinstance(value, str) and value.startswith("~/"):
                bindings[name] = os.path.expanduser(value)  # noqa: PTH111 - a text as it is


def _gin_folders(search_folders: Sequence[str | os.PathLike]) -> list[pathlib.Path]:
    return [
        pathlib.Path(),
        *map(pathlib.Path, search_folders),
        gin_files.ROOT,
        gin_files.GIN_CONFIGS,
    ]


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


@dataclasses.dataclass
class _Flags:
    """The command line, taken apart.

    Attributes:
        gin_files: the values of `--gin_file`, in order.
        search_folders: the folders of `--gin_search_paths`.
        bindings: (name, value) of each `--gin.NAME=VALUE`, as given.
        help: whether `--help` was there.
        options: the text that explains the flags.
    """

    gin_files: list[str]
    search_folders: list[pathlib.Path]
    bindings: list[tuple[str, str]]
    help: bool
    options: str

    @classmethod
    def parse(cls, module_name: str, arguments: Sequence[str]) -> "_Flags":
        parser = _Parser(
            prog=f"python -m {module_name}",
            usage="%(prog)s --gin_file=FILE ... [--gin.NAME=VALUE ...]",
            add_help=False,
            allow_abbrev=False,
        )
        parser.add_argument(
            "--gin_file",
            action="append",
            default=[],
            metavar="FILE",
            help="settings; repeatable, later ones win. Looked for as given, then in "
            "--gin_search_paths, then in the project's gin_configs folder",
        )
        parser.add_argument(
            "--gin_search_paths",
            action="append",
            default=[],
            metavar="FOLDER[,FOLDER]",
            help="where else to look for gin files and what they include; repeatable",
        )
        parser.add_argument("--help", "-h", action="store_true", help="print this and exit")
        # Only for the help text: argparse cannot take a flag whose name is open.
        parser.add_argument(
            "--gin.NAME",
            metavar="VALUE",
            help="one setting: a macro of a gin file (--gin.BATCH_SIZE=32) or an argument "
            "(--gin.t5.T5Config.emb_dim=64); repeatable, wins over files. A text needs no quotes, "
            "and ~/ at its start is the home folder",
        )
        bindings, others = [], []
        for argument in arguments:
            if not argument.startswith("--gin."):
                others.append(argument)
                continue
            name, equals, value = argument.removeprefix("--gin.").partition("=")
            if not equals or not re.fullmatch(r"(\w+/)*\w+(\.\w+)*", name):
                raise UsageError(f"{argument}: expected --gin.NAME=VALUE")
            bindings.append((name, value))
        found = parser.parse_args(others)
        folders = [f for group in found.gin_search_paths for f in group.split(",") if f]
        return cls(
            gin_files=found.gin_file,
            search_folders=[pathlib.Path(folder) for folder in folders],
            bindings=bindings,
            help=found.help,
            options=parser.format_help(),
        )


def _help(
    module_name: str, function_name: str, flags: _Flags, folders: Sequence[pathlib.Path]
) -> str:
    """What the program does, its flags, what must and may be set, an example if none was given."""
    description = ast.get_docstring(_source(module_name)) or ""
    parts = [description, flags.options.strip()]
    example = None
    if flags.gin_files:
        given = [
            (
                settings := gin_files.Settings(folders),
                settings.add_file(name, given_by="--gin_file"),
            )
            for name in flags.gin_files
        ]
    else:
        given = _run_files(module_name, function_name, folders)
    for settings, file in given:
        required = settings.required()
        defaults = settings.defaults() if flags.gin_files else []
        if not required and not defaults:
            continue
        shown = _shown(file)
        comment = itertools.takewhile(
            lambda line: line.startswith("#"), file.read_text("utf-8").splitlines()
        )
        lines = [
            f"--gin_file={shown} {'needs' if required else 'sets, unless you do'}:",
            *(f"  {line.lstrip('# ')}" for line in comment),
            *(f"  --gin.{key}=..." for key in required),
            *(["and sets, unless you do:"] if required and defaults else []),
            *(f"  --gin.{key}={text}" for key, text in defaults),
        ]
        parts.append("\n".join(lines))
        if required and not example:
            example = f"python -m {module_name} --gin_file={shown} "
            example += " ".join(f"--gin.{key}=..." for key in required)
    if example and "python -m" not in description:
        parts.append(f"example:\n  {example}")
    if given and not flags.gin_files:
        parts.append("With a --gin_file, --help also lists every other setting, with its value.")
    return "\n\n".join(parts)


def _source(module_name: str) -> ast.Module:
    """Read, not imported: help should not wait for TensorFlow."""
    spec = importlib.util.find_spec(module_name)
    assert spec is not None and spec.origin is not None, module_name
    return ast.parse(pathlib.Path(spec.origin).read_text("utf-8"))


def _run_files(
    module_name: str, function_name: str, folders: Sequence[pathlib.Path]
) -> list[tuple[gin_files.Settings, pathlib.Path]]:
    """The run files that set all that a program needs: those of other programs leave some out."""
    needed = [
        f"{module_name.rpartition('.')[2]}.{function_name}.{argument.arg}"
        for function in _source(module_name).body
        if isinstance(function, ast.FunctionDef) and function.name == function_name
        for argument, default in zip(
            function.args.kwonlyargs, function.args.kw_defaults, strict=True
        )
        if default is None
    ]
    found = []
    for path in sorted((gin_files.GIN_CONFIGS / "runs").glob("*.gin")):
        settings = gin_files.Settings(folders)
        file = settings.add_file(str(path), given_by="--gin_file")
        if needed and all(key in settings.values for key in needed):
            found.append((settings, file))
    return found


def _shown(file: pathlib.Path) -> str:
    """The path as one would give it to `--gin_file`."""
    ours = gin_files.GIN_CONFIGS
    return os.path.relpath(file, ours) if ours in file.parents else str(file)
