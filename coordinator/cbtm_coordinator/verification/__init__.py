"""Whether work of unknown people may be believed: pure decisions, no clock, no chance, no I/O.

    evaluation   what one evaluator measured of a submitted model, judged
    quorum       what several reports on one thing together say, and who stood against them
    audits       which committed segments are trained again, and what the comparison says
    trust        how a worker's standing changes, and when it is shut out

Every decision carries a reason for a person and its evidence for the event log. Chance is an argument. Who reports,
and what follows in the registry, is `store.checks`; the protocol is docs/decisions/0018-verification.md.
"""
