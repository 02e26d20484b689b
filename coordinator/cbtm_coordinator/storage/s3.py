"""The S3 backend: any S3-compatible store, through boto3.

The store is asked for little (put, get, head, list, delete, parts) and what it did is checked. A presigned PUT binds
content-length and `x-amz-checksum-sha256`; a presigned part binds its length. A digest that the store reports is
believed only if it covers the whole object and the store was once seen to refuse a wrong one; otherwise `stat` leaves
it out and `verify` reads the object back. Conditional writes are not relied upon: keys are never used twice, and the
registry is what makes a checkpoint visible.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from cbtm_common.errors import CbtmError, IntegrityError, InvalidArgument, NotFound, PermissionDenied, Unavailable
from cbtm_common.ids import new_id
from cbtm_coordinator.storage.base import (
    CHUNK,
    ListedObject,
    ObjectStat,
    OpenUpload,
    Part,
    Signed,
    check_key,
    utc_now,
)

_MISSING = frozenset({"404", "NoSuchKey", "NotFound", "NoSuchUpload"})
_DENIED = frozenset({"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidSecurity"})
_WRONG_DIGEST = frozenset({"BadDigest", "XAmzContentChecksumMismatch", "InvalidDigest"})


@dataclass(frozen=True, kw_only=True)
class S3Config:
    """A bucket. Credentials come by boto3's usual chain (environment, files, instance role)."""

    bucket: str
    # Put before every key, with a slash between; may be empty.
    prefix: str = ""
    # Empty for AWS itself.
    endpoint_url: str = ""
    # The endpoint as workers and clients reach it, when that is not `endpoint_url`.
    public_endpoint_url: str = ""
    region: str = "us-east-1"
    # `https://endpoint/bucket/key` rather than `https://bucket.endpoint/key`.
    path_style: bool = True


class S3Store:
    """An `ObjectStore` in a bucket. No request is made before the first call."""

    def __init__(self, config: S3Config, *, clock: Callable[[], datetime] = utc_now) -> None:
        self.config = config
        self._clock = clock
        self._prefix = f"{config.prefix}/" if config.prefix else ""
        self._client = _make_client(config, config.endpoint_url)
        public = config.public_endpoint_url
        self._signing_client = _make_client(config, public) if public else self._client
        self._refuses_wrong_digests: bool | None = None
        self._probe_lock = threading.Lock()

    def check(self) -> None:
        try:
            self._check_bucket()
            key = f"scratch/check/{new_id('check')}"
            self.put_bytes(key, b"cbtm")
            stored = b"".join(self.read(key))
            self.delete(key)
        except CbtmError as error:
            where = self.config.endpoint_url or "AWS"
            raise type(error)(f"object_store: bucket {self.config.bucket!r} at {where}: {error.message}") from error
        if stored != b"cbtm":
            raise IntegrityError(
                f"object_store: bucket {self.config.bucket!r} gives back other bytes than were written"
            )

    # Signing

    def sign_get(self, key: str, *, ttl: timedelta) -> Signed:
        return self._sign("GET", "get_object", ttl, {}, Key=self._key(key))

    def sign_put(self, key: str, *, size: int, sha256: str, ttl: timedelta) -> Signed:
        checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
        headers = {"content-length": str(size), "x-amz-checksum-sha256": checksum}
        return self._sign(
            "PUT", "put_object", ttl, headers, Key=self._key(key), ContentLength=size, ChecksumSHA256=checksum
        )

    def sign_part(self, key: str, upload_id: str, *, number: int, size: int, ttl: timedelta) -> Signed:
        return self._sign(
            "PUT",
            "upload_part",
            ttl,
            {"content-length": str(size)},
            Key=self._key(key),
            UploadId=upload_id,
            PartNumber=number,
            ContentLength=size,
        )

    def _sign(self, method: str, operation: str, ttl: timedelta, headers: dict[str, str], **parameters: Any) -> Signed:
        seconds = math.ceil(ttl.total_seconds())
        url = self._signing_client.generate_presigned_url(
            operation, Params={"Bucket": self.config.bucket, **parameters}, ExpiresIn=seconds, HttpMethod=method
        )
        return Signed(method=method, url=url, headers=headers, expires=self._clock() + timedelta(seconds=seconds))

    # Objects

    def stat(self, key: str) -> ObjectStat | None:
        try:
            head = self._call("head_object", Key=self._key(key), ChecksumMode="ENABLED")
        except NotFound:
            return None
        size = head.get("ContentLength")
        if size is None:
            raise Unavailable(f"the object store broke off what it told of {key}")
        # A checksum of the parts' checksums ends in "-<parts>", and has another type.
        checksum = str(head.get("ChecksumSHA256", ""))
        whole = checksum and "-" not in checksum and head.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT"
        if not whole or not self._vouches():
            return ObjectStat(size=size)
        try:
            digest = base64.b64decode(checksum, validate=True)
        except binascii.Error:
            digest = b""
        if len(digest) != hashlib.sha256().digest_size:
            raise Unavailable(f"the object store broke off what it told of {key}")
        return ObjectStat(size=size, sha256=digest.hex())

    def read(self, key: str) -> Iterator[bytes]:
        from botocore.exceptions import BotoCoreError

        body = self._call("get_object", Key=self._key(key))["Body"]
        try:
            yield from body.iter_chunks(CHUNK)
        except BotoCoreError as error:
            raise Unavailable(f"the object store broke off {key}: {error}") from error
        finally:
            body.close()

    def put_bytes(self, key: str, data: bytes) -> None:
        checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
        self._call("put_object", Key=self._key(key), Body=data, ChecksumSHA256=checksum)

    def delete(self, key: str) -> None:
        self._call("delete_object", Key=self._key(key))

    # Uploads in parts

    def create_multipart(self, key: str) -> str:
        return str(self._call("create_multipart_upload", Key=self._key(key))["UploadId"])

    def list_parts(self, key: str, upload_id: str) -> list[Part]:
        # Some stores list a part once for each time that it was sent: the newest counts.
        newest: dict[int, tuple[datetime, Part]] = {}
        more: dict[str, int] = {}
        while True:
            page = self._call("list_parts", Key=self._key(key), UploadId=upload_id, **more)
            for found in page.get("Parts", ()):
                number, sent = found["PartNumber"], found["LastModified"]
                if number not in newest or newest[number][0] <= sent:
                    newest[number] = (sent, Part(number=number, size=found["Size"], etag=found["ETag"]))
            if not page.get("IsTruncated"):
                return [newest[number][1] for number in sorted(newest)]
            more = {"PartNumberMarker": int(page["NextPartNumberMarker"])}

    def list_multipart(self, prefix: str) -> Iterator[OpenUpload]:
        more: dict[str, str] = {}
        while True:
            page = self._call("list_multipart_uploads", Prefix=self._prefix + prefix, **more)
            for found in page.get("Uploads", ()):
                key = found["Key"].removeprefix(self._prefix)
                yield OpenUpload(key=key, upload_id=found["UploadId"], started=found["Initiated"])
            if not page.get("IsTruncated"):
                return
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def complete_multipart(self, key: str, upload_id: str, parts: Sequence[Part]) -> None:
        named = [{"PartNumber": p.number, "ETag": p.etag} for p in sorted(parts, key=lambda p: p.number)]
        self._call(
            "complete_multipart_upload", Key=self._key(key), UploadId=upload_id, MultipartUpload={"Parts": named}
        )

    def abort_multipart(self, key: str, upload_id: str) -> None:
        try:
            self._call("abort_multipart_upload", Key=self._key(key), UploadId=upload_id)
        except NotFound:
            return

    def list(self, prefix: str) -> Iterator[ListedObject]:
        more: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", Prefix=self._prefix + prefix, **more)
            for found in page.get("Contents", ()):
                key = found["Key"].removeprefix(self._prefix)
                yield ListedObject(key=key, size=found["Size"], modified=found["LastModified"])
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _check_bucket(self) -> None:
        try:
            self._call("head_bucket")
        except NotFound as error:
            raise InvalidArgument("there is no such bucket; create it first", field="object_store") from error

    def _key(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _vouches(self) -> bool:
        """Whether this store refuses a body that does not have the SHA-256 it came with; found out once."""
        with self._probe_lock:
            if self._refuses_wrong_digests is None:
                self._refuses_wrong_digests = self._probe_digests()
            return self._refuses_wrong_digests

    def _probe_digests(self) -> bool:
        key = f"scratch/check/{new_id('check')}"
        wrong = base64.b64encode(hashlib.sha256(b"something else").digest()).decode()
        try:
            self._call("put_object", Key=self._key(key), Body=b"cbtm", ChecksumSHA256=wrong)
        except IntegrityError:
            return True
        self.delete(key)
        return False

    def _call(self, operation: str, **parameters: Any) -> Any:
        """One call of boto3's, with its errors as ours."""
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
        from botocore.parsers import ResponseParserError

        try:
            return getattr(self._client, operation)(Bucket=self.config.bucket, **parameters)
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            said = f"{operation}: {error}"
            if code == "NoSuchBucket":
                raise InvalidArgument(f"{said}; create it first", field="object_store") from error
            if code in _MISSING:
                raise NotFound(said) from error
            if code in _DENIED:
                raise PermissionDenied(said) from error
            if code in _WRONG_DIGEST:
                raise IntegrityError(said) from error
            raise Unavailable(said) from error
        except NoCredentialsError as error:
            remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or see boto3's documentation on credentials"
            raise PermissionDenied(f"{operation}: there are no credentials; {remedy}") from error
        except BotoCoreError as error:
            raise Unavailable(f"{operation}: {error}") from error
        except (ValueError, ResponseParserError) as error:
            # An answer whose headers or body end in the middle of something, such as a date.
            raise Unavailable(f"{operation}: the object store's answer cannot be read: {error}") from error


def _make_client(config: S3Config, endpoint_url: str) -> Any:
    from boto3.session import Session
    from botocore.config import Config

    # A session of its own: the shared one is not thread-safe, and keeps the first credentials that it found.
    return Session().client(
        "s3",
        endpoint_url=endpoint_url or None,
        region_name=config.region,
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path" if config.path_style else "virtual"},
            # Only what we ask for: other stores refuse headers that they do not know.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=32,
            retries={"mode": "standard", "total_max_attempts": 5},
        ),
    )
