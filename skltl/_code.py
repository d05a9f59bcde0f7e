"""Identity of functions and objects of users: what they do, as far as code tells."""

from __future__ import annotations

import dis
import io
import pickle
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import IO, Any

from skltl.exceptions import shorten


def description(value: Any, name: str) -> bytes:
    """Pickle a parameter together with the code of the functions it consists of.

    Equal in all processes, and never loaded.
    """
    content = io.BytesIO()
    try:
        _Describer(content).dump(value)
    except (
        *(pickle.PicklingError, TypeError, ValueError, AttributeError),
        RecursionError,
    ) as error:
        raise ValueError(
            f"{name}={type(value).__name__} cannot be identified, so that stored "
            "results of another one might be used. Use functions and objects that can "
            f"be pickled. ({error})"
        ) from error
    return content.getvalue()


# Packages that are pickled by name wherever they are installed.
BY_NAME = {"torch", "torchvision", "skltl", "numpy", "PIL", "builtins"}


class _Describer(pickle.Pickler):
    """Pickler that includes the code of functions and classes.

    Except of those of installed packages, which are pickled by name.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        # No memo: whether two equal strings are one object is a matter of chance.
        self.fast = True
        self._described: set[int] = set()  # for recursive functions

    def persistent_id(self, value: Any) -> Any:
        """Replace sets, whose order differs between processes, and modules."""
        if type(value) in (set, frozenset):
            return sorted(description(item, "a set") for item in value)
        return _module(value) if isinstance(value, ModuleType) else None

    def reducer_override(self, value: Any) -> Any:
        """Replace tensors, code, functions and classes; others are pickled as usual."""
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            array = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            kind = (str(value.dtype), tuple(value.shape))
            return tuple, ((*kind, array.numpy().tobytes()),)
        if isinstance(value, CodeType):
            code = (value.co_code, value.co_consts, value.co_names)
            return tuple, ((*code, sorted(_imports(value))),)
        wrapped = getattr(value, "__wrapped__", None)
        if wrapped is not None and not isinstance(value, (FunctionType, type)):
            return tuple, ((type(value).__qualname__, wrapped),)  # of `lru_cache`
        is_function = isinstance(value, FunctionType)
        if not (is_function or isinstance(value, type)) or _is_installed(value):
            return NotImplemented
        if id(value) in self._described:
            return tuple, ((value.__qualname__,),)
        self._described.add(id(value))
        return tuple, (_function(value) if is_function else _class(value),)


def _function(function: FunctionType) -> tuple[Any, ...]:
    """Return the code of a function, and all values that it uses."""
    enclosed = [cell.cell_contents for cell in function.__closure__ or ()]
    defaults = (function.__defaults__, function.__kwdefaults__)
    variables = function.__globals__
    names = sorted(set(_names_in(function.__code__)) & variables.keys())
    used = {name: variables[name] for name in names}
    return (function.__qualname__, function.__code__, *defaults, enclosed, used)


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _imports(code: CodeType) -> Iterator[tuple[str, bytes]]:
    """Yield the modules of the user that code imports when it runs, and their source.

    They need not be imported yet.
    """
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME":
            name = instruction.argval
            with suppress(ImportError, ValueError):  # relative, or not installed here
                spec = find_spec(name)
                origin = spec.origin if spec is not None and spec.has_location else None
                if origin is not None and not _is_path_of_installed(origin):
                    yield name, Path(origin).read_bytes()


def _module(module: ModuleType) -> list[tuple[str, bytes]]:
    """Return the names of a module and of the user's modules in it, and their source.

    What code takes from a module, only running it could tell.
    """
    found: dict[str, bytes] = {}
    pending = [module]
    while pending:
        one = pending.pop()
        path = getattr(one, "__file__", None) or ""
        if one.__name__ in found:
            continue
        found[one.__name__] = b""
        if path and not _is_path_of_installed(path) and one.__name__ not in BY_NAME:
            found[one.__name__] = Path(path).read_bytes()
            for value in vars(one).values():
                name = getattr(value, "__module__", None)
                inner = sys.modules.get(name) if isinstance(name, str) else None
                inner = value if isinstance(value, ModuleType) else inner
                pending += [] if inner is None else [inner]
    return sorted(found.items())


def _class(value: type) -> tuple[Any, ...]:
    """Return the methods and the attributes of a class."""
    parts = {
        name: getattr(part, "__func__", getattr(part, "fget", part))
        for name, part in vars(value).items()
    }
    kept = {
        name: getattr(part, "func", part)  # of a cached property
        for name, part in parts.items()
        if isinstance(part, FunctionType) or not name.startswith(("__", "_abc_"))
    }
    return (value.__qualname__, value.__bases__, kept)


def _is_installed(value: Any) -> bool:
    """Return whether a function or class belongs to Python or an installed package."""
    if (value.__module__ or "").partition(".")[0] in BY_NAME:
        return True
    if isinstance(value, FunctionType):
        path = value.__code__.co_filename
    else:
        module = sys.modules.get(value.__module__)
        path = getattr(module, "__file__", None) or ""
    return _is_path_of_installed(path)


def _is_path_of_installed(path: str) -> bool:
    """Return whether a file belongs to Python or to an installed package."""
    parts = Path(path).parts
    return path.startswith(("<frozen", sysconfig.get_path("stdlib"))) or any(
        folder in parts for folder in ("site-packages", "dist-packages")
    )


def why_not_picklable(value: object) -> str:
    """Return the reason why a value cannot be pickled, or an empty string."""
    try:
        pickle.dumps(value)
    except Exception as error:  # pickling runs code of the user, which may raise any
        return shorten(str(error) or type(error).__name__, 200)
    return ""
