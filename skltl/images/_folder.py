"""Load a folder of class folders as paths and labels."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from sklearn.utils import Bunch
from tqdm import tqdm

from skltl._caller import user_stacklevel
from skltl.exceptions import ImageFolderWarning, nearest, quote, shorten
from skltl.images._decode import (
    DECODER_ERRORS,
    FILE_FORMATS,
    check_regular_file,
    check_size,
    has_heif,
    open_image,
    reason_of,
)

EXTENSIONS = frozenset(
    extension for extension, name in Image.EXTENSION.items() if name in FILE_FORMATS
)

# Common extensions of images in formats that are not decoded.
OTHER_FORMATS = frozenset(
    f".{name}"
    for name in ["avif", "eps", "heic", "heif", "ico", "jp2", "jxl", "psd", "svg"]
)

# Files and folders that operating systems and archive programs add, in lower case.
# Names with a leading dot are ignored, too.
IGNORED = {"thumbs.db", "desktop.ini", "__macosx", "@eadir"}

N_SKIPPED_SHOWN = 3


class SkippedPath(NamedTuple):
    """Path of a file or folder that was left out, and the reason."""

    path: str
    reason: str


def load_image_folder(
    folder: str | os.PathLike[str],
    *,
    categories: Iterable[str] | None = None,
    return_X_y: bool = False,
    as_frame: bool = False,
    extensions: Iterable[str] | None = None,
    verbose: bool | int = False,
) -> Any:
    """Load the paths and labels of images in class folders.

    As in :func:`sklearn.datasets.load_files`, each folder directly inside `folder` is
    a class, named like the folder::

        flowers/
            daisy/
                1.jpg
                2.jpg
            rose/
                3.jpg

    Estimators decode the images from their paths when they need them.

    Parameters
    ----------
    folder : str or path-like
        Path of the folder that contains the class folders.
    categories : list of str, default=None
        Names of the classes to load; ``None`` loads all of them.
    return_X_y : bool, default=False
        Whether to return ``(data, target)`` instead of a `Bunch`.
    as_frame : bool, default=False
        Whether `data` and `target` are a pandas DataFrame and Series.
    extensions : list of str, default=None
        Extensions of the files to load, such as ``[".npy"]``, whatever they contain:
        for the `reader` of an estimator. ``None`` loads images that skltl can read.
    verbose : bool or int, default=False
        Whether to show a progress bar.

    Returns
    -------
    Bunch or tuple of (data, target)
        Dictionary-like object with the attributes:

        data : ndarray of str of shape (n_samples,), or DataFrame
            Paths of the images, sorted by class name, then by path within the class.
            The DataFrame has one column, ``"image"``.
        target : ndarray of int of shape (n_samples,), or Series
            Class of each image, as an index into `target_names`.
        target_names : list of str
            Sorted names of the classes.
        skipped : list of SkippedPath
            Named tuples (path, reason) of all files and class folders left out.
        frame : DataFrame
            `data` and `target` in one table; only with ``as_frame=True``.

    Raises
    ------
    TypeError
        If `folder` is not a path, or `categories` is not a list of strings.
    FileNotFoundError, NotADirectoryError
        If `folder` does not exist or is a file.
    ValueError
        If there are no class folders, no readable images, or no class of a name in
        `categories`.
    ImportError
        If ``as_frame=True`` and pandas is not installed.

    Warns
    -----
    ImageFolderWarning
        If files or class folders are left out: files of other types, images that
        cannot be read, images in no class folder, and class folders without images.

    See Also
    --------
    find_bad_images : Decode each image once and list the unreadable ones.
    sklearn.datasets.load_files : Load text files in class folders.

    Notes
    -----
    Images are found in subfolders of a class folder, too. Links to folders are
    followed, except those to a folder that contains the link. Hidden files and folders
    (with a leading dot), ``Thumbs.db``, ``desktop.ini``, ``__MACOSX`` and ``@eaDir``
    are ignored without a warning.

    Only the header of each image is read. An image that is damaged after its header is
    therefore loaded; `find_bad_images` finds it.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from skltl import load_image_folder
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for color in ["red", "blue"]:
    ...         (Path(folder) / color).mkdir()
    ...         Image.new("RGB", (8, 8), color).save(Path(folder) / color / "1.png")
    ...     images = load_image_folder(folder)
    >>> [Path(path).name for path in images.data]
    ['1.png', '1.png']
    >>> images.target
    array([0, 1])
    >>> images.target_names
    ['blue', 'red']
    """
    pandas = _import_pandas() if as_frame else None
    root = _root(folder)
    classes, strays = _class_folders(root)
    if not classes:
        raise _no_class_folders(root, strays)
    names = _selected(classes, categories, root)
    fault_of = _fault_of_image if extensions is None else _fault_without(extensions)
    bunch = Bunch(data=[], target=[], target_names=[], skipped=strays)
    with tqdm(desc="files", unit="file", disable=not verbose) as progress:
        for name in names:
            found = []
            for file in _walk(classes[name], root, fault_of):
                found.append(file)
                progress.update()
            _add_class(bunch, name, classes[name].path, found)
    if not bunch.data:
        raise ValueError(
            f"No image was found in the class folders of {quote(root)}. "
            f"{_summary(bunch.skipped, root)}"
        )
    if bunch.skipped:
        warnings.warn(
            f"{_summary(bunch.skipped, root)} The attribute `skipped` of the Bunch "
            "that load_image_folder returns by default has all of them.",
            ImageFolderWarning,
            stacklevel=user_stacklevel(),
        )
    bunch.data, bunch.target = np.array(bunch.data), np.array(bunch.target)
    if pandas is not None:
        _convert_to_pandas(bunch, pandas)
    return (bunch.data, bunch.target) if return_X_y else bunch


def _import_pandas() -> Any:
    """Return the module pandas."""
    try:
        return import_module("pandas")
    except ImportError as error:
        raise ImportError(
            "load_image_folder with as_frame=True requires pandas."
        ) from error


def _root(folder: object) -> str:
    """Return the path of a folder as a string; raise if it is none."""
    path = os.fspath(folder) if isinstance(folder, (str, os.PathLike)) else folder
    if not isinstance(path, str):
        raise TypeError(
            "folder must be a str or a pathlib.Path; got "
            f"{shorten(type(path).__name__)}."
        )
    if not path or not Path(path).exists():
        raise FileNotFoundError(f"The folder {quote(path, 200)} does not exist.")
    if not Path(path).is_dir():
        raise NotADirectoryError(
            f"{quote(path, 200)} is a file. Pass a folder of class folders; if the "
            "file is an archive, unpack it first."
        )
    return path


def _class_folders(root: str) -> tuple[dict[str, os.DirEntry[str]], list[SkippedPath]]:
    """Return the class folders by name, sorted, and the files beside them."""
    classes, strays = {}, []
    for entry in _entries(root):
        if _is_folder(entry):
            classes[entry.name] = entry
        else:
            reason = _fault_of_extension(entry.name) or "it is in no class folder"
            strays.append(SkippedPath(entry.path, reason))
    return classes, strays


def _no_class_folders(root: str, strays: list[SkippedPath]) -> ValueError:
    """Return the error for a folder without class folders."""
    images = [path for path, _ in strays if not _fault_of_extension(path)]
    if not images:
        return ValueError(
            f"{quote(root)} has no class folders: expected one folder of images for "
            "each class."
        )
    ((suffix, _),) = Counter(Path(path).suffix for path in images).most_common(1)
    code = f"sorted(pathlib.Path({quote(root, 200)}).glob('*{suffix}'))"
    return ValueError(
        f"{quote(root)} has no class folders, but images ({len(images):,}). For images "
        f"without labels, pass {code} to the estimator instead; for labels, move the "
        "images of each class to a folder named like the class."
    )


def _selected(
    known: Mapping[str, Any], categories: Iterable[str] | None, root: str
) -> list[str]:
    """Return the names of the classes to load, in the order of the known ones."""
    if categories is None:
        return list(known)
    if isinstance(categories, (str, bytes)) or not isinstance(categories, Iterable):
        raise TypeError(
            "categories must be a list of class names; got "
            f"{shorten(repr(categories))}."
        )
    chosen = list(categories)
    for name in chosen:
        if not isinstance(name, str):
            raise TypeError(
                "categories must be a list of class names (str), and one of them is "
                f"{shorten(repr(name))}."
            )
        if name not in known:
            raise ValueError(
                f"{quote(root)} has no class folder {quote(name)}. "
                f"{shorten(nearest(name, known), 200)}"
            )
    if not chosen:
        raise ValueError("categories is empty; pass None to load all classes.")
    return [name for name in known if name in chosen]


def _add_class(
    bunch: Bunch, name: str, folder: str, found: Sequence[tuple[str, str | None]]
) -> None:
    """Add the images among the files of a class folder, and what is left out."""
    paths = [path for path, reason in found if reason is None]
    skipped = [SkippedPath(path, reason) for path, reason in found if reason]
    if paths:
        bunch.target += [len(bunch.target_names)] * len(paths)
        bunch.target_names.append(name)
        bunch.data += paths
    elif folder not in {path for path, _ in skipped}:
        bunch.skipped.append(SkippedPath(folder, "it has no readable image"))
    bunch.skipped += skipped


def _walk(
    folder: os.DirEntry[str], root: str, fault_of: Callable[[str], str | None]
) -> Iterator[tuple[str, str | None]]:
    """Yield the path of each file below a folder, with a reason to leave it out.

    The order is that of the parts of the paths. Folders that cannot be read are
    yielded, too.
    """
    pending = [(folder, frozenset([_identity(root)]))]
    while pending:
        entry, ancestors = pending.pop()
        if not _is_folder(entry):
            yield entry.path, fault_of(entry.path)
            continue
        try:
            identity = _identity(entry.path)
            inside = _entries(entry.path)
        except OSError as error:
            yield entry.path, reason_of(error)
            continue
        if identity in ancestors:
            yield entry.path, "it is a link to a folder that contains it"
            continue
        pending += [(one, ancestors | {identity}) for one in reversed(inside)]


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """Return the files and folders directly inside a folder, sorted by name."""
    with os.scandir(folder) as found:
        visible = [
            entry
            for entry in found
            if not (entry.name.startswith(".") or entry.name.lower() in IGNORED)
        ]
    return sorted(visible, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # for instance a link to itself
        return False


def _identity(folder: str) -> tuple[int, int]:
    """Return what two paths of the same folder have in common."""
    state = Path(folder).stat()  # that of an `os.DirEntry` has zeros on Windows
    return state.st_dev, state.st_ino


def _fault_of_extension(name: str) -> str | None:
    """Return why an extension is not that of an image, or ``None`` if it is."""
    suffix = Path(name).suffix
    if suffix.lower() in EXTENSIONS:
        return None
    if suffix.lower() in (".heic", ".heif") and has_heif():
        return None
    if not suffix:
        return "it has no extension"
    if suffix.lower() in OTHER_FORMATS:
        return f"its format ({quote(suffix, 20)}) is not supported; convert it to PNG"
    return f"its extension {quote(suffix, 20)} is not that of an image"


def _fault_of_image(path: str) -> str | None:
    """Return why a file is no readable image, or ``None`` if its header is valid."""
    if fault := _fault_of_extension(path):
        return fault
    try:
        check_regular_file(path)
        with Path(path).open("rb") as stream:
            check_size(open_image(stream))
    except DECODER_ERRORS as error:
        return reason_of(error)
    return None


def _fault_without(extensions: Iterable[str]) -> Callable[[str], str | None]:
    """Return a function that says why a file has none of some extensions."""
    is_text = isinstance(extensions, (str, bytes))
    chosen = (
        () if is_text or not isinstance(extensions, Iterable) else tuple(extensions)
    )
    is_valid = [isinstance(one, str) and one.startswith(".") for one in chosen]
    if not chosen or not all(is_valid):
        raise ValueError(
            "extensions must be a list of extensions with their dots, such as "
            f"['.npy']; got {shorten(repr(extensions))}."
        )
    endings = tuple(one.lower() for one in chosen)

    def fault_of(path: str) -> str | None:
        if path.lower().endswith(endings):
            return None
        return f"it has none of the extensions {', '.join(endings)}"

    return fault_of


def _summary(skipped: list[SkippedPath], root: str) -> str:
    """Return a sentence with the number and the first ones of what was left out."""
    shown = [
        f"{quote(Path(path).relative_to(root).as_posix(), 50)} ({shorten(reason, 70)})"
        for path, reason in skipped[:N_SKIPPED_SHOWN]
    ]
    count = "1 path was" if len(skipped) == 1 else f"{len(skipped):,} paths were"
    first = f"; the first {len(shown)}" if len(skipped) > len(shown) else ""
    return f"{count} left out{first}: {', '.join(shown)}."


def _convert_to_pandas(bunch: Bunch, pandas: Any) -> None:
    """Replace data and target by a DataFrame and a Series, and add both as a frame."""
    # The string type of pandas refuses paths that are not valid UTF-8.
    bunch.data = pandas.DataFrame({"image": bunch.data}, dtype=object)
    bunch.target = pandas.Series(bunch.target, name="target")
    bunch.frame = bunch.data.assign(target=bunch.target)
