"""Page sizes and tokens (AIP-158): a token is opaque to callers, and says after which key the next page begins.

A page is bounded in bytes too, since a message is: one that is cut short says where to go on, like any other.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message

from cbtm_common.errors import InvalidArgument
from cbtm_common.rpc import MAX_MESSAGE_BYTES

DEFAULT_PAGE, MAX_PAGE = 100, 1000
# Half of what a message may have leaves room for framing.
MAX_PAGE_BYTES = MAX_MESSAGE_BYTES // 2
_Message = TypeVar("_Message", bound=Message)


def page_size(asked: int) -> int:
    if asked < 0:
        raise InvalidArgument(f"page_size: {asked} is negative", field="page_size")
    return min(asked or DEFAULT_PAGE, MAX_PAGE)


def fitting(messages: Sequence[_Message], *, limit: int = MAX_PAGE_BYTES) -> list[_Message]:
    """The first of `messages` that take `limit` bytes together, and at least one of them."""
    page: list[_Message] = []
    size = 0
    for message in messages:
        size += message.ByteSize()
        if page and size > limit:
            break
        page.append(message)
    return page


def encode(key: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(key).encode()).decode()


def decode(token: str, default: Any) -> Any:
    """The key in a token, `default` when there is none. Raises InvalidArgument for a token that is not ours."""
    if not token:
        return default
    try:
        key = json.loads(base64.urlsafe_b64decode(token.encode()))
    except ValueError as error:
        raise InvalidArgument("page_token: is not one of ours", field="page_token") from error
    if type(key) is not type(default) and default is not None:
        raise InvalidArgument("page_token: is not of this listing", field="page_token")
    return key
