"""Curation of a data set: duplicates, wrong labels, outliers and look-alikes."""

from skltl.curation._duplicates import find_duplicates
from skltl.curation._features import fitted_to
from skltl.curation._label_errors import find_label_errors
from skltl.curation._neighbors import ImageNeighbors
from skltl.curation._outliers import find_outliers

__all__ = [
    "ImageNeighbors",
    "find_duplicates",
    "find_label_errors",
    "find_outliers",
    "fitted_to",
]
