"""Enrolment: a worker registers its key, anew after it was lost, and gets credentials by it."""

from __future__ import annotations

from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.errors import InvalidArgument
from cbtm_common.faults import point
from cbtm_common.ids import new_id
from cbtm_common.keys import is_signed, registration_text
from cbtm_common.protos import duration
from cbtm_coordinator.services import convert
from cbtm_coordinator.services.auth import caller
from cbtm_coordinator.services.context import ServiceContext
from cbtm_coordinator.store import Connection, identities, leases
from cbtm_coordinator.store.records import TokenRecord, WorkerRecord


def register(context: ServiceContext, request: ws.RegisterRequest) -> ws.RegisterResponse:
    name = request.name.strip()
    if not 1 <= len(name) <= 200 or not name.isprintable():
        raise InvalidArgument("name: 1 to 200 printable characters are needed", field="name")
    if not is_signed(request.public_key, registration_text(request.request_id, request.public_key), request.proof):
        raise InvalidArgument("proof: is not a signature of this request by public_key", field="proof")
    public_key = request.public_key.hex()

    def answer(tx: Connection) -> ws.RegisterResponse:
        now = context.store.now()
        token = identities.use_token(tx, now, caller.get().id)
        if token.recovers_worker_id:
            return ws.RegisterResponse(worker=convert.worker(_recover(context, tx, token, public_key)))
        worker = identities.create_worker(
            tx,
            now,
            worker_id=new_id("worker"),
            account_id=token.account_id,
            name=name,
            public_key=public_key,
            token_id=caller.get().id,
            hardware_json=convert.hardware_json(request.hardware),
            version=convert.printable(request.version, 64),
        )
        return ws.RegisterResponse(worker=convert.worker(worker))

    response = context.once(request, ws.RegisterResponse, answer)
    point("coordinator.register.after_commit")
    return response


def issue_credential(context: ServiceContext, request: ws.IssueCredentialRequest) -> ws.IssueCredentialResponse:
    signer, credentials = caller.get(), context.credentials
    return ws.IssueCredentialResponse(
        credential=credentials.issue(signer.id, signer.key_id), life=duration(credentials.life)
    )


def _recover(context: ServiceContext, tx: Connection, token: TokenRecord, public_key: str) -> WorkerRecord:
    now = context.store.now()
    worker = identities.replace_key(tx, now, token.recovers_worker_id, public_key)
    # Whoever has the former key holds nothing with it any more.
    leases.revoke_leases(tx, now, reason="this worker registered a new key", worker_id=worker.id)
    return worker
