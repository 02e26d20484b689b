"""Routing: one function for the data a worker gets and for the weights the ensemble uses (numpy only)."""

from cbtm_common.routing.centroid import CentroidRouter
from cbtm_common.routing.embedding import TermEmbedding, normalise
from cbtm_common.routing.learned import LearnedRouter
from cbtm_common.routing.mixture import Distance, keep_top, mixture_weights
from cbtm_common.routing.router import Router, RunningState, load_router, register_router
from cbtm_common.routing.terms import terms

__all__ = [
    "CentroidRouter",
    "Distance",
    "LearnedRouter",
    "Router",
    "RunningState",
    "TermEmbedding",
    "keep_top",
    "load_router",
    "mixture_weights",
    "normalise",
    "register_router",
    "terms",
]
