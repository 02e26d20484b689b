"""Routing: one function for the data a worker gets and for the weights the ensemble uses (numpy only)."""

from cbtm_common.routing.embedding import RunningText, TermEmbedding, normalise
from cbtm_common.routing.mixture import Distance, keep_top, mixture_weights
from cbtm_common.routing.router import CentroidRouter, Router, load_router
from cbtm_common.routing.terms import terms

__all__ = [
    "CentroidRouter",
    "Distance",
    "Router",
    "RunningText",
    "TermEmbedding",
    "keep_top",
    "load_router",
    "mixture_weights",
    "normalise",
    "terms",
]
