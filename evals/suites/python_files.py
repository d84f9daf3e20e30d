"""What the Python of an lm-eval task imports, read from its text: nothing is run. Light.

lm-eval runs the file that `!function module.name` names. What that file imports from beside it belongs to the task;
what it imports from packages has to be installed.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evals.suites.task_index import is_lm_evals, lm_eval_folder
from fleet.core.errors import SuiteError, some
from fleet.core.json_lines import decode_text

_LM_EVAL_TASKS = "lm_eval.tasks."

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Import = ast.Import | ast.ImportFrom


@dataclass
class PythonFiles:
    """The Python of a task, followed from file to file."""

    folders: Sequence[Path]
    """Of the task's YAML files, first the task's own: where a module is looked for before the installed packages."""
    files: dict[Path, ast.Module] = field(default_factory=dict[Path, ast.Module])
    """Every file of Python that is read, lm-eval's own too."""
    missing: dict[str, Path] = field(default_factory=dict[str, Path])
    """Package that is not installed -> a file that needs it."""
    _used: set[str] = field(default_factory=set[str])
    """Names of functions, classes and attributes that may be used: an import in a function counts if its is."""
    _imports: set[tuple[Path, str]] = field(default_factory=set[tuple[Path, str]])
    """What has been followed."""

    def follow(self, function: str, yaml: Path) -> None:
        """Read the module of a function that a YAML names, and what it imports, and so on.

        Raises:
            SuiteError: There is no such module or function, or a file is not Python or imports what lm-eval can't.
        """
        module, _, name = function.rpartition(".")
        file = yaml.parent / f"{module.replace('.', '/')}.py"
        if not file.is_file():
            if not module or not _is_installed(module):
                raise SuiteError(f"{yaml}: !function {function}: there is no {file}, and no package {module or name}")
            return
        if (file, function) in self._imports:
            return
        self._imports.add((file, function))
        self._read(file)
        if (names := _defined(self.files[file])) is not None and name not in names:
            raise SuiteError(f"{yaml}: !function {function}: {file} defines no {name}")
        self._used.add(name)
        self._spread()

    def _read(self, file: Path) -> None:
        if file in self.files:
            return
        try:
            tree = ast.parse(decode_text(file.read_bytes(), str(file), SuiteError))
        except (SyntaxError, ValueError) as error:
            raise SuiteError(f"{file}: is no valid Python: {error}") from error
        self.files[file] = tree

    def _spread(self) -> None:
        """Follow imports until there is nothing new: a new file may use another function, which imports another."""
        while True:
            before = (len(self.files), len(self._used), len(self._imports))
            for file, tree in list(self.files.items()):
                for statement, needed in _live_imports(tree, self._used):
                    self._follow_import(file, statement, needed)
            if before == (len(self.files), len(self._used), len(self._imports)):
                return

    def _follow_import(self, file: Path, statement: _Import, needed: bool) -> None:
        if isinstance(statement, ast.Import):
            modules = [(alias.name, needed) for alias in statement.names]
        elif base := self._base(file, statement):
            # What is imported from a package may be a module of it, or a name in it.
            modules = [(base, needed), *((f"{base}.{alias.name}", False) for alias in statement.names)]
        else:
            modules = []
        for module, is_needed in modules:
            if (file, module) not in self._imports:
                self._imports.add((file, module))
                self._follow_module(file, module, is_needed)

    def _base(self, file: Path, statement: ast.ImportFrom) -> str | None:
        """The module that names are imported from, as an absolute one."""
        if not statement.level:
            return statement.module
        if not is_lm_evals(file):
            name = statement.module or ", ".join(alias.name for alias in statement.names)
            raise SuiteError(
                f"{file}: line {statement.lineno}: imports {name} relative to a package, but lm-eval runs a "
                "task's file outside of any; write it without the dot"
            )
        parts = file.relative_to(lm_eval_folder()).parts[: -statement.level]
        return ".".join([_LM_EVAL_TASKS[:-1], *parts, *([statement.module] if statement.module else [])])

    def _follow_module(self, file: Path, module: str, needed: bool) -> None:
        top = module.partition(".")[0]
        if top in sys.stdlib_module_names:
            return
        if not is_lm_evals(file) and (found := self._beside(module)):
            for own in found:
                self._read(own)
        elif module.startswith(_LM_EVAL_TASKS):
            path = lm_eval_folder().joinpath(*module.removeprefix(_LM_EVAL_TASKS).split("."))
            for own in (path.with_suffix(".py"), path / "__init__.py"):
                if own.is_file():
                    self._read(own)
        elif needed and not _is_installed(module) and not self._has_beside(top):
            self.missing.setdefault(top, file)

    def _beside(self, module: str) -> list[Path]:
        """The files that importing a module from beside the task runs; none if it is not there."""
        parts = module.split(".")
        for folder in self.folders:
            inits = [folder.joinpath(*parts[:i], "__init__.py") for i in range(1, len(parts))]
            last = folder.joinpath(*parts)
            ends = [end for end in (last.with_suffix(".py"), last / "__init__.py") if end.is_file()]
            if ends:
                return [file for file in (*inits, ends[0]) if file.is_file()]
        return []

    def _has_beside(self, top: str) -> bool:
        return any((folder / top).is_dir() or (folder / f"{top}.py").is_file() for folder in self.folders)

    def names(self, file: Path) -> bool:
        """Whether the task's Python has a file's name in a text, so that it may open it."""
        return any(file.name in text or text == file.stem for text in self._texts())

    def _texts(self) -> Iterator[str]:
        for file, tree in self.files.items():
            if not is_lm_evals(file):
                for node in ast.walk(tree):
                    if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
                        yield node.value

    def check_paths(self, root: Path) -> None:
        """Refuse what can't be found on another machine: a file outside of `root`, or one named without its folder.

        Raises:
            SuiteError: It names the file, and what to write.
        """
        for text in self._texts():
            path = Path(text)
            if path.is_absolute() and path.is_file() and not path.is_relative_to(root):
                raise SuiteError(
                    f"{root}: the task's Python names {path}, which no other machine has; put it beside the YAML"
                )
        for file, tree in self.files.items():
            for call in ast.walk(tree):
                if not is_lm_evals(file) and (name := _opened(call)) is not None and (root / name).is_file():
                    raise SuiteError(
                        f"{file}: line {getattr(call, 'lineno', 0)}: opens {name} where Python was started, which is "
                        f"elsewhere on a node; write Path(__file__).parent / {name!r}"
                    )

    def check_installed(self, suite: str) -> None:
        """Refuse a task whose packages are not installed.

        Raises:
            SuiteError: It says what to install.
        """
        if self.missing:
            packages = [requirement(module) for module in sorted(self.missing)]
            file = next(iter(self.missing.values()))
            needs = some(self.missing.keys())
            raise SuiteError(
                f"suite {suite}: {file} imports {needs}, which is not installed here; "
                f"pip install {' '.join(dict.fromkeys(packages))}, here and on every node"
            )


def requirement(module: str) -> str:
    """What to install for a module: the requirement of lm-eval's extra that has it, else the module's own name."""
    needs = [line.partition(";")[0].strip() for line in importlib.metadata.requires("lm_eval") or []]
    packages = {re.split(r"[\[<>=!~ ]", text)[0].replace("_", "-").lower(): text for text in reversed(needs)}
    name = module.replace("_", "-").lower()
    # antlr4 comes with antlr4-python3-runtime.
    text = packages.get(name) or next((packages[p] for p in packages if p.startswith(f"{name}-python")), module)
    return f'"{text}"' if re.search(r"[\[<>=!~]", text) else text


def _is_installed(module: str) -> bool:
    top = module.partition(".")[0]
    try:
        return top in sys.modules or importlib.util.find_spec(top) is not None
    except (ImportError, ValueError):
        return False


def _defined(tree: ast.Module) -> set[str] | None:
    """The names a module has; None if it may have others, by `import *` or made while it runs."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, _Function | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name):
            if node.id in ("globals", "setattr", "vars", "exec", "__getattr__"):
                return None
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            if any(alias.name == "*" for alias in node.names):
                return None
            names.update(alias.asname or alias.name.partition(".")[0] for alias in node.names)
    return names


def _live_imports(tree: ast.Module, used: set[str]) -> Iterator[tuple[_Import, bool]]:
    """The imports that run when a module is loaded, and those of functions that may be called; and whether each is
    needed: a `try` may do without. The names that all this code uses are added to `used`.
    """
    todo: list[tuple[ast.AST, bool]] = [(tree, True)]
    while todo:
        node, needed = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += [(part, needed) for part in node.orelse]
            continue
        if isinstance(node, _Function) and node.name not in used:
            continue
        if isinstance(node, ast.Name):
            used.add(node.id)
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            used.update(alias.name for alias in node.names)
            yield node, needed
        needed = needed and not (isinstance(node, ast.Try) and any(map(_does_without, node.handlers)))
        todo += [(child, needed) for child in ast.iter_child_nodes(node)]


def _does_without(handler: ast.ExceptHandler) -> bool:
    """Whether a handler goes on without what can't be imported."""
    caught = "ImportError" if handler.type is None else ast.unparse(handler.type)
    is_import = any(name in caught for name in ("ImportError", "ModuleNotFoundError", "Exception"))
    return is_import and not any(isinstance(node, ast.Raise) for part in handler.body for node in ast.walk(part))


def _opened(node: ast.AST) -> str | None:
    """The relative path that `open("…")` or `Path("…")` has as it is; None of anything else."""
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("open", "Path")
        and node.args
    ):
        value = node.args[0]
        if isinstance(value, ast.Constant) and isinstance(value.value, str) and not Path(value.value).is_absolute():
            return value.value
    return None
