"""Who may take part: the workers that an owner sees, revokes and recovers, and the tokens that let people in."""

from __future__ import annotations

from datetime import timedelta

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.errors import InvalidArgument, InvalidState
from cbtm_common.ids import hash_secret, new_id
from cbtm_common.protos import from_duration
from cbtm_coordinator.lifecycle import WorkerState
from cbtm_coordinator.services import convert, paging
from cbtm_coordinator.services.context import ServiceContext
from cbtm_coordinator.store import Connection, accounts, identities, leases, rollback


def list_workers(context: ServiceContext, request: ad.ListWorkersRequest) -> ad.ListWorkersResponse:
    size = paging.page_size(request.page_size)
    with context.store.reading() as tx:
        found = identities.list_workers(tx, after_id=paging.decode(request.page_token, ""), limit=size)
        accounts_of = accounts.names(tx, {w.account_id for w in found})
        live = leases.live_leases_of_workers(tx, [w.id for w in found])
    token = paging.encode(found[-1].id) if len(found) == size else ""
    return ad.ListWorkersResponse(
        workers=[convert.worker(w, live=live.get(w.id), account=accounts_of[w.account_id]) for w in found],
        next_page_token=token,
    )


def revoke_worker(context: ServiceContext, request: ad.RevokeWorkerRequest) -> ad.RevokeWorkerResponse:
    def answer(tx: Connection) -> ad.RevokeWorkerResponse:
        now = context.store.now()
        reason = request.reason or "revoked by the run's owner"
        reopened = 0
        if request.quarantine:
            account_id = identities.get_worker(tx, request.worker_id).account_id
            reopened = rollback.quarantine(tx, now, account_id, reason)
        identities.set_revoked(tx, now, request.worker_id, reason)
        leases.revoke_leases(tx, now, reason=reason, worker_id=request.worker_id)
        return ad.RevokeWorkerResponse(
            worker=convert.worker(identities.get_worker(tx, request.worker_id)), reopened_tasks=reopened
        )

    return context.once(request, ad.RevokeWorkerResponse, answer)


def recover_worker(context: ServiceContext, request: ad.RecoverWorkerRequest) -> ad.RecoverWorkerResponse:
    ttl = from_duration(request.ttl) if request.HasField("ttl") else timedelta(days=1)

    def answer(tx: Connection) -> ad.RecoverWorkerResponse:
        now = context.store.now()
        worker = identities.get_worker(tx, request.worker_id)
        if worker.state is WorkerState.REVOKED:
            raise InvalidState(f"worker {worker.id} is revoked: {worker.reason}")
        token_id = new_id("token")
        token = identities.create_token(
            tx,
            now,
            token_id=token_id,
            role="WORKER",
            secret_hash=hash_secret(context.secret("worker", token_id)),
            label=f"recovers {worker.id}",
            account=accounts.names(tx, [worker.account_id])[worker.account_id],
            expire_time=now + ttl,
            max_uses=1,
            recovers_worker_id=worker.id,
        )
        return ad.RecoverWorkerResponse(token=convert.token(token))

    response = context.once(request, ad.RecoverWorkerResponse, answer)
    response.secret = context.token("worker", response.token.id)
    return response


def create_token(context: ServiceContext, request: ad.CreateTokenRequest) -> ad.CreateTokenResponse:
    if request.role == pb.TOKEN_ROLE_UNSPECIFIED:
        raise InvalidArgument("role: is not set; worker, consumer or admin", field="role")
    if request.max_uses < 0:
        raise InvalidArgument("max_uses: is negative; 0 is without limit", field="max_uses")
    ttl = from_duration(request.ttl) if request.HasField("ttl") else None
    role = pb.TokenRole.Name(request.role).removeprefix("TOKEN_ROLE_")
    if request.trusted and request.role != pb.TOKEN_ROLE_WORKER:
        raise InvalidArgument("trusted: is for a token of role worker", field="trusted")
    account = request.account.strip()
    if len(account) > 200 or not account.isprintable():
        raise InvalidArgument("account: at most 200 printable characters", field="account")

    def answer(tx: Connection) -> ad.CreateTokenResponse:
        now = context.store.now()
        token_id = new_id("token")
        token = identities.create_token(
            tx,
            now,
            token_id=token_id,
            role=role,
            secret_hash=hash_secret(context.secret(role.lower(), token_id)),
            label=request.label[:200],
            account=account,
            trusted=request.trusted,
            expire_time=None if ttl is None else now + ttl,
            max_uses=request.max_uses,
        )
        return ad.CreateTokenResponse(token=convert.token(token))

    response = context.once(request, ad.CreateTokenResponse, answer)
    response.secret = context.token(role.lower(), response.token.id)
    return response


def list_tokens(context: ServiceContext, request: ad.ListTokensRequest) -> ad.ListTokensResponse:
    size = paging.page_size(request.page_size)
    with context.store.reading() as tx:
        found = identities.list_tokens(tx, after_id=paging.decode(request.page_token, ""), limit=size)
        accounts_of = accounts.names(tx, {t.account_id for t in found})
    token = paging.encode(found[-1].id) if len(found) == size else ""
    return ad.ListTokensResponse(
        tokens=[convert.token(t, account=accounts_of[t.account_id]) for t in found], next_page_token=token
    )


def revoke_token(context: ServiceContext, request: ad.RevokeTokenRequest) -> ad.RevokeTokenResponse:
    return context.once(
        request,
        ad.RevokeTokenResponse,
        lambda tx: ad.RevokeTokenResponse(
            token=convert.token(identities.revoke_token(tx, context.store.now(), request.token_id))
        ),
    )
