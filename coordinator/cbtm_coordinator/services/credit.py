"""Credit as callers see it: the leaderboard, and receipts signed by this coordinator."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_common import receipts
from cbtm_common.errors import InvalidArgument
from cbtm_coordinator.services import paging
from cbtm_coordinator.services.context import ServiceContext
from cbtm_coordinator.store import accounts, credits

_BY = {
    ad.LEADERBOARD_BY_ACCOUNT: credits.LeaderboardBy.ACCOUNT,
    ad.LEADERBOARD_BY_WORKER: credits.LeaderboardBy.WORKER,
}


def leaderboard(context: ServiceContext, request: ad.GetLeaderboardRequest) -> ad.GetLeaderboardResponse:
    by = _BY.get(request.by)
    if by is None:
        raise InvalidArgument("by: is not set; account or worker", field="by")
    size = paging.page_size(request.page_size)
    after = None
    if request.page_token:
        tokens, last = paging.decode(request.page_token, [0, ""])
        after = int(tokens), str(last)
    with context.store.reading() as tx:
        found = credits.leaderboard(tx, by, after=after, limit=size)
    rows = [
        ad.LeaderboardRow(
            id=row.id, name=row.name, account=row.account, verified_tokens=row.verified_tokens, workers=row.workers
        )
        for row in found
    ]
    token = paging.encode([found[-1].verified_tokens, found[-1].id]) if len(found) == size else ""
    return ad.GetLeaderboardResponse(rows=rows, next_page_token=token)


def receipt(context: ServiceContext, account_id: str) -> str:
    """A signed document on all that an account has earned until now."""
    now = context.store.now()
    with context.store.reading() as tx:
        lines = credits.statement(tx, account_id)
        name = accounts.names(tx, [account_id])[account_id]
    said = {
        "account_id": account_id,
        "account": name,
        "issue_time": now.isoformat(timespec="seconds"),
        "verified_tokens": sum(line.tokens for line in lines),
        "lines": [
            {
                "kind": line.kind.value,
                "run_id": line.run_id,
                "run": line.run_name,
                "task_id": line.task_id,
                "cluster": line.cluster_index,
                "worker_id": line.worker_id,
                "verification": line.verification,
                "tokens": line.tokens,
                "time": line.last_time.isoformat(timespec="seconds"),
            }
            for line in lines
        ],
    }
    return receipts.sign(said, signing_key(context))


def public_key(context: ServiceContext) -> str:
    return receipts.public_key_of(signing_key(context))


def signing_key(context: ServiceContext) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(context.receipt_key)
