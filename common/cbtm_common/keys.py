"""A worker's Ed25519 key, and what it signs with it.

The key never leaves its machine. It signs two texts, each with its purpose in front so that neither passes for the
other: that it holds the key which it registers, and that it asks for a credential at a certain time.
"""

from __future__ import annotations

import base64
import binascii
import hashlib

from cbtm_common.errors import Unauthenticated

SIGNATURE = "Signature"


def new_key() -> bytes:
    """A private key, 32 bytes."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.generate().private_bytes_raw()


def public_key_of(private_key: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()


def key_id(public_key: bytes) -> str:
    """32 hexadecimal digits."""
    return hashlib.sha256(public_key).hexdigest()[:32]


def sign(private_key: bytes, text: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(private_key).sign(text)


def is_signed(public_key: bytes, text: bytes, signature: bytes) -> bool:
    """Whether `signature` is of `text` by the holder of this key; False also for what is no key."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, text)
    except (InvalidSignature, ValueError):
        return False
    return True


def registration_text(request_id: str, public_key: bytes) -> bytes:
    return f"cbtm-register-1\n{request_id}\n{public_key.hex()}".encode()


def _credential_text(worker_id: str, time_us: int) -> bytes:
    return f"cbtm-credential-1\n{worker_id}\n{time_us}".encode()


def signed_authorization(private_key: bytes, worker_id: str, time_us: int) -> str:
    """What stands in `authorization` where a credential is asked for. `time_us`: microseconds since 1970."""
    signature = base64.urlsafe_b64encode(sign(private_key, _credential_text(worker_id, time_us))).decode()
    return f"{SIGNATURE} {worker_id}.{time_us}.{signature}"


class SignedRequest:
    """`signed_authorization`, read. Raises Unauthenticated when it is no such thing."""

    def __init__(self, value: str) -> None:
        parts = value.split(".")
        try:
            self.worker_id, time_us, signature = parts
            self.time_us = int(time_us)
            self._signature = base64.b64decode(signature, altchars=b"-_", validate=True)
        except (ValueError, binascii.Error) as error:
            raise Unauthenticated(f"authorization: is not '{SIGNATURE} WORKER.TIME.SIGNATURE'") from error

    def is_by(self, public_key: bytes) -> bool:
        return is_signed(public_key, _credential_text(self.worker_id, self.time_us), self._signature)
