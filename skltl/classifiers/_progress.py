"""Tell those who watch a fit how it goes: scikit-learn's callbacks, a progress bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm

from skltl.classifiers._stages import Stage

__all__ = ["CallbackSupportMixin", "Progress", "StageProgress"]

try:
    from sklearn.callback import CallbackSupportMixin
except ImportError:  # before scikit-learn 1.9

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """There are no callbacks to support."""


class Progress:
    """The tree of tasks that scikit-learn's callbacks know: fit, stages, epochs.

    Parameters
    ----------
    estimator : estimator
        What is fitted.
    data : tuple
        ``X``, ``y``, and a dictionary of weights and groups, for callbacks.
    stages : list of Stage
        Its stages.
    so_far : callable
        Returns the attributes of the estimator as if the fit had ended now.
    """

    def __init__(
        self,
        estimator: Any,
        data: tuple[Any, Any, dict[str, Any]],
        stages: list[Stage],
        so_far: Callable[[], dict[str, Any]],
    ) -> None:
        X, y, metadata = data
        given = {name: value for name, value in metadata.items() if value is not None}
        about = {"estimator": estimator, "X": X, "y": y}
        self._about = {**about, "metadata": given or None}
        self._so_far = so_far
        self._is_verbose = bool(estimator.verbose)
        self._root: Any = None
        if hasattr(CallbackSupportMixin, "_init_callback_context"):
            self._root = estimator._init_callback_context(max_subtasks=len(stages))
            self._root.call_on_fit_task_begin(**self._about)

    def begin_stage(self, stage: Stage, n_epochs_done: int) -> StageProgress:
        """Tell that a stage begins, or goes on; return what to tell of its epochs."""
        context = None
        if self._root is not None:
            context = self._root.subcontext(stage.name, max_subtasks=stage.n_epochs)
            context.call_on_fit_task_begin(**self._about)
            for _ in range(n_epochs_done):  # told before the interruption
                context.subcontext("epoch")
        bar = tqdm(
            total=stage.n_epochs,
            initial=n_epochs_done,
            desc=stage.name,
            unit="epoch",
            disable=not self._is_verbose,
        )
        return StageProgress(context, bar, self._about, self._so_far)

    def skip_stage(self, stage: Stage) -> None:
        """Count a stage that was done before an interruption."""
        if self._root is not None:
            self._root.subcontext(stage.name, max_subtasks=stage.n_epochs)

    def end(self) -> None:
        """Tell that the fit has ended."""
        if self._root is not None:
            self._root.call_on_fit_task_end(
                **self._about, reconstruction_attributes=self._so_far
            )


class StageProgress:
    """What is told of one stage; see `Progress`."""

    def __init__(
        self,
        context: Any,
        bar: tqdm[Any],
        about: dict[str, Any],
        so_far: Callable[[], dict[str, Any]],
    ) -> None:
        self._context = context
        self._bar = bar
        self._about = about
        self._so_far = so_far

    def end_epoch(self, record: dict[str, Any]) -> bool:
        """Tell that an epoch has ended; return whether the stage shall end there."""
        kinds = ("loss", "score", "validation_score")
        self._bar.set_postfix({kind: record[kind] for kind in kinds if kind in record})
        self._bar.update()
        if self._context is None:
            return False
        epoch = self._context.subcontext("epoch")
        epoch.call_on_fit_task_begin(**self._about)
        return bool(
            epoch.call_on_fit_task_end(
                **self._about, reconstruction_attributes=self._so_far
            )
        )

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Tell that the stage has ended, if it has."""
        self._bar.close()
        if self._context is not None and error is None:
            self._context.call_on_fit_task_end(
                **self._about, reconstruction_attributes=self._so_far
            )
