"""Pipelines with a small, fast network."""

from sklearn.pipeline import make_pipeline

from skltl import CNNFeatureTransformer


def transformer(**parameters):
    """A transformer whose results are the same on all machines."""
    defaults = {"layer": "block2", "engine": "torch", "precision": "float32"}
    return CNNFeatureTransformer("tiny", **(defaults | parameters))


def pipeline(*steps, **parameters):
    """A pipeline of the transformer and further steps."""
    return make_pipeline(transformer(**parameters), *steps)
