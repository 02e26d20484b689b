"""What the services share: the registry, the object store, and the few settings that shape their answers."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

from google.protobuf.message import Message

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.errors import InvalidArgument, NotFound
from cbtm_common.files import FileSpec, check_relative
from cbtm_common.security import join_token
from cbtm_coordinator.limits import Quotas
from cbtm_coordinator.services.auth import caller
from cbtm_coordinator.services.credentials import Credentials
from cbtm_coordinator.storage import PART_SIZE, ObjectStore, prepare_download, prepare_upload
from cbtm_coordinator.store import Connection, Store

MAX_KEYS = 256
_HEX = frozenset("0123456789abcdef")
_Response = TypeVar("_Response", bound=Message)


@dataclass(frozen=True, kw_only=True)
class ServiceContext:
    """`url_ttl` is the life of a signed URL; `part_size` in bytes."""

    store: Store
    objects: ObjectStore
    # Root of the secrets that are handed out; they can be told again for a retry, and are stored only as hashes.
    secret_key: bytes
    # Ed25519, 32 bytes: signs receipts.
    receipt_key: bytes
    url_ttl: timedelta = timedelta(hours=1)
    part_size: int = PART_SIZE
    quotas: Quotas = field(default_factory=Quotas)
    version: str = ""
    min_worker_version: str = field(default="0.1.0")
    # Of the authority that this coordinator is served with, for tokens; empty when they need not name one.
    fingerprint: str = ""
    # How long a worker may call before it has to show its key again.
    credential_life: timedelta = timedelta(minutes=15)

    def secret(self, role: str, owner_id: str) -> str:
        """The secret of a token: a function of our key and its id."""
        digest = hmac.new(self.secret_key, f"{role}:{owner_id}".encode(), hashlib.sha256).digest()
        return f"cbtm_{role}_{base64.urlsafe_b64encode(digest).decode().rstrip('=')}"

    @property
    def credentials(self) -> Credentials:
        return Credentials(self.secret_key, clock=self.store.now, life=self.credential_life)

    def token(self, role: str, token_id: str) -> str:
        """As it is handed out: its secret, and how to know this coordinator."""
        return join_token(self.secret(role, token_id), self.fingerprint)

    def once(
        self,
        request: Message,
        make: type[_Response],
        answer: Callable[[Connection], _Response],
        *,
        keep: Callable[[_Response], bool] = lambda _: True,
    ) -> _Response:
        """Answers a mutation once for its request_id: a retry gets the first answer.

        `keep` is False of an answer that tells of no change: a retry may get another.
        """
        data = self.store.once(
            request.request_id,  # type: ignore[attr-defined]  # every mutation's request has one
            make.DESCRIPTOR.name,
            caller.get().id,
            lambda tx: answer(tx).SerializeToString(),
            keep=lambda data: keep(make.FromString(data)),
        )
        return make.FromString(data)

    def first_answer(self, request: Message, make: type[_Response]) -> _Response | None:
        """What `once` answered to this very request before. For mutations with work before their transaction, which a
        retry must not do again, or could no longer do.
        """
        data = self.store.first_answer(
            request.request_id,  # type: ignore[attr-defined]  # every mutation's request has one
            make.DESCRIPTOR.name,
            caller.get().id,
        )
        return None if data is None else make.FromString(data)

    def download(self, files: Iterable[FileSpec], keys: Sequence[str]) -> list[pb.Download]:
        """Signed GETs of `keys`, each of which must be one of `files`."""
        if len(keys) > MAX_KEYS:
            raise InvalidArgument(f"keys: {len(keys)} are more than {MAX_KEYS}", field="keys")
        known = {f.key: f for f in files}
        missing = [key for key in keys if key not in known]
        if missing:
            raise NotFound(f"keys: {missing[0]!r} is not a file that this caller may read")
        return [prepare_download(self.objects, known[key], ttl=self.url_ttl) for key in keys]

    def upload(self, file: FileSpec) -> pb.Upload:
        """What is still to be sent of `file`. What nobody sees yet may be replaced."""
        return prepare_upload(self.objects, file, ttl=self.url_ttl, replace=True, part_size=self.part_size)


def checked_files(files: Iterable[pb.FileSpec], *, maximum: int, prefix: str) -> list[FileSpec]:
    """Files that a caller describes, with keys under `prefix`. Raises InvalidArgument, naming field and file."""
    checked: list[FileSpec] = []
    for message in files:
        path = check_relative(message.path)
        if message.size <= 0:
            raise InvalidArgument(f"files.size: {path!r} has {message.size} bytes; empty files are not stored")
        if len(message.sha256) != 64 or not set(message.sha256) <= _HEX:
            raise InvalidArgument(f"files.sha256: that of {path!r} is not 64 lower-case hexadecimal digits")
        checked.append(FileSpec(path=path, size=message.size, sha256=message.sha256, key=f"{prefix}/{path}"))
    if not checked or len(checked) > maximum:
        raise InvalidArgument(f"files: {len(checked)} given, 1 to {maximum} expected", field="files")
    if len({f.path for f in checked}) != len(checked):
        raise InvalidArgument("files: a path stands there twice", field="files")
    return checked
