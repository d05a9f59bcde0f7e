"""A fit, its stages and epochs as tasks of scikit-learn's callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from skltl.finetuning._distributed import rank

try:
    from sklearn.callback import CallbackSupportMixin as CallbackSupportMixin
except ImportError:  # before scikit-learn 1.9

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stand-in where scikit-learn has no callbacks."""


class Task:
    """A fit, stage or epoch as a task of scikit-learn's callbacks.

    Without a context, as before scikit-learn 1.9, it has no effect. `arguments` are
    those of all callbacks, and `fitted` returns the attributes of the estimator as if
    the fit had ended now.
    """

    def __init__(
        self, context: Any, arguments: dict[str, Any], fitted: Callable[[], Any]
    ) -> None:
        self._context = context
        self._arguments = arguments
        self._fitted = fitted

    def begin(self) -> Task:
        """Begin the task, and return it."""
        if self._context is not None:
            self._context.call_on_fit_task_begin(**self._arguments)
        return self

    def subtask(self, name: str, n_subtasks: int = 0) -> Task:
        """Return the next subtask, which counts even if it never begins."""
        context = self._context
        if context is not None:
            context = context.subcontext(name, max_subtasks=n_subtasks)
        return Task(context, self._arguments, self._fitted)

    def end(self) -> bool:
        """End the task; return whether a callback stops the task that contains it."""
        if self._context is None:
            return False
        arguments = {**self._arguments, "reconstruction_attributes": self._fitted}
        return bool(self._context.call_on_fit_task_end(**arguments))


def begin_fit(
    estimator: Any,
    X: Any,
    y: Any,
    metadata: dict[str, Any],
    n_stages: int,
    fitted: Callable[[], dict[str, Any]],
) -> Task:
    """Return the task of a fit; `fitted` is as in `Task`."""
    context = None
    if hasattr(estimator, "_init_callback_context") and rank() == 0:
        context = estimator._init_callback_context(max_subtasks=n_stages)
    metadata = {name: value for name, value in metadata.items() if value is not None}
    arguments = {"estimator": estimator, "X": X, "y": y, "metadata": metadata or None}
    return Task(context, arguments, fitted).begin()
