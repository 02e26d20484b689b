"""cbtm: the experts of a Cluster-Branch-Train-Merge run, used as one language model.

    import cbtm
    model = cbtm.Ensemble.from_coordinator("host:50051", run="web", top_k=2)
    model.perplexity(texts); model.score(texts); model.route("text"); model.generate("Once", max_new_tokens=64)
    model.save("ensemble/"); cbtm.Ensemble.load("ensemble/")

    transformers.AutoModelForCausalLM.from_pretrained("ensemble/")      # after `import cbtm`

Names are loaded when first used: importing this package costs nothing, and torch comes with the first model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cbtm import _auto

if TYPE_CHECKING:
    from cbtm._calibrate import Calibration, calibrate, calibrate_run
    from cbtm._classify import Classification, ClassificationTask, classify, load_task
    from cbtm._config import CbtmConfig
    from cbtm._ensemble import Ensemble
    from cbtm._evaluate import Evaluation, evaluate, evaluate_run
    from cbtm._held_out import HeldOutDocument
    from cbtm._merge import MergeMethod, merge
    from cbtm._model import CbtmForCausalLM
    from cbtm._parts import ClusterInfo, ExpertChanges
    from cbtm._plots import plot
    from cbtm._results import ClusterWeight, Generation, PerplexityResult, Routing, Score
    from cbtm._routing import Policy, RoutingOptions
    from cbtm._routing_grid import GridPoint, RoutingPolicy, routing_grid
    from cbtm._scored import ScoredDocuments, score_documents
    from cbtm_common.errors import (
        AlreadyExists,
        CbtmError,
        IntegrityError,
        InvalidArgument,
        InvalidState,
        NotFound,
        PermissionDenied,
        ResourceExhausted,
        Unauthenticated,
        Unavailable,
    )
    from cbtm_common.routing import Distance, Router

_HOME = {
    "AlreadyExists": "cbtm_common.errors",
    "Calibration": "cbtm._calibrate",
    "CbtmConfig": "cbtm._config",
    "CbtmError": "cbtm_common.errors",
    "CbtmForCausalLM": "cbtm._model",
    "Classification": "cbtm._classify",
    "ClassificationTask": "cbtm._classify",
    "ClusterInfo": "cbtm._parts",
    "ClusterWeight": "cbtm._results",
    "Distance": "cbtm_common.routing",
    "Ensemble": "cbtm._ensemble",
    "Evaluation": "cbtm._evaluate",
    "ExpertChanges": "cbtm._parts",
    "Generation": "cbtm._results",
    "GridPoint": "cbtm._routing_grid",
    "HeldOutDocument": "cbtm._held_out",
    "IntegrityError": "cbtm_common.errors",
    "InvalidArgument": "cbtm_common.errors",
    "InvalidState": "cbtm_common.errors",
    "MergeMethod": "cbtm._merge",
    "NotFound": "cbtm_common.errors",
    "PermissionDenied": "cbtm_common.errors",
    "PerplexityResult": "cbtm._results",
    "Policy": "cbtm._routing",
    "ResourceExhausted": "cbtm_common.errors",
    "Router": "cbtm_common.routing",
    "Routing": "cbtm._results",
    "RoutingOptions": "cbtm._routing",
    "RoutingPolicy": "cbtm._routing_grid",
    "Score": "cbtm._results",
    "ScoredDocuments": "cbtm._scored",
    "Unauthenticated": "cbtm_common.errors",
    "Unavailable": "cbtm_common.errors",
    "calibrate": "cbtm._calibrate",
    "calibrate_run": "cbtm._calibrate",
    "classify": "cbtm._classify",
    "evaluate": "cbtm._evaluate",
    "evaluate_run": "cbtm._evaluate",
    "load_task": "cbtm._classify",
    "merge": "cbtm._merge",
    "plot": "cbtm._plots",
    "routing_grid": "cbtm._routing_grid",
    "score_documents": "cbtm._scored",
}

__all__ = [
    "AlreadyExists",
    "Calibration",
    "CbtmConfig",
    "CbtmError",
    "CbtmForCausalLM",
    "Classification",
    "ClassificationTask",
    "ClusterInfo",
    "ClusterWeight",
    "Distance",
    "Ensemble",
    "Evaluation",
    "ExpertChanges",
    "Generation",
    "GridPoint",
    "HeldOutDocument",
    "IntegrityError",
    "InvalidArgument",
    "InvalidState",
    "MergeMethod",
    "NotFound",
    "PermissionDenied",
    "PerplexityResult",
    "Policy",
    "ResourceExhausted",
    "Router",
    "Routing",
    "RoutingOptions",
    "RoutingPolicy",
    "Score",
    "ScoredDocuments",
    "Unauthenticated",
    "Unavailable",
    "calibrate",
    "calibrate_run",
    "classify",
    "evaluate",
    "evaluate_run",
    "load_task",
    "merge",
    "plot",
    "routing_grid",
    "score_documents",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cbtm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_auto.install()
